"""The figures: each measure before and after, over seeds, and the tables beside it; and numbers as text."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from marval_rl.reporting.catalogue import Metric, catalogue, readable
from marval_rl.reporting.run_folder import KIND_NAMES, Run
from marval_rl.text import dump_yaml

# Settings worth a line at the top, where the recipe has them: key -> words, with {} for the value.
_HEADLINE = {
    "reward_funcs": "rewards {}",
    "class_groups": "classes by {}",
    "learning_rate": "learning rate {}",
    "num_unmasking_steps": "{} unmasking steps",
    "num_generations": "groups of {}",
    "beta": "KL weight {}",
    "distribution_weight": "distribution weight {}",
    "gsim_weight": "GSIM weight {}",
    "gsim_guidance_scale": "GSIM guidance {}",
    "guidance_scale": "guidance {}",
    "seed": "seed {}",
}
_PLACES = {"output_dir", "logging_dir", "run_name", "hub_model_id"}
_SEEDS = {"seed", "data_seed"}


@dataclass(frozen=True)
class Change:
    """A measure at the two ends of a run. `before` is None where there is one value only."""

    before: float | None
    after: float
    first_step: int
    averaged: int = 1  # number of logged values in each end's mean
    spread: float = math.nan  # standard deviation of the values in the last end's mean; NaN of one value
    extremes: tuple[float, float] = (math.nan, math.nan)  # over the run

    @property
    def difference(self) -> float:
        return self.after - self.before if self.before is not None else math.nan


def change_of(metric: Metric, run: Run) -> Change | None:
    """First and last value of an evaluation; of a training metric, the mean over its first and its last tenth."""
    steps, values = run.series(metric.key)
    steps, values = steps[np.isfinite(values)], values[np.isfinite(values)]
    if len(values) == 0:
        return None
    if len(values) == 1:
        return Change(None, float(values[0]), int(steps[0]))
    width = 1 if metric.is_evaluation else max(len(values) // 10, 1)
    spread = float(values[-width:].std(ddof=1)) if width > 1 else math.nan
    ends = float(values[:width].mean()), float(values[-width:].mean())
    return Change(*ends, int(steps[0]), width, spread, (float(values.min()), float(values.max())))


def step_time(run: Run) -> Change | None:
    """Seconds per step; None where no two lines of training give them."""
    return change_of(catalogue(["seconds_per_step"], set())[0], run)


def reference_levels(metric: Metric, runs: list[Run]) -> list[float]:
    """The distinct levels (to three digits) that a metric is compared with: a constant, or each run's last one."""
    if metric.reference is None:
        return []
    if not isinstance(metric.reference, str):
        return [metric.reference]
    last = [values[-1] for _, values in (run.series(metric.reference) for run in runs) if len(values)]
    return sorted({float(f"{level:.3g}") for level in last if np.isfinite(level)})


def comparison(metrics: list[Metric], runs: list[Run]) -> list[tuple[Metric, list[Change | None]]]:
    """Rewards, held-out judges and distribution of each run; losses too, unless all are RL, whose loss says nothing."""
    sections = {"rewards", "judges", "distribution"}
    losses = {"loss", "auxiliary_loss"} if any(run.kind in ("pretrain", "distill") for run in runs) else set()
    shown = [m for m in metrics if (m.section in sections or m.key in losses) and not m.trained_on]
    rows = [(metric, [change_of(metric, run) for run in runs]) for metric in shown]
    return [(metric, changes) for metric, changes in rows if any(changes)]


def seed_groups(runs: list[Run]) -> list[list[int]]:
    """Indices of runs whose recipes differ in the seed, and in nothing but that and where they write."""
    groups: dict[str, list[int]] = {}
    for index, run in enumerate(runs):
        same = {key: run.recipe[key] for key in sorted(run.recipe.keys() - _PLACES - _SEEDS)}
        groups.setdefault(dump_yaml(same), []).append(index)
    seeds = {index: tuple(run.recipe.get(key) for key in sorted(_SEEDS)) for index, run in enumerate(runs)}
    return [group for group in groups.values() if len({seeds[index] for index in group}) == len(group) > 1]


