"""Trackers get the figures and the sample grids of a run, on this machine."""

from __future__ import annotations

import trackio
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

SETTINGS = {"eval_strategy": "steps", "eval_on_start": True, "max_steps": 2, "eval_steps": 2, "eval_num_images": 8}
GRIDS = ("samples", "samples/by_classifier", "samples/exploration")  # fixed seeds; best and worst; a rollout


def test_tensorboard_shows_the_grids_of_every_evaluation(train, tmp_path):
    assert train(report_to="tensorboard", **SETTINGS) == 0
    (events,) = (tmp_path / "run" / "runs").glob("*/events.out.tfevents.*")
    found = EventAccumulator(str(events), size_guidance={"images": 0}).Reload()
    steps = {name: [image.step for image in found.Images(name)] for name in found.Tags()["images"]}
    assert steps == {name: [0, 2] for name in GRIDS} and found.Images("samples")[0].height > 100
    assert {"train/reward", "eval/frechet_distance"} <= set(found.Tags()["scalars"])


def test_trackio_shows_them_too_and_stays_on_this_machine(train, monkeypatch):
    logged, opened = [], []
    monkeypatch.setattr(trackio, "init", lambda **options: opened.append(options))
    monkeypatch.setattr(trackio, "log", logged.append)
    monkeypatch.setattr(trackio, "finish", lambda: None)
    monkeypatch.setattr(trackio, "config", {}, raising=False)
    assert train(report_to="trackio", **SETTINGS) == 0
    assert opened[0]["space_id"] is None and opened[0]["bucket_id"] is None
    for name in GRIDS:
        assert [line["train/global_step"] for line in logged if name in line] == [0, 2]
