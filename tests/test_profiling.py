"""--profile: the shares of a run's time, and the trace."""

from __future__ import annotations

import json

import pytest
from tiny_models import tiny_student
from tiny_trainers import backprop_trainer, grpo_trainer

from marval_rl.runtime.profiling import LABEL, shares


def test_phases_within_others_count_once():
    events = {LABEL + "rollout": 1.0, LABEL + "reward": 0.5, "gloo:all_reduce": 0.25, "aten::mm": 3.0}
    events |= {LABEL + "loss": 3.5, LABEL + "training step": 5.5, LABEL + "optimizer": 1.0}
    events["enumerate(DataLoader)#_SingleProcessDataLoaderIter.__next__"] = 0.5
    found = {name: 8 * share for name, share in shares(events, seconds=8.0).items()}
    assert found == {
        **{"rollout": 1.0, "reward": 0.5, "forward": 2.0, "backward": 2.0, "optimizer": 1.0},
        **{"evaluation": 0.0, "data": 0.5, "other": 1.0, "communication": 0.25},
    }


@pytest.mark.parametrize("make", [grpo_trainer, backprop_trainer])
def test_steps_after_the_first_are_traced(make, tmp_path, capsys):
    evaluated = {"eval_strategy": "steps", "eval_steps": 2, "eval_num_images": 3, "eval_batch_size": 3}
    make(tmp_path, tiny_student(), max_steps=5, profile=2, **evaluated).train()
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("profile: "))
    assert line.startswith("profile: 2 steps took ") and str(tmp_path / "trace.json") in line
    events = [event.get("name") for event in json.loads((tmp_path / "trace.json").read_text())["traceEvents"]]
    asked = 4 if make is grpo_trainer else 2  # GRPO begins with each micro-batch, and then waits for the scores
    assert (events.count(LABEL + "rollout"), events.count(LABEL + "reward")) == (2, asked)
    assert events.count(LABEL + "evaluation") == 1
    assert events.count(LABEL + "loss") == events.count(LABEL + "optimizer") == 2


def test_without_it_nothing_is_traced(tmp_path, capsys):
    grpo_trainer(tmp_path, tiny_student(), max_steps=1).train()
    assert "profile" not in capsys.readouterr().out and not (tmp_path / "trace.json").exists()


def test_a_negative_number_of_steps_is_refused(tmp_path):
    with pytest.raises(ValueError, match="profile must not be negative, but is -1"):
        grpo_trainer(tmp_path, tiny_student(), profile=-1)
