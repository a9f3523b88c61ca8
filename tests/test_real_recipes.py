"""The recipes of real size, run at a tiny one: official files -> convert -> cache -> distill -> RL -> sample.

Everything but the size is as in docs/reproduce.md; weights, VAE, images and rewards are made here, in the real formats.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from official_files import official_config, vae_weights, write_mar, write_vae
from PIL import Image
from safetensors.torch import load_file
from tiny_images import noise_image
from tiny_recipes import CONFIGS, is_finite, read_lines, training_lines
from tiny_rewards import image_reward_arguments, write_clip, write_image_reward, write_pick_score
from tiny_trainers import power_cut_in_step

from marval_rl.cli.main import main
from marval_rl.data.class_names import IMAGENET_WNIDS
from marval_rl.models import MARConfig
from marval_rl.models.checkpoints import load_config
from marval_rl.runtime.settings import defaults_of, unmet_needs

RECIPES = Path(__file__).parents[1] / "recipes"
WNIDS = IMAGENET_WNIDS[:3]
NAMES = ["tench", "goldfish", "great white shark"]
IMAGES = 24
KINDS = {
    "grpo_clip.yaml": "grpo",
    "grpo_imagereward.yaml": "grpo",
    "backprop_pickscore.yaml": "reward_backprop",
}
TINY = {
    "use_cpu": True,  # the recipes ask for bf16 on a GPU
    "model_size": "null",
    "image_size": "null",
    "max_steps": 4,
    "per_device_train_batch_size": 4,
    "warmup_steps": 1,
    "auxiliary_warmup_steps": 0,
    "auxiliary_updates": 2,
    "logging_steps": 1,
    "save_steps": 2,
    "eval_steps": 4,
    "eval_num_images": 3,
    "eval_unmasking_steps": 2,
    "dataloader_num_workers": 1,
    "learning_rate": 1e-4,
}


@dataclass
class Files:
    """What someone with the official weights and ImageNet has on the disk."""

    teacher: Path
    vae: Path
    images: Path
    cache: Path
    rewards: Path

    @property
    def settings(self) -> dict[str, Any]:
        return {**TINY, "vae": self.vae, "dataset": self.images, "cache_dir": self.cache}


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Files:
    folder = tmp_path_factory.mktemp("imagenet")
    config = official_config(image_size=32, latent_stride=4, patch_size=2)
    write_vae(folder / "kl16.ckpt", vae_weights())
    write_mar(folder / "checkpoint-last.pth", config)
    found = Files(*(folder / name for name in ("mar", "kl16", "images", "moments", "rewards")))
    assert main(["convert", str(folder / "kl16.ckpt"), str(found.vae)]) == 0
    assert main(["convert", str(folder / "checkpoint-last.pth"), str(found.teacher), "--vae", str(found.vae)]) == 0
    for number in range(IMAGES):
        path = found.images / "train" / WNIDS[number % 3] / f"{WNIDS[number % 3]}_{number}.JPEG"
        path.parent.mkdir(parents=True, exist_ok=True)
        noise_image(number, 50, 40).save(path)
    for number in range(60):  # held out
        path = found.images / "val" / WNIDS[number % 3] / f"{number}.JPEG"
        path.parent.mkdir(parents=True, exist_ok=True)
        noise_image(1000 + number, 50, 40).save(path)
    assert main(command("cache", "huge.yaml", **found.settings, teacher=found.teacher)) == 0
    write_clip(found.rewards / "clip")
    write_pick_score(found.rewards / "pick_score")
    write_image_reward(found.rewards / "image_reward")
    return found


def command(name: str, recipe: str, *flags: str, **settings: Any) -> list[str]:
    """The arguments of a command, without tiny settings that others switch off."""
    kinds = CONFIGS[KINDS.get(recipe, "distill")]
    written = yaml.safe_load((RECIPES / recipe).read_text()) | settings
    unmet = unmet_needs(kinds, defaults_of(kinds) | written)
    settings = {key: value for key, value in settings.items() if key not in unmet}
    words = [name, str(RECIPES / recipe), *flags]
    for key, value in settings.items():
        words += [f"--{key}", json.dumps(value) if isinstance(value, dict) else str(value)]
    return words


@pytest.fixture(scope="module")
def student(files, tmp_path_factory) -> Path:
    """Distilled by recipes/huge.yaml from the cache."""
    run = tmp_path_factory.mktemp("runs") / "huge"
    assert main(command("distill", "huge.yaml", **files.settings, teacher=files.teacher, output_dir=run)) == 0
    return run


def reward_settings(files: Files) -> dict[str, Any]:
    """The rewards' weights at a tiny size, for all three rewards."""
    pick_score = str(files.rewards / "pick_score")
    kwargs = {
        "clip": {"model": f"local-dir:{files.rewards / 'clip'}"},
        "pick_score": {"model": pick_score, "processor": pick_score},
        "image_reward": image_reward_arguments(files.rewards / "image_reward" / "ImageReward.pt"),
    }
    return kwargs


