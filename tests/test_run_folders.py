"""What the recipes leave behind, and what they would do."""

from __future__ import annotations

import json
import re
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from huggingface_hub import HfApi, ModelCard
from PIL import Image
from safetensors.torch import load_file
from tiny_models import tiny_config
from tiny_recipes import COMMANDS, CONFIGS, RECIPES, command_line, comparable_lines, is_finite, read_lines, run_recipe
from tiny_trainers import assert_equal_states, grey_student, grpo_trainer

from marval_rl.cli.main import main
from marval_rl.models.checkpoints import load_model
from marval_rl.recipes.reading import build_configs, read_settings
from marval_rl.reporting.images import sample_strips
from marval_rl.reporting.run_folder import load_runs
from marval_rl.runtime.model_card import write_model_card


@pytest.fixture(scope="module")
def runs(tiny_runs, tmp_path_factory) -> dict[str, Path]:
    """The run folder of each recipe."""
    folder = tmp_path_factory.mktemp("runs")
    runs = {"teacher": tiny_runs.teacher, "distill": tiny_runs.student}
    for recipe in ("grpo", "reward_backprop"):
        runs[recipe] = folder / recipe
        assert run_recipe(recipe, runs[recipe], **tiny_runs.models_of(recipe)) == 0
    return runs


@pytest.mark.parametrize("recipe", COMMANDS)
def test_a_recipe_leaves_a_complete_run_folder(runs, recipe):
    run = runs[recipe]
    files = {path.relative_to(run).as_posix() for path in run.rglob("*") if path.is_file()}
    assert {"recipe.yaml", "metrics.jsonl", "environment.json", "final/config.json", "final/model.safetensors"} <= files
    assert {path.name for path in run.glob("checkpoint-*")} == {"checkpoint-3", "checkpoint-6"}
    for checkpoint in ("checkpoint-3", "checkpoint-6"):
        for file in ("model.safetensors", "optimizer.pt", "scheduler.pt", "ema.safetensors", "trainer_state.json"):
            assert f"{checkpoint}/{file}" in files
    assert json.loads((run / "environment.json").read_text())["torch"] == metadata.version("torch")
    grids = sorted(path.name for path in (run / "samples").glob("step_*.png"))
    assert grids == ["step_000000.png", "step_000003.png", "step_000006.png"]
    for grid in grids:
        with Image.open(run / "samples" / grid) as picture:
            width, height = picture.size
            assert picture.mode == "RGB"
            assert (width / (2 * 9 - 1), height / (10 * 9 - 1)) == (3, 3)  # 10 classes, 2 images each, 8 pixels
    rows = json.loads((run / "samples" / "rows.json").read_text())
    assert rows == json.loads((run / "final" / "config.json").read_text())["class_names"]


@pytest.mark.parametrize("recipe", COMMANDS)
def test_an_evaluation_leaves_what_the_report_shows(runs, recipe):
    """Of RL the best and the worst images by each reward, of GRPO exploration beside inference, and a row per class."""
    samples = runs[recipe] / "samples"
    grids = {path.name.split("_step_")[0] for path in samples.glob("*_step_*.png")}
    assert grids == {"grpo": {"by_classifier", "exploration"}, "reward_backprop": {"by_classifier"}}.get(recipe, set())
    (run,) = load_runs([runs[recipe]])
    assert set(run.samples) == {"", *grids} and all(len(found) == 3 for found in run.samples.values())
    rows = {strip["title"]: strip["rows"] for strip in sample_strips([run])}
    assert rows == {"": run.row_names} | {
        name.replace("_", " "): ["best", "worst"] if name == "by_classifier" else run.row_names for name in grids
    }
    classes = json.loads((samples / "per_class.json").read_text())
    assert list(classes) == run.row_names == list(run.evaluation["per_class"])
    assert {"held_out_classifier/accuracy", "diversity"} <= set(classes["zero"])


