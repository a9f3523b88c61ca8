"""Progress without a terminal: a plain line every so often, and none where it is switched off."""

from __future__ import annotations

import re
import sys
from types import SimpleNamespace

import pytest
from transformers.trainer_callback import TrainerControl, TrainerState

from marval_rl.runtime import callbacks
from marval_rl.runtime.callbacks import PLAIN_SECONDS, RunProgressCallback


def run(monkeypatch, seconds_a_step: float, cycle: int = 1, first_step: int = 0, is_first: bool = True, **settings):
    """A run of 100 steps, as its callback sees it."""
    clock = [1000.0]
    monkeypatch.setattr(callbacks.time, "monotonic", lambda: clock[0])
    args = SimpleNamespace(
        output_dir="runs/demo/grpo",
        per_device_train_batch_size=60,
        gradient_accumulation_steps=2,
        world_size=1,
        disable_tqdm=settings.get("disable_tqdm", False),
        starts_cycle=lambda step: step % cycle == 0,
    )
    state = TrainerState(global_step=first_step, max_steps=100, is_world_process_zero=is_first)
    callback, control = RunProgressCallback(), TrainerControl()
    callback.on_train_begin(args, state, control)
    for step in range(first_step + 1, 101):
        clock[0] += seconds_a_step
        state.global_step = step
        callback.on_log(args, state, control, {"reward": step / 100, "kl": None, "loss": 0.0})
        callback.on_step_end(args, state, control)
    callback.on_train_end(args, state, control)


def test_a_line_has_step_figures_speed_and_time_left(monkeypatch, capsys):
    run(monkeypatch, seconds_a_step=6)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 100 * 6 / PLAIN_SECONDS
    assert lines[0] == "runs/demo/grpo: step 5 of 100, loss 0, reward 0.05, 20 images/s, 9 min 30 s left"
    assert lines[-1].endswith("0 min 00 s left")


def test_only_steps_that_read_images_count_and_a_resumed_run_times_its_own_steps(monkeypatch, capsys):
    run(monkeypatch, seconds_a_step=10, cycle=4, first_step=40)
    first = capsys.readouterr().err.splitlines()[0]
    assert re.search(r"step 43 of 100, .* 4 images/s, 9 min 30 s left", first)


@pytest.mark.parametrize("quiet", [{"disable_tqdm": True}, {"is_first": False}])
def test_no_progress_is_printed_when_disabled_or_by_other_processes(monkeypatch, capsys, quiet):
    run(monkeypatch, seconds_a_step=60, **quiet)
    assert capsys.readouterr().err == ""


def test_a_terminal_has_a_bar_and_no_lines(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    run(monkeypatch, seconds_a_step=60)
    shown = capsys.readouterr().err
    assert "left" not in shown and "100/100" in shown
