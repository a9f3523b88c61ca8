"""The recipes for the digits at a size that runs in a second, through the command line, for tests."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from marval_rl.cli.main import main
from marval_rl.recipes.data_arguments import DataArguments
from marval_rl.recipes.network_arguments import LoraArguments, ModelArguments, RewardArguments, TeacherArguments
from marval_rl.runtime.settings import defaults_of, unmet_needs
from marval_rl.trainers.distill import DistillConfig
from marval_rl.trainers.grpo import MARGRPOConfig
from marval_rl.trainers.pretrain import PretrainConfig
from marval_rl.trainers.reward_backprop import RewardBackpropConfig

RECIPES = Path(__file__).parents[1] / "recipes" / "digits"
COMMANDS = {"teacher": "pretrain", "distill": "distill", "grpo": "train", "reward_backprop": "train"}  # by recipe

CONFIGS = {
    "teacher": (DataArguments, ModelArguments, PretrainConfig),
    "distill": (DataArguments, TeacherArguments, DistillConfig),
    "grpo": (DataArguments, RewardArguments, TeacherArguments, LoraArguments, MARGRPOConfig),
    "reward_backprop": (DataArguments, RewardArguments, TeacherArguments, LoraArguments, RewardBackpropConfig),
}

# Whatever the tests count on is set here, so that the recipes can be tuned without them.
TINY = {
    "dataset": "digits",
    "class_groups": "null",
    "max_steps": 6,
    "per_device_train_batch_size": 16,
    "logging_steps": 1,
    "save_steps": 3,
    "eval_steps": 3,
    "eval_num_images": 20,
    "eval_unmasking_steps": 2,
    "warmup_steps": 0,
    "lr_scheduler_type": "warmup_stable_decay",  # falling in the end: a resumed run must find its place in it
    "lr_scheduler_kwargs": json.dumps({"num_decay_steps": 3}),
}
TINY_REWARDED = {
    **TINY,
    "reward_funcs": ["classifier"],
    "eval_reward_funcs": ["held_out_classifier"],
    "num_unmasking_steps": 2,
    "gsim_weight": 1.0,
    "gsim_batch_size": 16,
    "distribution_weight": 10.0,
    "distribution_queue": 40,
    "auxiliary_warmup_steps": 1,
    "auxiliary_updates": 2,
}
TINY_RECIPES: dict[str, dict[str, Any]] = {
    "teacher": {
        **TINY,
        "warmup_steps": 1,
        "hidden_size": 32,
        "encoder_num_layers": 1,
        "decoder_num_layers": 1,
        "num_heads": 2,
        "head_hidden_size": 32,
        "head_num_layers": 1,
        "dropout": 0.1,
        "eval_diffusion_steps": 4,
    },
    "distill": {**TINY, "auxiliary_warmup_steps": 2, "auxiliary_updates": 2},
    "grpo": {
        **TINY_REWARDED,
        "num_generations": 4,
        "steps_per_generation": 2,  # each step uses half of a rollout: the other half must survive a checkpoint
        "beta": 0.1,
    },
    "reward_backprop": TINY_REWARDED,
}


def run_recipe(recipe: str, output_dir: Path, *flags: str, path: Path | None = None, **settings: Any) -> int:
    """Runs one of the recipes for the digits, made tiny, and returns the exit code.

    recipe    its name; path replaces its file, with the command and the tiny settings of that name
    flags     such as "--resume"
    settings  win over the tiny ones; None leaves a setting as the recipe has it
    """
    return main(command_line(recipe, output_dir, *flags, path=path, **settings))


def command_line(recipe: str, output_dir: Path, *flags: str, path: Path | None = None, **settings: Any) -> list[str]:
    """The arguments that `run_recipe` hands to the command line, without tiny settings that others switch off."""
    merged = {**TINY_RECIPES[recipe], "output_dir": output_dir, **settings}
    given = {name: value for name, value in merged.items() if value is not None}
    unmet = unmet_needs(CONFIGS[recipe], {**defaults_of(CONFIGS[recipe]), **given})
    merged = {name: value for name, value in merged.items() if name in settings or name not in unmet}
    words = [COMMANDS[recipe], str(path or RECIPES / f"{recipe}.yaml")]
    for key, value in merged.items():
        if value is not None:
            words += [f"--{key}", *(map(str, value) if isinstance(value, list) else [str(value)])]
    return [*words, *flags]


def read_lines(run: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl, which must be JSON in the strict sense: finite numbers only."""
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line, parse_constant=_refuse) for line in lines]


def _refuse(constant: str) -> float:
    raise ValueError(f"{constant} in metrics.jsonl")


def comparable_lines(run: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl without what the clock decides."""
    return [{name: value for name, value in line.items() if not _is_timing(name)} for line in read_lines(run)]


def _is_timing(name: str) -> bool:
    return name == "time" or name.endswith(("_runtime", "_per_second"))


def training_lines(run: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl that training steps wrote."""
    return [line for line in read_lines(run) if "loss" in line]


def is_finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)
