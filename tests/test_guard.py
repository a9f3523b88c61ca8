"""Steps that are not finite: skipped, counted, named, and after too many the run stops with a checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import tiny_model
from tiny_trainers import (
    QUIET,
    assert_equal_states,
    distiller,
    grey_student,
    grpo_trainer,
    logged,
    pretrainer,
    snapshot,
    tiny_images,
)
from torch import Tensor
from transformers import TrainerCallback

from marval_rl.errors import NonFiniteError, RewardError
from marval_rl.runtime.checkpoints import complete_checkpoints, find_problem
from marval_rl.runtime.guard import NonFiniteGuard
from marval_rl.trainers.pretrain import PretrainConfig, PretrainTrainer


class Spoiled(PretrainTrainer):
    """Changes the loss of some micro-batches."""

    def spoil(self, loss: Tensor, step: int, micro_batch: int) -> Tensor:
        return loss

    def training_loss(self, *args: Any) -> Tensor:
        return self.spoil(super().training_loss(*args), self.state.global_step, self.micro_batch)


class Record(TrainerCallback):
    """The weights, their average and the optimizer's state before and after each step."""

    def __init__(self, trainer: PretrainTrainer):
        self.trainer = trainer
        self.before: list[list[dict[str, Tensor]]] = []
        self.after: list[list[dict[str, Tensor]]] = []

    def look(self) -> list[dict[str, Tensor]]:
        states = self.trainer.optimizer.optimizer.state.values()
        flat = {f"{i}.{name}": value.clone() for i, state in enumerate(states) for name, value in state.items()}
        return [snapshot(self.trainer.mar), snapshot(self.trainer.ema.module), flat]

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.before.append(self.look())

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.after.append(self.look())


def spoiled(folder: Path, spoil: Any, **settings: Any) -> tuple[Spoiled, Record]:
    trainer = Spoiled(tiny_model(), PretrainConfig(str(folder), **{**QUIET, **settings}), train_dataset=tiny_images())
    trainer.spoil = spoil
    record = Record(trainer)
    trainer.add_callback(record)
    return trainer, record


def in_step(bad: int, change: Any, micro_batch: int = 0) -> Any:
    return lambda loss, step, at: change(loss) if (step, at) == (bad, micro_batch) else loss


class NanGradient(torch.autograd.Function):
    """The identity, with a gradient of NaN."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * torch.nan


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda loss: loss * torch.nan, "loss"),
        (lambda loss: loss + torch.inf, "loss"),  # with a gradient that is finite
        (NanGradient.apply, "the gradient"),
    ],
    ids=["nan", "infinite", "gradient"],
)
@pytest.mark.parametrize("max_grad_norm", [1.0, 0.0])
def test_a_step_that_is_not_finite_moves_nothing(tmp_path, capsys, change, named, max_grad_norm):
    trainer, record = spoiled(tmp_path, in_step(1, change), max_steps=3, max_grad_norm=max_grad_norm)
    trainer.train()
    for before, after in zip(record.before[1], record.after[1], strict=True):
        assert_equal_states(before, after)
    for step in (0, 2):
        name = "encoder_blocks.0.attn.qkv.weight"
        assert not torch.equal(record.before[step][0][name], record.after[step][0][name])
    assert f"step 1 is skipped, it is not finite: {named} (1 in a row" in capsys.readouterr().err
    assert logged(trainer, "skipped_steps") == [1.0]
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert ["skipped_steps" in line for line in lines] == [False, True, False]
    for line in lines:
        json.dumps(line, allow_nan=False)
    assert "loss_mse" not in lines[1] and "loss_mse" in lines[2]  # what the bad step recorded is not averaged


def test_one_bad_micro_batch_of_an_accumulation_spoils_the_step(tmp_path):
    nan = in_step(1, lambda loss: loss * torch.nan, micro_batch=0)
    trainer, record = spoiled(tmp_path, nan, max_steps=3, gradient_accumulation_steps=2, per_device_train_batch_size=4)
    trainer.train()
    for before, after in zip(record.before[1], record.after[1], strict=True):
        assert_equal_states(before, after)
    assert logged(trainer, "skipped_steps") == [1.0]


def test_too_many_in_a_row_stop_the_run_with_a_checkpoint(tmp_path):
    trainer, record = spoiled(
        tmp_path,
        lambda loss, step, _: loss * torch.nan if step >= 2 else loss,
        max_steps=9,
        max_skipped_steps=3,
        save_strategy="steps",
        save_steps=100,
    )
    with pytest.raises(NonFiniteError, match=r"4 steps in a row .* in step 5 .* was loss: .*; .*checkpoint-6 is kept"):
        trainer.train()
    assert [folder.name for folder in complete_checkpoints(tmp_path)] == ["checkpoint-6"]
    kept = PretrainTrainer(tiny_model(9), trainer.args, train_dataset=trainer.train_dataset)
    kept.args.max_steps = 6
    kept.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    assert_equal_states(snapshot(kept.ema.module), record.after[1][1])  # of the last good step


def test_steps_are_counted_in_a_row(tmp_path):
    trainer, _ = spoiled(
        tmp_path, lambda loss, step, _: loss * torch.nan if step % 2 else loss, max_steps=7, max_skipped_steps=1
    )
    trainer.train()
    assert logged(trainer, "skipped_steps") == [1.0] * 3


def test_the_first_figure_that_is_not_finite_is_named(tmp_path, capsys):
    """The teacher's score is what breaks; the loss is only what comes of it."""
    trainer = distiller(tmp_path, tiny_model(), max_steps=4, auxiliary_warmup_steps=0, auxiliary_updates=1)
    matching, healthy = trainer.matching, trainer.matching._teacher_noise
    matching._teacher_noise = lambda *args: healthy(*args) * (torch.nan if trainer.state.global_step == 2 else 1)
    trainer.train()
    assert "step 2 is skipped, it is not finite: student_loss (1 in a row" in capsys.readouterr().err


def test_a_name_given_by_hand_comes_before_those_computed_from_it():
    guard = NonFiniteGuard(max_skipped_steps=0)
    guard.begin_step()
    guard.blame("unmasking step 0", torch.ones(2))
    guard.blame("unmasking step 1", torch.tensor([1.0, torch.inf]))
    guard.watch(torch.tensor(torch.nan))
    guard.step_is_bad = True
    with pytest.raises(NonFiniteError, match="was unmasking step 1:"):
        guard.count(step=5)
    guard.begin_step()
    guard.count(step=6)
    assert guard.in_a_row == 0


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_reward_that_is_not_finite_stops_the_run_with_a_checkpoint(tmp_path, value):
    """A reward says None for an image that it cannot score; anything else is a bug."""
    calls = []

    def broken(images: Tensor, **_: Any) -> Tensor:
        calls.append(len(images))
        return images.mean(dim=(1, 2, 3)) * (value if len(calls) == 2 else 1)

    trainer = grpo_trainer(tmp_path, grey_student(), broken, max_steps=3, save_strategy="steps", save_steps=100)
    with pytest.raises(RewardError, match=r"reward 'broken': the score of sample 0 is .*checkpoint-1 is kept"):
        trainer.train()
    assert find_problem(tmp_path / "checkpoint-1") is None


def test_a_negative_limit_is_refused(tmp_path):
    with pytest.raises(ValueError, match="max_skipped_steps must not be negative, but is -1"):
        pretrainer(tmp_path, tiny_model(), max_skipped_steps=-1)