def over_seeds(changes: list[Change | None], group: list[int]) -> str:
    """Mean and standard deviation of the last values of a group of runs; "" where one is missing."""
    values = [change.after for index in group if (change := changes[index]) is not None]
    if len(values) < len(group):
        return ""
    return f"{format_number(float(np.mean(values)))} ± {format_number(float(np.std(values, ddof=1)), 2)}"


def headline(run: Run, runs: list[Run]) -> str:
    """One line: kind, length, duration, and the main settings; of several runs those that differ."""
    parts = [KIND_NAMES.get(run.kind, run.kind)] if run.kind else []
    parts += [f"{run.last_step:,} training steps"] if run.lines else ["nothing logged yet"]
    parts += [format_seconds(run.seconds["total"])] if run.seconds["total"] else []
    for key, words in _HEADLINE.items():
        value = run.recipe.get(key)
        is_common = len(runs) > 1 and all(other.recipe.get(key) == value for other in runs)
        if value is not None and value != [] and not is_common:
            parts.append(words.format(format_number(value) if isinstance(value, float) else setting(value)))
    return " · ".join(parts)


def setting(value: object) -> str:
    """A setting on one line: lists and mappings as YAML writes them in flow style."""
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return ", ".join(value)
    if isinstance(value, list | dict):
        return dump_yaml(value, default_flow_style=True, width=10_000).strip()
    return "none" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def differences(settings: list[dict]) -> dict[str, list[str]]:
    """The settings in which several recipes or environments differ: name -> the value in each."""
    keys = dict.fromkeys(key for one in settings for key in one if key not in _PLACES)
    rows = {key: [setting(one[key]) if key in one else "absent" for one in settings] for key in keys}
    return {key: values for key, values in rows.items() if len(set(values)) > 1}


def evaluations(runs: list[Run]) -> dict[str, list[str]]:
    """Each figure of evaluation.json, nested ones flattened: label -> the value of each run."""
    elsewhere = ("per_class", "environment")
    flat = [_flatten({key: run.evaluation[key] for key in run.evaluation if key not in elsewhere}) for run in runs]
    keys = list(dict.fromkeys(key for values in flat for key in values))
    known = catalogue([f"eval_{key}" for key in keys], set())
    labels = {metric.key: metric.label for metric in known if metric.section != "other"}
    return {labels.get(f"eval_{key}", readable(key)): [values.get(key, "-") for values in flat] for key in keys}


def per_class(run: Run) -> tuple[list[str], dict[str, list[float | None]]]:
    """The measures of evaluation.json's "per_class", and of each class their values."""
    classes = run.evaluation.get("per_class")
    if not isinstance(classes, dict) or not all(isinstance(row, dict) for row in classes.values()):
        return [], {}
    measures = list(dict.fromkeys(measure for row in classes.values() for measure in row))
    return measures, {name: [row.get(measure) for measure in measures] for name, row in classes.items()}


def _flatten(values: dict, prefix: str = "") -> dict[str, str]:
    flat: dict[str, str] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= _flatten(value, f"{prefix}{key}/")
        else:
            flat[f"{prefix}{key}"] = format_number(value, 4) if isinstance(value, float) else setting(value)
    return flat


def format_number(value: float | None, digits: int = 3) -> str:
    """A number with `digits` significant digits, as short as it goes: "0.0312", "12,400", "3e-5"."""
    if value is None:
        return "n/a"
    if not math.isfinite(value):
        return "not a number" if math.isnan(value) else "infinite"
    if value == 0:
        return "0"
    size = abs(value)
    if 999.5 <= size < 1e7:
        text = f"{size:,.{max(digits - len(str(int(size))), 0)}f}"
    elif 1e-4 <= size < 999.5:
        text = f"{size:.{digits}g}"
    else:
        mantissa, exponent = f"{size:.{digits - 1}e}".split("e")
        mantissa = mantissa.rstrip("0").rstrip(".") if "." in mantissa else mantissa
        text = f"{mantissa}e{int(exponent)}"
    return ("\N{MINUS SIGN}" if value < 0 else "") + text


def format_seconds(seconds: float) -> str:
    """A duration as "42 s", "3 min 20 s" or "2 h 5 min"."""
    total = round(seconds)
    if total < 60:
        return f"{total} s"
    if total < 3600:
        return f"{total // 60} min {total % 60} s"
    return f"{total // 3600} h {total % 3600 // 60} min"