REWARDS = {
    "grpo_clip.yaml": ("clip", "pick_score"),
    "grpo_imagereward.yaml": ("image_reward", "pick_score"),
    "backprop_pickscore.yaml": ("pick_score", "clip"),
}


def assert_trained(run: Path, steps: int = 4) -> None:
    lines = training_lines(run)
    assert [line["step"] for line in lines] == list(range(1, steps + 1))
    assert all(is_finite(line["loss"]) and is_finite(line["grad_norm"]) for line in lines)


def test_the_student_knows_its_vae_and_the_names_of_its_classes(files, student):
    config = load_config(student)
    assert config.is_one_step and config.vae == str(files.vae) and config.class_names == NAMES
    assert_trained(student)


@pytest.mark.parametrize("recipe", ["base.yaml", "large.yaml"])
def test_the_other_sizes_distil_too(files, tmp_path, recipe):
    settings = {**files.settings, "teacher": files.teacher, "output_dir": tmp_path}
    assert main(command("distill", recipe, **settings)) == 0
    assert_trained(tmp_path)


def test_without_a_cache_the_images_are_read_and_encoded(files, tmp_path):
    settings = {**files.settings, "cache_dir": "null", "teacher": files.teacher, "output_dir": tmp_path}
    assert main(command("distill", "base.yaml", **settings)) == 0
    assert_trained(tmp_path)


def test_epochs_are_a_length_of_training(files, tmp_path):
    # 24 images in batches of 4: 6 student updates an epoch, each followed by one of the auxiliary network alone.
    settings = {**files.settings, "max_steps": -1, "num_train_epochs": 2, "eval_strategy": "no", "save_steps": 100}
    settings |= {"teacher": files.teacher, "output_dir": tmp_path}
    assert main(command("distill", "base.yaml", **settings)) == 0
    assert_trained(tmp_path, steps=24)
    assert training_lines(tmp_path)[-1]["epoch"] == 2
    # A finished run that is resumed writes final/ again, and takes no further step.
    assert main(command("distill", "base.yaml", "--resume", **settings)) == 0
    assert_trained(tmp_path, steps=24)


def test_a_run_on_flipped_moments_resumes_as_if_undisturbed(files, tmp_path):
    settings = {**files.settings, "teacher": files.teacher, "max_steps": 14, "eval_strategy": "no", "save_steps": 5}
    runs = [tmp_path / name for name in ("whole", "broken")]
    assert main(command("distill", "base.yaml", **settings, output_dir=runs[0])) == 0
    with power_cut_in_step(13):  # in the second epoch, whose flips are others than the first one's
        assert main(command("distill", "base.yaml", **settings, output_dir=runs[1])) == 1
    assert main(command("distill", "base.yaml", "--resume", **settings, output_dir=runs[1])) == 0
    whole, broken = (load_file(run / "final" / "model.safetensors") for run in runs)
    assert all(torch.equal(whole[name], broken[name]) for name in whole)


