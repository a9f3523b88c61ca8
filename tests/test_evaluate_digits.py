"""`marval-rl evaluate` of a model of digits."""

from __future__ import annotations

import json

import pytest
from tiny_models import tiny_student

from marval_rl.cli.main import main
from marval_rl.data import load_image_dataset


@pytest.mark.parametrize("class_groups", [None, "parity"])
def test_digits_are_compared_with_the_real_ones(tmp_path, capsys, class_groups):
    names = load_image_dataset("digits", "test", class_groups).class_names
    tiny_student(image_size=8, num_classes=len(names), class_names=names).save_pretrained(tmp_path / "final")
    words = ["evaluate", tmp_path / "final", "--device", "cpu", "--steps", 2, "--num_images", 30, "--redraws", 2]
    assert main([str(word) for word in words]) == 0
    results = json.loads((tmp_path / "evaluation.json").read_text())
    out = capsys.readouterr().out
    assert results["frechet_distance"] > results["frechet_floor"] > 0
    assert results["std"]["frechet_distance"] > 0
    assert 0 <= results["held_out_classifier/accuracy"] <= 1
    assert (results["mode_coverage"] is None) == (class_groups is None)
    assert results["images_per_second"] > 0
    assert (results["settings"]["class_groups"], results["settings"]["dataset"]) == (class_groups, "digits")
    assert "frechet_distance" in out and "+-" in out and str(tmp_path / "evaluation.json") in out
