"""Stopping and resuming: a run that was killed and resumed ends exactly as one that was left alone."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from kill_stress import same
from safetensors.torch import load_file
from tiny_recipes import COMMANDS, command_line, comparable_lines, run_recipe
from tiny_trainers import power_cut_in_step

from marval_rl.errors import CheckpointError
from marval_rl.runtime.resume import find_checkpoint


@pytest.fixture(scope="module")
def undisturbed(tiny_runs, tmp_path_factory) -> dict[str, Path]:
    """A finished run of each recipe."""
    runs = {"teacher": tiny_runs.teacher, "distill": tiny_runs.student}
    for recipe in ("grpo", "reward_backprop"):
        runs[recipe] = tmp_path_factory.mktemp(recipe) / "undisturbed"
        assert run_recipe(recipe, runs[recipe], **tiny_runs.models_of(recipe)) == 0
    return runs


def assert_same_end(run: Path, other: Path, last: str = "checkpoint-6") -> None:
    """The final model, every state in the last checkpoint and the metrics agree bit for bit."""
    for file in (
        "final/model.safetensors",
        "final/auxiliary.safetensors",
        *(f"{last}/{name}.safetensors" for name in ("model", "ema", "buffer_0")),
    ):
        assert (run / file).exists() == (other / file).exists(), file
        if (run / file).exists():
            one, two = load_file(run / file), load_file(other / file)
            assert one.keys() == two.keys()
            assert all(torch.equal(one[name], two[name]) for name in one), file
    for file in ("optimizer.pt", "scheduler.pt"):
        assert same(*(torch.load(folder / last / file, weights_only=True) for folder in (run, other))), file
    assert comparable_lines(run) == comparable_lines(other)


def assert_resumed_alike(folder: Path, recipe: str, step: int, last: str, **settings: Any) -> None:
    """A run that broke off in this step and was resumed ends as one that was left alone."""
    assert run_recipe(recipe, folder / "whole", **settings) == 0
    with power_cut_in_step(step):
        assert run_recipe(recipe, folder / "broken", **settings) == 1
    assert run_recipe(recipe, folder / "broken", "--resume", **settings) == 0
    assert_same_end(folder / "broken", folder / "whole", last)


@pytest.mark.parametrize("recipe", COMMANDS)
def test_a_run_that_was_interrupted_and_resumed_ends_as_an_undisturbed_one(undisturbed, tiny_runs, tmp_path, recipe):
    run, settings = tmp_path / "run", tiny_runs.models_of(recipe)
    with power_cut_in_step(4):  # a step after the checkpoint, so that metrics.jsonl has a line too many
        assert run_recipe(recipe, run, **settings) == 1
    assert [line["step"] for line in comparable_lines(run)] == [0, 1, 2, 3, 3, 4]
    assert not (run / "checkpoint-6").exists() and not (run / "final").exists()
    torch.manual_seed(99)  # a new process has another state
    assert run_recipe(recipe, run, "--resume", **settings) == 0
    assert_same_end(run, undisturbed[recipe])


def test_the_figures_of_a_line_survive_a_checkpoint_in_between(tiny_runs, tmp_path):
    # A line is the mean over 4 steps, the checkpoint lies in their middle.
    settings = {**tiny_runs.models_of("grpo"), "logging_steps": 4, "save_steps": 2, "max_steps": 4, "eval_steps": 4}
    assert_resumed_alike(tmp_path, "grpo", 3, "checkpoint-4", **settings)


def test_several_epochs_are_resumed_in_the_same_order_of_the_data(tmp_path):
    # 1297 images in batches of 500: an epoch ends after 3 steps, and the run breaks off in the second one.
    settings = {
        "max_steps": 5,
        "per_device_train_batch_size": 500,
        "eval_strategy": "no",
        "eval_on_start": False,
        "save_steps": 1,
        "lr_scheduler_kwargs": json.dumps({"num_decay_steps": 1}),
    }
    assert_resumed_alike(tmp_path, "teacher", 4, "checkpoint-5", **settings)


def test_a_damaged_checkpoint_is_skipped_with_a_message(undisturbed, tiny_runs, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(undisturbed["distill"], run)
    shutil.rmtree(run / "final")
    state = run / "checkpoint-6" / "trainer_state.json"
    state.write_text(state.read_text()[:100])
    assert run_recipe("distill", run, "--resume", **tiny_runs.models_of("distill")) == 0
    output = capsys.readouterr().out
    assert f"{run / 'checkpoint-6'} is damaged (trainer_state.json has 100 bytes where" in output
    assert f"resuming from {run / 'checkpoint-3'}" in output
    assert_same_end(run, undisturbed["distill"])


@pytest.mark.parametrize("named", [None, "checkpoint-3"])
def test_a_finished_run_and_a_named_checkpoint_are_resumed_to_the_same_end(undisturbed, tiny_runs, tmp_path, named):
    run = tmp_path / "run"
    shutil.copytree(undisturbed["distill"], run)
    flags = ["--resume", *([] if named is None else [str(run / named)])]
    assert run_recipe("distill", run, *flags, **tiny_runs.models_of("distill")) == 0
    assert_same_end(run, undisturbed["distill"])


@pytest.mark.parametrize("resume", ["latest", "named"])
def test_without_a_complete_checkpoint_there_is_nothing_to_resume(tmp_path, resume):
    torn = tmp_path / "checkpoint-2"
    torn.mkdir()
    (torn / "manifest.json").write_text('{"step": 2, "fil')
    if resume == "latest":
        with pytest.raises(CheckpointError, match="no complete checkpoint to --resume from; checkpoint-2 is damaged"):
            find_checkpoint(tmp_path, "latest")
    else:
        with pytest.raises(CheckpointError, match=r"checkpoint-2 is not a complete checkpoint: manifest.json is d"):
            find_checkpoint(tmp_path, str(torn))


# Real processes, real signals

SIGNALLING_REWARD = '''
import os
import signal

scored = 0


def brightness(images, **columns):
    """Sends this process a signal when it is asked for the third time."""
    global scored
    scored += 1
    if scored == 3 and "SEND_SIGNAL" in os.environ:
        os.kill(os.getpid(), int(os.environ["SEND_SIGNAL"]))
    return images.mean(dim=(1, 2, 3))
'''


@pytest.fixture(scope="module")
def signalling(tiny_runs, tmp_path_factory) -> tuple[dict[str, Any], Path]:
    """Settings of GRPO with an anchor and a reward that sends a signal, and their undisturbed run.

    A rollout is made in step 0, 2, 4, ...: every second step trains the student and the others the auxiliary network.
    """
    folder = tmp_path_factory.mktemp("signalling")
    (folder / "rewards.py").write_text(SIGNALLING_REWARD)
    settings = {
        **tiny_runs.models_of("grpo"),
        "reward_funcs": f"{folder / 'rewards.py'}:brightness",
        "steps_per_generation": 1,
        "max_steps": 9,
        "save_steps": 3,
        "eval_strategy": "no",
        "eval_on_start": False,
    }
    assert run_recipe("grpo", folder / "undisturbed", **settings) == 0
    return settings, folder / "undisturbed"


def run_in_process(run: Path, sends: signal.Signals, **settings: Any) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "marval_rl", *command_line("grpo", run, **settings)],
        env={**os.environ, "SEND_SIGNAL": str(int(sends)), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )


def test_a_killed_process_is_resumed_to_the_same_weights(signalling, tmp_path):
    settings, undisturbed = signalling
    result = run_in_process(tmp_path / "run", signal.SIGKILL, **settings)
    assert result.returncode == -signal.SIGKILL, result.stderr
    assert {path.name for path in (tmp_path / "run").glob("checkpoint-*")} == {"checkpoint-3"}
    assert comparable_lines(tmp_path / "run")[-1]["step"] == 4
    assert run_recipe("grpo", tmp_path / "run", "--resume", **settings) == 0
    assert_same_end(tmp_path / "run", undisturbed, last="checkpoint-9")


def test_an_interrupted_process_keeps_a_checkpoint_and_is_resumed_to_the_same_weights(signalling, tmp_path):
    settings, undisturbed = signalling
    result = run_in_process(tmp_path / "run", signal.SIGINT, **settings)
    assert result.returncode == 130, result.stderr
    assert result.stderr.splitlines() == ["marval-rl: error: interrupted"]
    assert "stopped at step 5: a checkpoint is kept, --resume continues from it" in result.stdout
    assert {path.name for path in (tmp_path / "run").glob("checkpoint-*")} == {"checkpoint-3", "checkpoint-5"}
    assert not (tmp_path / "run" / "final").exists()
    assert run_recipe("grpo", tmp_path / "run", "--resume", **settings) == 0
    assert_same_end(tmp_path / "run", undisturbed, last="checkpoint-9")


def test_checkpoints_are_compared_as_numbers_and_other_folders_passed_over(tmp_path):
    for name in ("checkpoint-old", "checkpoint-", "checkpoint-3", "checkpoint-20"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "manifest.json").write_text('{"files": {}}')
    assert find_checkpoint(tmp_path, "latest").name == "checkpoint-20"


def test_resuming_from_an_older_checkpoint_sets_the_newer_ones_aside(undisturbed, tiny_runs, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(undisturbed["distill"], run)
    models = tiny_runs.models_of("distill")
    older = run / "checkpoint-3"
    assert run_recipe("distill", run, f"--resume={older}", **models, max_steps=4, save_steps=1) == 0
    assert f"{run / 'checkpoint-6'} is newer than {older}: renamed to {run / 'superseded-6'}" in capsys.readouterr().out
    assert find_checkpoint(run, "latest").name == "checkpoint-4"
    assert (run / "superseded-6" / "model.safetensors").is_file()
