"""A run whose reward server dies: it waits and continues, or stops with a checkpoint, and loses nothing."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from marval_rl.rewards.remote import Remote
from remote_rewards import brightness
from remote_servers import ThreadServer
from safetensors.torch import load_file
from tiny_models import tiny_student
from tiny_recipes import comparable_lines

from marval_rl.data import class_rows
from marval_rl.errors import RewardError
from marval_rl.evaluation.image_set import ImagePlan
from marval_rl.rewarding import RewardSet
from marval_rl.rewarding.serving import client as client_module
from marval_rl.runtime.resume import find_checkpoint
from marval_rl.trainers.grpo import MARGRPOConfig, MARGRPOTrainer

STEPS = 6
STOPS_IN = (3, 3)  # step, micro-batch: after 3 steps neither a line nor a checkpoint is due


@pytest.fixture(scope="module")
def server():
    server = ThreadServer(brightness)
    yield server
    server.stop()


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(client_module, "LONGEST_DELAY", 0.2)


class Observed(MARGRPOTrainer):
    """Calls `before(step, micro_batch)` before each rollout is scored."""

    before: Callable[[int, int], None] = staticmethod(lambda step, micro_batch: None)

    def generate_rollouts(self, rows: list[dict[str, Any]]) -> None:
        self.before(self.state.global_step, self.micro_batch)
        super().generate_rollouts(rows)


def trainer_for(run: Path, reward: Any) -> Observed:
    """A rollout serves two micro-batches and a step has five: every other step begins with the second half of the step
    before, and then makes two rollouts of its own."""
    config = MARGRPOConfig(
        output_dir=str(run),
        max_steps=STEPS,
        per_device_train_batch_size=3,
        gradient_accumulation_steps=5,
        steps_per_generation=2,
        num_generations=3,
        num_unmasking_steps=2,
        logging_steps=2,
        save_steps=2,
        eval_strategy="no",
        eval_on_start=False,
        learning_rate=1e-3,
    )
    return Observed(tiny_student(), RewardSet([reward]), config, train_dataset=class_rows(3))


@pytest.fixture(scope="module")
def undisturbed(server, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("undisturbed")
    trainer_for(run, Remote(server.url)).train()
    return run


def assert_same_end(run: Path, other: Path) -> None:
    """The weights, their average and the optimizer agree bit for bit."""
    for file in (
        "final/model.safetensors",
        f"checkpoint-{STEPS}/model.safetensors",
        f"checkpoint-{STEPS}/buffer_0.safetensors",
    ):
        one, two = load_file(run / file), load_file(other / file)
        assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one), file
    one, two = (
        torch.load(folder / f"checkpoint-{STEPS}" / "optimizer.pt", weights_only=True)["state"]
        for folder in (run, other)
    )
    assert all(torch.equal(one[key][name], two[key][name]) for key in one for name in one[key])


def test_the_run_continues_when_the_server_comes_back(server, undisturbed, tmp_path, capsys):
    trainer = trainer_for(tmp_path, Remote(server.url))
    restart = threading.Timer(0.5, server.start)

    def stop(step: int, micro_batch: int) -> None:
        if (step, micro_batch) == STOPS_IN:
            server.stop()
            restart.start()

    trainer.before = stop
    trainer.train()
    restart.join()
    assert_same_end(tmp_path, undisturbed)
    assert comparable_lines(tmp_path) == comparable_lines(undisturbed)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("remote reward: ")]
    assert len(lines) == 2 and "does not score" in lines[0] and "scores again" in lines[1]


def test_the_server_stays_away_and_the_run_stops_with_a_checkpoint(server, undisturbed, tmp_path):
    trainer = trainer_for(tmp_path, Remote(server.url, max_wait=0.4))

    def stop(step: int, micro_batch: int) -> None:
        if (step, micro_batch) == STOPS_IN:
            server.stop()

    trainer.before = stop
    kept = tmp_path / "checkpoint-3"
    with pytest.raises(RewardError, match=f"{server.url} did not score .*; {kept} is kept, --resume continues from it"):
        trainer.train()
    assert find_checkpoint(tmp_path, "latest") == kept
    server.start()
    trainer_for(tmp_path, Remote(server.url)).train(resume_from_checkpoint=str(kept))
    assert_same_end(tmp_path, undisturbed)

    # Every step is in one line: steps 3 and 4 in one each, in the undisturbed run together.
    lines, others = comparable_lines(tmp_path), comparable_lines(undisturbed)
    assert [line["step"] for line in lines] == [2, 3, 4, 6]
    assert (lines[0], lines[3]) == (others[0], others[2])
    third, fourth, both = lines[1], lines[2], others[1]
    assert (third["loss"] + fourth["loss"]) / 2 == pytest.approx(both["loss"], rel=1e-4)
    for name in ("rewards/Remote/mean", "rewards/Remote/std"):  # of three rollouts and of two
        assert (3 * third[name] + 2 * fourth[name]) / 5 == pytest.approx(both[name], rel=1e-5)


def test_a_reward_that_fails_in_the_first_step_leaves_no_checkpoint(tmp_path):
    def broken(*, images, **columns):
        raise RuntimeError("out of order")

    with pytest.raises(RewardError, match=r"out of order; no step was completed, so there is no checkpoint"):
        trainer_for(tmp_path, broken).train()
    assert list(tmp_path.glob("checkpoint-*")) == []


def test_a_judge_that_fails_leaves_a_checkpoint_of_the_step_before_it(tmp_path):
    """Between two steps nothing is half done."""
    calls = []

    def judge(*, images, **columns):
        calls.append(len(images))
        raise RuntimeError("out of order")

    trainer = trainer_for(tmp_path, lambda *, images, **columns: images.mean(dim=(1, 2, 3)))
    trainer.args.eval_strategy, trainer.args.eval_steps = "steps", 2
    trainer.eval_plan = ImagePlan(3, trainer.mar.config.num_classes, batch_size=3)
    trainer.evaluator.add_rewards(RewardSet([judge]), trainer.prompts_for, trainer.class_names)
    with pytest.raises(RewardError, match=f"out of order; {tmp_path / 'checkpoint-2'} is kept"):
        trainer.train()
    assert calls == [3] and find_checkpoint(tmp_path, "latest").name == "checkpoint-2"
