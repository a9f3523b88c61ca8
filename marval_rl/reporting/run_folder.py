"""A run folder on disk, read into one object."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import yaml
from PIL import Image

from marval_rl.reporting.metrics import metric_keys, read_metrics, series
from marval_rl.text import load_yaml, read_text, yaml_problem

METRICS_FILE, RECIPE_FILE, EVALUATION_FILE = "metrics.jsonl", "recipe.yaml", "evaluation.json"
KIND_NAMES = {
    "grpo": "GRPO",
    "reward_backprop": "Reward back-propagation",
    "distill": "Distillation",
    "pretrain": "Pretraining",
}


@dataclass(frozen=True)
class Run:
    """What a run left behind. `samples` are (step, file) pairs in order of step; `torn_samples` could not be read."""

    name: str
    path: Path
    lines: list[dict] = field(default_factory=list)
    recipe: dict = field(default_factory=dict)
    evaluation: dict = field(default_factory=dict)
    samples: list[tuple[int, Path]] = field(default_factory=list)
    torn_samples: list[str] = field(default_factory=list)
    finished: bool = False

    @cached_property
    def keys(self) -> list[str]:
        """Every key of metrics.jsonl that holds a number somewhere."""
        return metric_keys(self.lines)

    @property
    def kind(self) -> str:
        """The recipe's `method` ("grpo", "reward_backprop"), or what the metrics tell: "distill", "pretrain" or ""."""
        if self.recipe.get("method"):
            return str(self.recipe["method"])
        if "auxiliary_loss" in self.keys and "reward" not in self.keys:
            return "distill"
        return "pretrain" if "loss" in self.keys and "reward" not in self.keys else ""

    @property
    def last_step(self) -> int:
        return max((line["step"] for line in self.lines), default=0)

    @property
    def seconds(self) -> float:
        """Seconds from the start of the run to its last line."""
        return max(self.series("time")[1].tolist(), default=0.0)

    @property
    def reward_names(self) -> set[str]:
        """Names of the rewards that the run was trained on."""
        return {match[1] for key in self.keys if (match := re.fullmatch(r"rewards/(.+)/mean", key))}

    def series(self, key: str) -> tuple[np.ndarray, np.ndarray]:
        """Steps [N] and values [N] of one metric."""
        return series(self.lines, key)


def load_runs(folders: list[Path]) -> list[Run]:
    """Read run folders, under names that tell them apart (the shortest unique ends of their paths).

    Raises ValueError for an empty list, a folder given twice, a folder that is no run, and files that cannot be read.
    """
    if not folders:
        raise ValueError("no run folder was given: name at least one, such as runs/grpo")
    resolved = [Path(folder).resolve() for folder in folders]
    for folder in resolved:
        if resolved.count(folder) > 1:
            raise ValueError(f"the run folder {folder} was given twice: name each once")
    depth = 1
    while len({folder.parts[-depth:] for folder in resolved}) < len(resolved):
        depth += 1
    names = ["/".join(folder.parts[-depth:]) for folder in resolved]
    return [_load_run(Path(folder), name) for folder, name in zip(folders, names, strict=True)]


def _load_run(folder: Path, name: str) -> Run:
    if not folder.is_dir():
        raise ValueError(f"{folder} is no run: there is no such folder")
    if not (folder / METRICS_FILE).is_file() and not (folder / RECIPE_FILE).is_file():
        inside = sorted(str(path.parent) for path in folder.glob(f"*/{METRICS_FILE}"))
        hint = f"; did you mean {', '.join(inside[:5])}?" if inside else ""
        raise ValueError(f"{folder} is no run: it holds neither {METRICS_FILE} nor {RECIPE_FILE}{hint}")
    recipe = _read_recipe(folder / RECIPE_FILE)
    samples, torn = _find_samples(folder / "samples")
    return Run(
        name=name,
        path=folder,
        lines=read_metrics(folder / METRICS_FILE) if (folder / METRICS_FILE).is_file() else [],
        recipe=recipe,
        evaluation=_read_evaluation(folder / EVALUATION_FILE),
        samples=samples,
        torn_samples=torn,
        finished=(folder / "final").is_dir(),
    )


def _read_recipe(path: Path) -> dict:
    if not path.is_file():
        return {}
    try:
        recipe = load_yaml(read_text(path))
    except UnicodeError as error:
        raise ValueError(f"cannot read {path}: {error}") from error
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is no YAML: {yaml_problem(error)}") from error
    if not isinstance(recipe, dict):
        raise ValueError(f"{path} must be a mapping of names to values, but holds {type(recipe).__name__}")
    return recipe


def _read_evaluation(path: Path) -> dict:
    if not path.is_file():
        return {}
    try:
        evaluation = json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is no JSON ({error}): evaluate the model again") from error
    if not isinstance(evaluation, dict):
        raise ValueError(f"{path} must hold a JSON object, but holds {type(evaluation).__name__}: evaluate again")
    return evaluation


def _find_samples(folder: Path) -> tuple[list[tuple[int, Path]], list[str]]:
    """Readable grids in order of step, and the names of those that a killed process left half written."""
    good, torn = [], []
    for path in folder.glob("step_*.png"):
        if not (match := re.fullmatch(r"step_(\d+)", path.stem)):
            continue
        try:
            with Image.open(path) as image:
                image.verify()
        except (OSError, SyntaxError):  # what Pillow raises for truncated and for broken PNG files
            torn.append(path.name)
        else:
            good.append((int(match[1]), path))
    return sorted(good), sorted(torn)
