"""What each metric is: its label, unit, the direction that is better, and the section of the report it belongs to."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True)
class Metric:
    """One metric as the report shows it. `better` is "higher", "lower" or "" where neither is good in itself."""

    key: str
    section: str
    label: str
    unit: str
    better: str = ""
    spread_key: str = ""  # metric with the standard deviation, drawn as a band
    reference: float | str | None = None  # a level to compare with: a number, or the metric that holds it
    reference_label: str = ""
    log: bool = False  # a logarithmic axis where the values span decades
    trained_on: bool = False  # of a judge: a training reward has its name

    @property
    def is_held_out(self) -> bool:
        return self.section == "judges" and not self.trained_on

    @property
    def is_evaluation(self) -> bool:
        return self.key.startswith("eval_")

    @property
    def direction(self) -> str:
        return f"{self.better} is better" if self.better else ""


# Sections in the order of the page; what a run should log there: words -> pattern of the key.
SECTIONS: dict[str, dict[str, str]] = {
    "rewards": {"the reward": r"reward", "its components": r"rewards/.+/mean"},
    "judges": {"a held-out judge": r"eval_.+"},
    "distribution": {
        "Fréchet distance": r"eval_frechet_distance",
        "diversity": r"eval_diversity",
        "mode coverage": r"eval_mode_coverage",
    },
    "policy": {"KL (beta above 0 turns it on)": r"kl", "clip fraction": r"clip_ratio/region_mean"},
    "optimisation": {"loss": r"loss"},
    "speed": {},
    "other": {},
}
KINDS = {"rewards": ("grpo", "reward_backprop"), "policy": ("grpo",)}  # of runs that should; all in other sections

# Here `key` is a pattern; {0} in a label or a spread_key is what its group matched. In order of appearance on the page.
_REAL: dict[str, Any] = {
    "unit": "relative to real images",
    "better": "higher",
    "reference": 1.0,
    "reference_label": "real",
}
_FLOOR: dict[str, Any] = {"reference": "eval_frechet_floor", "reference_label": "floor", "log": True}
_RULES = (
    Metric(r"reward", "rewards", "Reward, weighted sum", "reward", "higher", "reward_std"),
    Metric(r"rewards/(.+)/mean", "rewards", "{0}", "reward", "higher", "rewards/{0}/std"),
    Metric(r"eval_rewards/(.+)/mean", "judges", "{0}, mean reward", "reward", "higher", "eval_rewards/{0}/std"),
    Metric(r"eval_(.+)/accuracy", "judges", "{0}, accuracy", "fraction right", "higher"),
    Metric(r"eval_(.+)/log_probability", "judges", "{0}, log-probability", "nats", "higher"),
    Metric(r"eval_(.+)/confidence", "judges", "{0}, confidence", "probability", "higher"),
    Metric(r"eval_frechet_distance", "distribution", "Fréchet distance", "squared feature units", "lower", **_FLOOR),
    Metric(r"eval_diversity", "distribution", "Diversity", **_REAL),
    Metric(r"eval_mode_coverage", "distribution", "Mode coverage", **_REAL),
    Metric(r"kl", "policy", "KL to the reference model", "nats"),
    Metric(r"clip_ratio/region_mean", "policy", "Clip fraction", "fraction of ratios"),
    Metric(r"clip_ratio/(.+)", "policy", "Clip fraction, {0}", "fraction of ratios"),
    Metric(r"ratio", "policy", "Ratio of new to old policy", "mean", reference=1.0, reference_label="unchanged policy"),
    Metric(r"frac_reward_zero_std", "policy", "Groups without signal", "fraction of groups", "lower"),
    Metric(r"entropy", "policy", "Entropy", "nats"),
    Metric(r"loss", "optimisation", "Loss", "loss", log=True),
    Metric(r"student_loss", "optimisation", "Student loss (GSIM)", "loss", log=True),
    Metric(r"score_gap", "optimisation", "Score gap, auxiliary to teacher", "mean norm", "lower", log=True),
    Metric(r"auxiliary_loss", "optimisation", "Loss of the auxiliary network", "loss", "lower", log=True),
    Metric(r"mmd", "optimisation", "MMD^2 between generated and real images (distribution anchor)", "mmd"),
    Metric(r"gsim_loss", "optimisation", "Loss of the GSIM anchor", "loss", log=True),
    Metric(r"eval_loss", "optimisation", "Loss at evaluation", "loss", "lower", log=True),
    Metric(r"grad_norm", "optimisation", "Gradient norm", "L2 norm", log=True),
    Metric(r"learning_rate", "optimisation", "Learning rate", "per step"),
    Metric(r"seconds_per_step", "speed", "Time per step", "seconds", "lower", log=True),
    Metric(r"images_per_second", "speed", "Training images per second", "images, each process", "higher"),
)
# Bookkeeping, and levels that are drawn inside the chart of another metric.
_HIDDEN = (
    r"step|time|epoch|total_flos|train_.*|.*_runtime|eval_.*_per_second|num_.*tokens.*|(eval_)?reward(s/.+/|_)std"
    r"|.*_floor"
)


def catalogue(keys: list[str], trained_on: set[str]) -> list[Metric]:
    """Describe the metrics `keys`, in the order in which they are shown; `trained_on` are names of training rewards."""
    ranked = [_describe(key, trained_on) for key in dict.fromkeys(keys) if not re.fullmatch(_HIDDEN, key)]
    return [metric for _, metric in sorted(ranked, key=lambda pair: pair[0])]


def _describe(key: str, trained_on: set[str]) -> tuple[tuple[bool, int], Metric]:
    """A metric and its rank: held-out judges come before those that were trained on."""
    for rank, rule in enumerate(_RULES):
        if match := re.fullmatch(rule.key, key):
            name = match[1] if match.groups() else ""
            trained = rule.section == "judges" and name in trained_on
            label, spread_key = readable(rule.label.format(name)), rule.spread_key.format(name)
            return (trained, rank), replace(rule, key=key, label=label, spread_key=spread_key, trained_on=trained)
    return (False, len(_RULES)), Metric(key, "other", readable(key), "")


def readable(key: str) -> str:
    """A key as words: "images_per_second" is "Images per second"."""
    words = key.replace("_", " ").replace("/", ", ")
    return words[:1].upper() + words[1:]