@pytest.mark.parametrize("recipe", REWARDS)
def test_the_rl_recipes_run_on_that_student(files, student, tmp_path, recipe):
    trained, judge = REWARDS[recipe]
    kwargs = reward_settings(files)
    settings = {
        **files.settings,
        "model": student,
        "output_dir": tmp_path,
        "num_unmasking_steps": 2,
        "reward_kwargs": {trained: kwargs[trained]},
        "eval_reward_kwargs": {judge: kwargs[judge]},
        "eval_features": f"[clip:local-dir:{files.rewards / 'clip'}, pixels]",
        "eval_num_images": 30,
    }
    settings["distribution_features"] = "pixels"
    if recipe.startswith("grpo"):
        settings |= {"num_generations": 2, "gradient_accumulation_steps": 2}
    assert main(command("train", recipe, "--dry_run", **settings)) == 0
    assert main(command("train", recipe, **settings)) == 0
    assert_trained(tmp_path)
    assert any(f"rewards/{trained}/mean" in line for line in training_lines(tmp_path))
    measured = [line for line in read_lines(tmp_path) if "eval_frechet_distance" in line]
    assert [line["step"] for line in measured] == [0, 4]
    figures = ("frechet_distance", "frechet_floor", "kid", "precision", "recall", "mode_coverage")
    for name in (*(f"{figure}/{space}" for figure in figures for space in ("clip", "pixels")), "diversity", *figures):
        assert all(is_finite(line[f"eval_{name}"]) for line in measured), name
    assert all(is_finite(line["eval_image/sharpness/vs_real"]) for line in measured)
    before, after = load_file(student / "final" / "model.safetensors"), load_file(tmp_path / "final/model.safetensors")
    assert any(not torch.equal(before[name], after[name]) for name in before)


def test_samples_are_images_of_the_vae(files, student, tmp_path):
    picture = tmp_path / "grid.png"
    words = ["sample", str(student), "--classes", "goldfish,2", "--per_class", "2", "--steps", "4", "--output"]
    assert main([*words, str(picture)]) == 0
    size = 2 * (2 * 32 + 1)  # small ones are enlarged twice
    assert Image.open(picture).height == size and Image.open(picture).width > size  # names stand beside the rows


def test_a_teacher_of_another_size_is_refused(files, tmp_path, capsys):
    settings = {**files.settings, "teacher": files.teacher, "output_dir": tmp_path / "run", "model_size": "huge"}
    assert main(command("distill", "huge.yaml", **settings)) == 2
    assert "is not of model_size huge" in capsys.readouterr().err
    assert MARConfig.huge().encoder_hidden_size == 1280


def test_a_corrupt_image_in_a_data_worker_is_one_line(files, tmp_path, capsys):
    for number in range(8):
        folder = tmp_path / "images" / WNIDS[number % 3]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{number}.JPEG").write_bytes(b"no image")
    noise_image(0, 50, 40).save(tmp_path / "images" / WNIDS[0] / "0.JPEG")  # read by the command itself, as the first
    settings = {**files.settings, "cache_dir": "null", "dataset": tmp_path / "images"}
    settings |= {"teacher": files.teacher, "output_dir": tmp_path / "run"}
    assert main(command("distill", "base.yaml", **settings)) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "Traceback" not in line and ".JPEG" in line and "marval-rl cache" in line


@pytest.mark.parametrize(
    ("limit", "broken"), [("max_frechet_ratio", "frechet_distance"), ("min_diversity", "diversity")]
)
def test_a_limit_stops_a_run_that_nothing_holds_back(files, student, tmp_path, capsys, limit, broken):
    """A reward that any image can have more of, no anchor, and steps that are much too large."""
    settings = {
        **files.settings,
        "model": student,
        "output_dir": tmp_path,
        "reward_funcs": "jpeg",
        "reward_kwargs": "null",
        "eval_reward_funcs": "[]",
        "eval_reward_kwargs": "null",
        "eval_features": "pixels",
        "eval_num_images": 30,
        "num_unmasking_steps": 2,
        "num_generations": 8,
        "per_device_train_batch_size": 24,
        "gradient_accumulation_steps": 1,
        "learning_rate": 1e-2,
        "policy_std": 0.5,
        "ema_decay": 0.5,
        "beta": 0,
        "distribution_weight": 0,
        "max_steps": 40,
        "eval_steps": 2,
        "max_frechet_ratio": "null",
        "min_diversity": "null",
        "min_recall": "null",
        "min_mode_coverage": "null",
        limit: {"max_frechet_ratio": 1.05, "min_diversity": 0.9}[limit],
    }
    assert main(command("train", "grpo_clip.yaml", **settings)) == 0
    assert f"eval_{broken} is" in capsys.readouterr().out
    lines = read_lines(tmp_path)
    first, *_, last = [line for line in lines if "eval_frechet_distance" in line]
    assert last["step"] < 40
    for name in ("frechet_distance", "kid", "recall", "mode_coverage", "diversity", "image/edge_energy/vs_real"):
        assert is_finite(first[f"eval_{name}"]) and is_finite(last[f"eval_{name}"])
