"""What a careful reader would notice in a run before believing its curves."""

from __future__ import annotations

import numpy as np

from marval_rl.reporting.catalogue import catalogue
from marval_rl.reporting.run_folder import Run
from marval_rl.reporting.summary import change_of, format_number

FD_LIMIT = 1.1  # a Fréchet distance above this multiple of where the run began, and
KEPT_LIMIT = 0.93  # diversity or mode coverage below this fraction of it, are called out


def findings_of(run: Run) -> list[str]:
    """Plain sentences about one run: unfinished, not finite, drifted, learned nothing that a judge sees; [] if none."""
    checks = (_unfinished, _not_finite, _torn_samples, _drift, _reward_without_judge, _past_its_best, _silent_groups)
    return [sentence for check in checks for sentence in check(run)]


def _unfinished(run: Run) -> list[str]:
    if run.finished:
        return []
    planned = run.recipe.get("max_steps")
    of_all = f" of {planned:,}" if isinstance(planned, int) and planned > 0 else ""
    return [f"There is no final model: the run continues, or was stopped. Last logged step: {run.last_step:,}{of_all}."]


def _not_finite(run: Run) -> list[str]:
    sentences = []
    for key in run.keys:
        steps, values = run.series(key)
        if (bad := ~np.isfinite(values)).any():
            sentences.append(f"{key} is not finite at {bad.sum()} of {len(values)} steps, first at {steps[bad][0]:,}.")
    return sentences


def _torn_samples(run: Run) -> list[str]:
    return [f"Unreadable sample grids were left out: {', '.join(run.torn_samples)}."] if run.torn_samples else []


def _changes(run: Run) -> dict:
    metrics = catalogue(run.keys, run.reward_names)
    changes = {metric: change_of(metric, run) for metric in metrics}
    return {metric: change for metric, change in changes.items() if change and change.before is not None}


def _drift(run: Run) -> list[str]:
    """RL alone: a pretrained model moves away from where it began because it should."""
    limits = {"eval_frechet_distance": FD_LIMIT, "eval_diversity": KEPT_LIMIT, "eval_mode_coverage": KEPT_LIMIT}
    drifts = []
    for metric, change in _changes(run).items():
        if not run.reward_names or metric.key not in limits or change.before <= 0:
            continue
        ratio = change.after / change.before
        if ratio > FD_LIMIT if metric.better == "lower" else ratio < KEPT_LIMIT:
            ends = f"{format_number(change.before)} to {format_number(change.after)}"
            drifts.append(f"{metric.label} went from {ends} ({format_number(ratio)} times).")
    return [f"The images drifted from where RL began. {' '.join(drifts)}"] if drifts else []


def _reward_without_judge(run: Run) -> list[str]:
    changes = _changes(run)
    reward = next((change for metric, change in changes.items() if metric.key == "reward"), None)
    judges = [change for metric, change in changes.items() if metric.is_held_out]
    if reward and judges and reward.difference > 0 and all(change.difference <= 0 for change in judges):
        return ["The reward rose, and no held-out judge rose with it: the run may exploit its reward."]
    return []


def _past_its_best(run: Run) -> list[str]:
    """Distillation and pretraining: the Fréchet distance turned before the end."""
    steps, values = run.series("eval_frechet_distance")
    finite = np.isfinite(values)
    steps, values = steps[finite], values[finite]
    if run.reward_names or len(values) < 3 or values[-1] <= FD_LIMIT * values.min():
        return []
    best = int(values.argmin())
    return [
        f"Fréchet distance was best at step {steps[best]:,} ({format_number(values[best])}) "
        f"and ended at {format_number(values[-1])}."
    ]


def _silent_groups(run: Run) -> list[str]:
    _, values = run.series("frac_reward_zero_std")
    tail = values[-max(len(values) // 10, 1) :]
    if len(tail) and tail.mean() > 0.5:
        return [f"At the end {tail.mean():.0%} of the groups had equal rewards throughout, and so taught nothing."]
    return []