@pytest.mark.parametrize("recipe", COMMANDS)
def test_the_model_card_has_figures_images_and_code_that_runs(runs, recipe, monkeypatch):
    final = runs[recipe] / "final"
    card = ModelCard.load(final / "README.md")
    assert {"marval_rl", "mar", {"teacher": "pretraining", "distill": "distillation"}.get(recipe, "one-step")} <= set(
        card.data.tags
    )
    assert card.data.to_dict()["library_name"] == "transformers"
    assert "| frechet_distance | " in card.text and "frechet_distance/classifier" not in card.text
    assert "Data set: `digits`" in card.text and "torch " in card.text
    pictures = re.findall(r"!\[.*?\]\((.*?)\)", card.text)
    assert len(pictures) == 2 and all((final / name).is_file() for name in pictures)
    written = yaml.safe_load(re.search(r"```yaml\n(.*?)```", card.text, re.DOTALL)[1])
    assert written == yaml.safe_load((runs[recipe] / "recipe.yaml").read_text())
    code = re.search(r"```python\n(.*?)```", card.text, re.DOTALL)[1]
    assert len(code[code.index("model =") :].splitlines()) <= 5
    space: dict[str, Any] = {}
    exec(code, space)
    assert space["images"].shape == (2, 1, 8, 8) and 0 <= space["images"].min() <= space["images"].max() <= 1


def test_a_model_card_keeps_secrets(tmp_path):
    (tmp_path / "final").mkdir()
    secret = {"method": "grpo", "reward_kwargs": {"remote": {"url": "http://x", "token": "hunter2"}}}
    write_model_card(tmp_path, "grpo", secret, tiny_config(), [], 8)
    text = (tmp_path / "final" / "README.md").read_text()
    assert "hunter2" not in text and "url: http://x" in text and "No evaluation was made" in text


def test_a_trainer_in_python_leaves_a_card_and_uploads_its_folder_privately(tmp_path, monkeypatch):
    trainer = grpo_trainer(tmp_path, grey_student(), max_steps=1, learning_rate=3e-5)
    with pytest.raises(FileNotFoundError, match="final does not exist: train to the end before push_to_hub"):
        trainer.push_to_hub("me/student")
    trainer.train()
    card = ModelCard.load(tmp_path / "final" / "README.md")
    assert {"grpo", "one-step"} <= set(card.data.tags) and "training rows, given in Python" in card.text
    written = yaml.safe_load(re.search(r"```yaml\n(.*?)```", card.text, re.DOTALL)[1])
    assert written["max_steps"] == 1 and written["learning_rate"] == 3e-5 and "adam_beta1" not in written
    trainer.create_model_card(model_name="Darkness", dataset_name="me/images", tags="dark")
    card = ModelCard.load(tmp_path / "final" / "README.md")
    assert (
        card.text.lstrip().startswith("# Darkness") and card.data.datasets == ["me/images"] and "dark" in card.data.tags
    )
    calls = []
    for name in ("create_repo", "upload_folder"):
        monkeypatch.setattr(HfApi, name, lambda self, *args, name=name, **kwargs: calls.append((name, args, kwargs)))
    trainer.push_to_hub("me/student")
    assert calls[0] == ("create_repo", ("me/student",), {"private": True, "exist_ok": True})
    assert calls[1][2]["folder_path"] == tmp_path / "final"


def test_exploration_differs_from_the_samples_by_the_noise_of_the_policy_alone(runs):
    samples = runs["grpo"] / "samples"
    usual, explored = (
        np.asarray(Image.open(samples / f"{name}step_000006.png")).astype(int) for name in ("", "exploration_")
    )
    assert usual.shape == explored.shape
    assert 0 < np.abs(usual - explored).mean() < 40  # of 255; images of other noise are at about 60


def test_the_best_images_by_a_reward_have_higher_scores_than_the_worst(tmp_path):
    trainer = grpo_trainer(tmp_path, grey_student(), eval_num_images=24, sample_grid_columns=4)
    trainer.evaluate()
    pixels = np.asarray(Image.open(tmp_path / "samples" / "by_darkness_step_000000.png").convert("L")).astype(float)
    middle = len(pixels) // 2
    assert pixels[: middle - 8].mean() < pixels[middle + 8 :].mean()  # the reward is darkness


@pytest.mark.parametrize("recipe", COMMANDS)
def test_final_is_the_averaged_model(runs, recipe):
    model = load_model(runs[recipe], one_step=recipe != "teacher")
    averaged = load_file(runs[recipe] / "checkpoint-6" / "ema.safetensors")
    assert averaged.pop("num_updates") == {"teacher": 6, "distill": 2, "grpo": 2, "reward_backprop": 2}[recipe]
    assert_equal_states(averaged, model.state_dict())
    assert (runs[recipe] / "final" / "auxiliary.safetensors").exists() == (recipe != "teacher")


