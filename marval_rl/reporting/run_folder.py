"""A run folder on disk, read into one object.

What is read, each where it is there: metrics.jsonl, recipe.yaml, evaluation.json (with a table per class under
"per_class": {class: {measure: number}}), environment.json (a flat mapping), samples/step_000100.png and
samples/NAME_step_000100.png (further grids, such as exploration), samples/rows.json (the names of a grid's rows),
samples/per_class.json (the table per class of the last evaluation in training), and whether there is a final/.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image

from marval_rl.reporting.metrics import add_speed, metric_keys, read_metrics, series, time_spent
from marval_rl.text import load_yaml, read_text, yaml_problem

METRICS_FILE, RECIPE_FILE, EVALUATION_FILE = "metrics.jsonl", "recipe.yaml", "evaluation.json"
ENVIRONMENT_FILE, ROWS_FILE = "environment.json", "samples/rows.json"
CLASSES_FILE = "samples/per_class.json"
KIND_NAMES = {
    "grpo": "GRPO",
    "reward_backprop": "Reward back-propagation",
    "distill": "Distillation",
    "pretrain": "Pretraining",
}


@dataclass(frozen=True)
class Run:
    """What a run left behind. `samples` are name -> (step, file) pairs in order of step, "" for those of evaluation;
    `torn_samples` could not be read; `row_names` stand beside the rows of a grid."""

    name: str
    path: Path
    lines: list[dict] = field(default_factory=list)
    recipe: dict = field(default_factory=dict)
    evaluation: dict = field(default_factory=dict)
    environment: dict = field(default_factory=dict)
    samples: dict[str, list[tuple[int, Path]]] = field(default_factory=dict)
    torn_samples: list[str] = field(default_factory=list)
    row_names: list[str] = field(default_factory=list)
    finished: bool = False

    @cached_property
    def keys(self) -> list[str]:
        """Every key of metrics.jsonl that holds a number somewhere."""
        return metric_keys(self.lines)

    @property
    def kind(self) -> str:
        """The recipe's `method` ("grpo", "reward_backprop"), or by the metrics: "distill", "pretrain" or ""."""
        if self.recipe.get("method"):
            return str(self.recipe["method"])
        if "auxiliary_loss" in self.keys and "reward" not in self.keys:
            return "distill"
        return "pretrain" if "loss" in self.keys and "reward" not in self.keys else ""

    @property
    def last_step(self) -> int:
        return max((line["step"] for line in self.lines), default=0)

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds from the start of the run to its last line ("total"), and of it those of "evaluation"."""
        return time_spent(self.lines)

    @property
    def reward_names(self) -> set[str]:
        """Names of the rewards that the run was trained on."""
        return {match[1] for key in self.keys if (match := re.fullmatch(r"rewards/(.+)/mean", key))}

    def series(self, key: str) -> tuple[np.ndarray, np.ndarray]:
        """Steps [N] and values [N] of one metric."""
        return series(self.lines, key)


def load_runs(folders: list[Path]) -> list[Run]:
    """Read run folders, under distinct names (the shortest unique ends of their paths).

    Raises:
        ValueError: For an empty list, a folder given twice, a folder that is not a run, and files that cannot be read.
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
        raise ValueError(f"{folder} is not a run: there is no such folder")
    if not (folder / METRICS_FILE).is_file() and not (folder / RECIPE_FILE).is_file():
        inside = sorted(str(path.parent) for path in folder.glob(f"*/{METRICS_FILE}"))
        hint = f"; did you mean {', '.join(inside[:5])}?" if inside else ""
        raise ValueError(f"{folder} is not a run: it holds neither {METRICS_FILE} nor {RECIPE_FILE}{hint}")
    recipe = _read(folder / RECIPE_FILE, load_yaml, "YAML", {})
    lines = read_metrics(folder / METRICS_FILE) if (folder / METRICS_FILE).is_file() else []
    batch, accumulated = recipe.get("per_device_train_batch_size"), recipe.get("gradient_accumulation_steps") or 1
    add_speed(lines, batch * accumulated if isinstance(batch, int) and isinstance(accumulated, int) else None)
    per_class = _read(folder / CLASSES_FILE, json.loads, "JSON", {})
    samples, torn = _find_samples(folder / "samples")
    return Run(
        name=name,
        path=folder,
        lines=lines,
        recipe=recipe,
        evaluation={"per_class": per_class} | _read(folder / EVALUATION_FILE, json.loads, "JSON", {}),
        environment=_read(folder / ENVIRONMENT_FILE, json.loads, "JSON", {}),
        samples=samples,
        torn_samples=torn,
        row_names=_read(folder / ROWS_FILE, json.loads, "JSON", []),
        finished=(folder / "final").is_dir(),
    )


def _read(path: Path, parse: Callable[[str], Any], language: str, empty: dict | list) -> Any:
    """The content of a file, of the type of `empty`, which stands for a file that is not there."""
    if not path.is_file():
        return empty
    try:
        content = parse(read_text(path))
    except (ValueError, yaml.YAMLError) as error:  # ValueError: what json raises, and text in no known encoding
        reason = yaml_problem(error) if isinstance(error, yaml.YAMLError) else str(error)
        raise ValueError(f"{path} is not {language} ({reason}): fix it, or remove it to leave it out") from error
    if not isinstance(content, type(empty)):
        wanted = "a list" if isinstance(empty, list) else "a mapping of names to values"
        raise ValueError(f"{path} must be {wanted}, but holds {type(content).__name__}: fix it or remove it")
    return content


def _find_samples(folder: Path) -> tuple[dict[str, list[tuple[int, Path]]], list[str]]:
    """Readable grids in order of step, and the names of those that a killed process left half written."""
    good: dict[str, list[tuple[int, Path]]] = {}
    torn = []
    for path in sorted(folder.glob("*step_*.png")):
        if not (match := re.fullmatch(r"(?:(.+)_)?step_(\d+)", path.stem)):
            continue
        if _is_readable(path, path.stat().st_mtime_ns):
            good.setdefault(match[1] or "", []).append((int(match[2]), path))
        else:
            torn.append(path.name)
    return {name: sorted(good[name]) for name in sorted(good)}, torn


@cache  # a run that is watched has most grids for the second time
def _is_readable(path: Path, written: int) -> bool:
    try:
        with Image.open(path) as image:
            image.verify()
    except (OSError, SyntaxError):  # what Pillow raises for truncated and for broken PNG files
        return False
    return True
