"""Trackers get the figures and the sample grids of a run, on this machine."""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers.integrations import integration_utils

SETTINGS = {"eval_strategy": "steps", "eval_on_start": True, "max_steps": 2, "eval_steps": 2, "eval_num_images": 8}
GRIDS = ("samples", "samples/by_classifier", "samples/exploration")  # fixed seeds; best and worst; a rollout


def test_tensorboard_shows_the_grids_of_every_evaluation(train, tmp_path):
    assert train(report_to="tensorboard", **SETTINGS) == 0
    (events,) = (tmp_path / "run" / "runs").glob("*/events.out.tfevents.*")
    found = EventAccumulator(str(events), size_guidance={"images": 0}).Reload()
    steps = {name: [image.step for image in found.Images(name)] for name in found.Tags()["images"]}
    assert steps == {name: [0, 2] for name in GRIDS} and found.Images("samples")[0].height > 100
    assert {"train/reward", "eval/frechet_distance"} <= set(found.Tags()["scalars"])


@pytest.fixture
def stand_in(monkeypatch) -> SimpleNamespace:
    """In place of the package trackio, which does not go with the Pillow of the tests: keeps what is logged."""
    kept = SimpleNamespace(opened=[], logged=[])
    module = ModuleType("trackio")
    module.__spec__ = ModuleSpec("trackio", None)
    module.init, module.log = lambda **options: kept.opened.append(options), kept.logged.append
    module.finish, module.config, module.Image = lambda: None, {}, lambda file: file
    module.context_vars = SimpleNamespace(current_space_id=SimpleNamespace(get=lambda: None))
    monkeypatch.setitem(sys.modules, "trackio", module)
    monkeypatch.setattr(integration_utils, "is_trackio_available", lambda: True)
    return kept


def test_trackio_shows_them_too_and_stays_on_this_machine(train, stand_in):
    assert train(report_to="trackio", **SETTINGS) == 0
    assert stand_in.opened[0]["space_id"] is None and stand_in.opened[0]["bucket_id"] is None
    for name in GRIDS:
        found = [line for line in stand_in.logged if name in line]
        assert [line["train/global_step"] for line in found] == [0, 2]
        assert all(Path(line[name]).is_file() for line in found)