TRAINING_NAMES = {
    "teacher": {"loss_mse", "loss_vb"},
    "distill": {"student_loss", "auxiliary_loss", "score_gap"},
    "grpo": {
        *("reward", "reward_std", "rewards/classifier/mean", "rewards/classifier/std", "frac_reward_zero_std", "kl"),
        *("clip_ratio/low_mean", "clip_ratio/high_mean", "clip_ratio/region_mean", "gsim_loss", "auxiliary_loss"),
    },
    "reward_backprop": {
        *("reward", "reward_std", "rewards/classifier/mean", "rewards/classifier/std", "gsim_loss"),
        "auxiliary_loss",
    },
}
EVALUATION_NAMES = {
    *("eval_frechet_distance", "eval_frechet_floor", "eval_diversity"),
    *(f"eval_{judge}/{what}" for judge in ("classifier", "held_out_classifier") for what in ("accuracy", "confidence")),
    *(f"eval_{judge}/log_probability" for judge in ("classifier", "held_out_classifier")),
}


@pytest.mark.parametrize("recipe", COMMANDS)
def test_the_metrics_have_the_promised_names(runs, recipe):
    lines = read_lines(runs[recipe])
    training = [line for line in lines if "loss" in line]
    assert [line["step"] for line in training] == [1, 2, 3, 4, 5, 6]
    for line in training:
        assert {"time", "loss", "learning_rate", "grad_norm"} <= line.keys()
        assert all(map(is_finite, line.values()))
    seen = set().union(*training)
    assert TRAINING_NAMES[recipe] <= seen, TRAINING_NAMES[recipe] - seen

    evaluations = [line for line in lines if "eval_frechet_distance" in line]
    assert [line["step"] for line in evaluations] == [0, 3, 6]
    rewarded = {"eval_rewards/held_out_classifier/mean"} if COMMANDS[recipe] == "train" else set()
    for line in evaluations:
        assert all(is_finite(line[name]) for name in EVALUATION_NAMES | rewarded)
        assert "eval_mode_coverage" not in line  # each class has one mode, and the images are too few for clusters
        assert not line.keys() & TRAINING_NAMES[recipe]
    times = [line["time"] for line in lines]
    assert times == sorted(times) and [line["step"] for line in lines] == sorted(line["step"] for line in lines)


@pytest.mark.parametrize("recipe", COMMANDS)
def test_the_written_recipe_parses_back_to_the_same_settings(runs, tiny_runs, recipe):
    arguments = command_line(recipe, runs[recipe], **tiny_runs.models_of(recipe))
    read = [(RECIPES / f"{recipe}.yaml", arguments[2:]), (runs[recipe] / "recipe.yaml", [])]
    given, written = (build_configs(read_settings(*each, CONFIGS[recipe]), CONFIGS[recipe]) for each in read)
    for one, other in zip(given, written, strict=True):
        assert public(one) == public(other)


def public(config: Any) -> dict[str, Any]:
    """What the user sets, without the handle to the machine that transformers keeps beside it."""
    return {name: value for name, value in vars(config).items() if name[0] != "_" and name != "distributed_state"}


def test_parity_measures_mode_coverage_and_the_same_recipe_twice_gives_the_same_metrics(tmp_path):
    settings = {"class_groups": "parity", "max_steps": 2, "eval_steps": 2, "eval_num_images": 12}
    assert run_recipe("teacher", tmp_path / "a", **settings) == 0
    torch.manual_seed(99)  # whatever ran before in this process must not matter
    assert main(["pretrain", str(tmp_path / "a" / "recipe.yaml"), "--output_dir", str(tmp_path / "b")]) == 0
    lines = comparable_lines(tmp_path / "a")
    assert lines == comparable_lines(tmp_path / "b")
    coverage = [line["eval_mode_coverage"] for line in lines if "eval_mode_coverage" in line]
    assert len(coverage) == 2 and all(0 <= value <= 1.5 for value in coverage)


@pytest.mark.parametrize("recipe", COMMANDS)
def test_a_dry_run_prints_the_plan_and_writes_nothing(tiny_runs, tmp_path, capsys, recipe):
    assert run_recipe(recipe, tmp_path / "run", "--dry_run", **tiny_runs.models_of(recipe)) == 0
    assert not (tmp_path / "run").exists()
    output = capsys.readouterr().out
    settings = yaml.safe_load(output[: output.index("\n\n")])
    assert settings["max_steps"] == 6 and settings["dataset"] == "digits"
    assert "images per update: 16 = per_device_train_batch_size 16 x gradient_accumulation_steps 1" in output
    assert "parameters: " in output and "MiB" in output
    assert ("8 groups of 4" in output) == (recipe == "grpo")
