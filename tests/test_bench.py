"""`marval-rl bench`: the ratio of two models' speed."""

from __future__ import annotations

import json

import pytest
from tiny_models import tiny_model, tiny_student

from marval_rl.cli.main import main
from marval_rl.models import MARConfig
from marval_rl.recipes import network_arguments as networks

FAST = ["--steps", "2", "--diffusion_steps", "3", "--repeats", "1"]


def test_teacher_and_student_are_timed_and_their_ratio_is_given(tmp_path, capsys):
    tiny_model().save_pretrained(tmp_path / "teacher")
    tiny_student().save_pretrained(tmp_path / "student")
    models = [str(tmp_path / "teacher"), str(tmp_path / "student")]
    assert main(["bench", *models, *FAST, "--batch_sizes", "1", "3", "--output", str(tmp_path / "bench.json")]) == 0
    rows = json.loads((tmp_path / "bench.json").read_text())
    assert [row["batch_size"] for row in rows] == [1, 3]
    for row in rows:
        assert row["speedup"] == pytest.approx(row["teacher_seconds"] / row["student_seconds"])
    assert "teacher with 3 guided diffusion steps, float32, latents only, cpu" in capsys.readouterr().out


def test_a_published_size_needs_no_weights(monkeypatch, capsys):
    def small() -> MARConfig:
        return tiny_model().config

    monkeypatch.setitem(networks.PUBLISHED_SIZES, "base", small)
    assert main(["bench", "--model_size", "base", *FAST, "--batch_sizes", "1", "--dtype", "bfloat16"]) == 0
    assert "bfloat16" in capsys.readouterr().out


@pytest.mark.parametrize("words", [[], ["teacher"], ["teacher", "student", "--model_size", "base"]])
def test_either_two_models_or_a_size(words, capsys):
    assert main(["bench", *words, *FAST]) == 2
    assert "give TEACHER and STUDENT, or --model_size base, large or huge" in capsys.readouterr().err
