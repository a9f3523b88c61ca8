"""`marval-rl bench`: the ratio of two models' speed."""

from __future__ import annotations

import json

import pytest
from tiny_models import tiny_model, tiny_student

from marval_rl.cli.main import main
from marval_rl.models import MARConfig
from marval_rl.recipes import network_arguments as networks

FAST = ["--steps", "2", "--diffusion_steps", "3", "--repeats", "1"]


def test_all_are_timed_and_their_ratios_are_given(tmp_path, capsys):
    tiny_model().save_pretrained(tmp_path / "teacher")
    tiny_student().save_pretrained(tmp_path / "student")
    models = [str(tmp_path / "teacher"), str(tmp_path / "student")]
    options = ["--batch_sizes", "1", "3", "--growth", "--output", str(tmp_path / "bench.json")]
    assert main(["bench", *models, *FAST, *options]) == 0
    figures = json.loads((tmp_path / "bench.json").read_text())
    assert [row["batch_size"] for row in figures["sampling"]] == [1, 3]
    for row in figures["sampling"]:
        assert row["speedup"] == pytest.approx(row["teacher_seconds"] / row["student_seconds"])
        assert row["teacher_over_baseline"] == pytest.approx(row["baseline_seconds"] / row["teacher_seconds"])
        assert row["flops_share"] * row["student_seconds"] * figures["matrix_rate"] == pytest.approx(row["flops"])
        assert row["student_spread"] == 0  # of one run
    one, three = (row["flops"] for row in figures["sampling"])
    assert 2 * one < three < 3 * one  # the timestep is embedded once
    grown = [(row["steps"], row["tokens"], row["batch_size"]) for row in figures["growth"]]
    assert grown == [(1, 4, 1), (2, 4, 1), (4, 4, 1), (2, 16, 1), (2, 4, 2), (2, 4, 4)]
    printed = capsys.readouterr().out
    assert "teacher with 3 guided diffusion steps, float32, latents only, cpu" in printed
    assert "times as the official sampler" in printed and "of the matrix rate" in printed


def test_updates_of_each_trainer_and_throughput(capsys):
    options = ["--batch_sizes", "4", "--no_baseline", "--trainers", "--throughput", "--json"]
    assert main(["bench", "--model_size", "digits", *FAST, *options]) == 0
    figures = json.loads(capsys.readouterr().out)
    rows = {row["trainer"]: row for row in figures["trainers"]}
    assert list(rows) == ["pretrain", "distill", "grpo", "reward_backprop"]
    for name, row in rows.items():
        assert row["batch_size"] == 4 and row["seconds"] > 0
        shares = row["shares"]
        assert sum(shares.values()) == pytest.approx(1)
        assert shares["backward"] > 0 and shares["optimizer"] > 0
        assert (shares["rollout"] > 0 and shares["reward"] > 0) == (name in ("grpo", "reward_backprop"))
    assert [row["what"] for row in figures["throughput"]] == ["measure"]  # digits have no autoencoder


def test_groups_need_an_even_batch(capsys):
    assert main(["bench", "--model_size", "digits", *FAST, "--batch_sizes", "1", "--no_baseline", "--trainers"]) == 2
    assert "--trainers compares images in groups, and a batch of 1 has none" in capsys.readouterr().err


def test_json_alone_is_printed_and_the_baseline_can_be_left_out(capsys):
    assert main(["bench", "--model_size", "digits", *FAST, "--batch_sizes", "1", "--no_baseline", "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert "baseline_seconds" not in figures["sampling"][0] and figures["settings"]["model_size"] == "digits"


def test_a_published_size_needs_no_weights(monkeypatch, capsys):
    def small() -> MARConfig:
        return tiny_model().config

    monkeypatch.setitem(networks.PUBLISHED_SIZES, "base", small)
    assert main(["bench", "--model_size", "base", *FAST, "--batch_sizes", "1", "--dtype", "bfloat16"]) == 0
    assert "bfloat16" in capsys.readouterr().out


@pytest.mark.parametrize("words", [[], ["teacher"], ["teacher", "student", "--model_size", "base"]])
def test_either_two_models_or_a_size(words, capsys):
    assert main(["bench", *words, *FAST]) == 2
    error = capsys.readouterr().err
    assert (
        "give TEACHER and STUDENT, or --model_size digits, mnist, base, large, huge, maskgen_l or maskgen_xl" in error
    )
