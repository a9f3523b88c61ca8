"""The figures: each measure before and after, and the evaluation of the final models."""

from __future__ import annotations

from dataclasses import dataclass
from html import escape

import numpy as np

from marval_rl.reporting.catalogue import Metric, catalogue, readable
from marval_rl.reporting.run_folder import Run
from marval_rl.reporting.scales import format_number


@dataclass(frozen=True)
class Change:
    """A measure at the two ends of a run. `before` is None where there is one value only."""

    before: float | None
    after: float
    first_step: int
    averaged: int = 1  # number of logged values in each end's mean

    @property
    def difference(self) -> float:
        return self.after - self.before if self.before is not None else float("nan")


def change_of(metric: Metric, run: Run) -> Change | None:
    """First and last value of an evaluation; of a training metric, the mean over its first and its last tenth."""
    steps, values = run.series(metric.key)
    steps, values = steps[np.isfinite(values)], values[np.isfinite(values)]
    if len(values) == 0:
        return None
    if len(values) == 1:
        return Change(None, float(values[0]), int(steps[0]))
    width = 1 if metric.key.startswith("eval_") else max(len(values) // 10, 1)
    return Change(float(values[:width].mean()), float(values[-width:].mean()), int(steps[0]), width)


def reference_levels(metric: Metric, runs: list[Run]) -> list[float]:
    """The distinct levels (to three digits) that a metric is compared with: a constant, or each run's last one."""
    if metric.reference is None:
        return []
    if not isinstance(metric.reference, str):
        return [metric.reference]
    last = [values[-1] for _, values in (run.series(metric.reference) for run in runs) if len(values)]
    return sorted({float(f"{level:.3g}") for level in last if np.isfinite(level)})


def summary(metrics: list[Metric], runs: list[Run]) -> str:
    """HTML of each measure before, after, and the difference: tiles for one run, a table for several; "" for none."""
    rows = [(metric, [change_of(metric, run) for run in runs]) for metric in metrics]
    rows = [(metric, changes) for metric, changes in rows if any(changes)]
    if not rows:
        return ""
    if len(runs) == 1:
        tiles = (
            f"<div><dt>{_name(metric, runs)}</dt><dd>{_ends(changes[0], metric)}</dd></div>" for metric, changes in rows
        )
        return f'<dl class="tiles">{"".join(tiles)}</dl>'
    lines = []
    for metric, changes in rows:
        cells = "".join(f"<td>{_ends(change, metric)}</td>" for change in changes)
        lines.append(f'<tr><th scope="row">{_name(metric, runs)}</th>{cells}</tr>')
    return _table("before → after", runs, lines)


def _name(metric: Metric, runs: list[Run]) -> str:
    hints = [metric.direction]
    if levels := reference_levels(metric, runs):
        hints.append(f"{metric.reference_label} {' / '.join(map(format_number, levels))}")
    if not metric.key.startswith("eval_"):
        hints.append("in training")
    return f"{escape(metric.label)}<small>{escape(', '.join(filter(None, hints)))}</small>"


def _ends(change: Change | None, metric: Metric) -> str:
    if change is None:
        return '<span class="soft">not measured</span>'
    after = f"<b>{format_number(change.after)}</b>"
    if change.before is None:
        return f"{after}<small>measured once, at step {change.first_step:,}</small>"
    tone = "soft"
    if metric.better and change.difference:
        tone = "good" if (change.difference > 0) == (metric.better == "higher") else "bad"
    sign = "+" if change.difference > 0 else ""
    details = f'<span class="{tone}">{sign}{format_number(change.difference)}</span>'
    if change.averaged > 1:
        details += f", means of {change.averaged}"
    elif change.first_step > 0:
        details += f", since step {change.first_step:,}"
    return f'<span class="soft">{format_number(change.before)} →</span> {after}<small>{details}</small>'


def evaluation_table(runs: list[Run]) -> str:
    """HTML table of evaluation.json, nested settings flattened; "" where no run has one."""
    flat = [{key: _value(value) for key, value in _flatten(run.evaluation).items()} for run in runs]
    keys = list(dict.fromkeys(key for values in flat for key in values))
    known = catalogue([f"eval_{key}" for key in keys], set())
    labels = {metric.key: metric.label for metric in known if metric.section != "other"}
    rows = [
        f'<tr><th scope="row">{escape(labels.get(f"eval_{key}", readable(key)))}</th>'
        + "".join(f"<td>{values.get(key, '&ndash;')}</td>" for values in flat)
        + "</tr>"
        for key in keys
    ]
    return _table("measure", runs, rows, "compact") if rows else ""


def _flatten(values: dict, prefix: str = "") -> dict[str, object]:
    flat = {}
    for key, value in values.items():
        flat |= _flatten(value, f"{prefix}{key}/") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def _value(value: object) -> str:
    if isinstance(value, float):
        return format_number(value, 4)
    return "n/a" if value is None else escape(str(value))


def _table(corner: str, runs: list[Run], rows: list[str], style: str = "roomy") -> str:
    heads = "".join(
        f'<th scope="col" class="s{index}"><i></i>{escape(run.name)}</th>' for index, run in enumerate(runs)
    )
    return (
        f'<div class="scroll"><table class="{style}"><thead><tr><th scope="col">{corner}</th>{heads}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )
