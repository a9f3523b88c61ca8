"""Charts as Vega-Lite specifications: the page draws them, papers get the same ones as PNG or PDF."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np

from marval_rl.reporting.catalogue import Metric
from marval_rl.reporting.run_folder import Run
from marval_rl.reporting.summary import reference_levels

MOST_POINTS = 360  # of one chart, shared by its runs; each point of more values keeps their mean and their extremes
LOG_RATIO = 30.0  # positive values that span more than this get a logarithmic axis
NUM_COLOURS = 8  # runs beyond take the colours again, dashed
_NUMBER = (
    "datum.value != 0 && (abs(datum.value) < 1e-3 || abs(datum.value) >= 1e6)"
    " ? format(datum.value, '.2~e') : format(datum.value, ',.4~r')"
)
_STEP = "format(datum.value, datum.value < 1e5 ? ',' : '~s')"
# Colours are the style sheet's variables, which follow the reader's light or dark theme.
_CONFIG = {
    "background": None,
    "font": "system-ui, sans-serif",
    "view": {"stroke": None},
    "mark": {"invalid": "break-paths-show-path-domains"},
    "axis": {
        **{f"{part}Color": "var(--soft)" for part in ("label", "title")},
        **{f"{part}Color": "var(--line)" for part in ("domain", "tick", "grid")},
        **{"labelFontSize": 11, "titleFontSize": 11, "titleFontWeight": "normal", "labelFlush": True},
    },
    "axisY": {"domain": False, "ticks": False, "tickCount": 5, "labelExpr": _NUMBER, "labelPadding": 6},
    "text": {"color": "var(--soft)"},
}


def curve_points(metric: Metric, runs: list[Run]) -> list[dict]:
    """Rows of a chart: run r, step s, value v, extremes l and h, logged deviation d (null where there is none).

    More values than MOST_POINTS are gathered in neighbourhoods: v is their mean, l and h their extremes. A value that
    is not finite is null and breaks the line; it does not hide the finite extremes beside it.
    """
    rows = []
    for index, run in enumerate(runs):
        steps, values = run.series(metric.key)
        deviation_at = dict(zip(*run.series(metric.spread_key), strict=True)) if metric.spread_key else {}
        deviations = np.array([deviation_at.get(step, np.nan) for step in steps])
        values = np.where(np.isfinite(values), values, np.nan)
        parts = min(len(steps), max(MOST_POINTS // len(runs), 60))
        split = (np.array_split(array, parts) for array in (steps, values, deviations)) if parts else ((), (), ())
        for step, value, deviation in zip(*split, strict=True):
            known = value[np.isfinite(value)]
            row = {"r": index, "s": int(step[len(step) // 2]), "v": _rounded(value.mean()), "d": None}
            row |= {"l": _rounded(known.min()), "h": _rounded(known.max())} if len(known) else {"l": None, "h": None}
            rows.append(row | {"d": _rounded(deviation.mean())})
    return rows


def curve_chart(metric: Metric, runs: list[Run], smoothing: float | None = None) -> dict | None:
    """The curve of a metric over the steps of all runs that logged it twice or more; None where none did.

    Args:
        smoothing: Width of the running mean as a fraction of the run, fixed, for paper. None leaves it, the range of
            steps, the hidden runs and the step pointed `at` to signals of the page.
    """
    rows = curve_points(metric, runs)
    counts = np.bincount([row["r"] for row in rows], minlength=len(runs))
    levels = reference_levels(metric, runs)
    finite = [row[key] for row in rows for key in "lh" if row[key] is not None]
    if counts.max() < 2 or not finite:
        return None
    is_log = metric.log and min(finite) > 0 and max(finite) / min(finite) > LOG_RATIO
    last = max(max(run.last_step for run in runs), 1)
    is_page = smoothing is None
    half = 0 if is_page or metric.is_evaluation else round(smoothing * counts.max() / 2)
    scale_x = {"domainMin": {"expr": "x0"}, "domainMax": {"expr": "x1"}, "nice": False}
    y = {"type": "quantitative", "title": None, "scale": {"zero": False, "type": "log" if is_log else "linear"}}
    faint = 0.3 if len(runs) == 1 else 0.16
    band = {"mark": {"type": "area", "opacity": faint / 2}, "encoding": {"y": y | {"field": "a"}, "y2": {"field": "b"}}}
    layers: list[dict[str, Any]] = [
        *([band] if any(row["d"] is not None for row in rows) else []),
        {
            "mark": {"type": "area", "fillOpacity": faint / 2, "strokeWidth": 1, "strokeOpacity": faint},
            "encoding": {"y": y | {"field": "l"}, "y2": {"field": "h"}, "stroke": {**_colour(runs), "legend": None}},
        },
        {
            "mark": {"type": "line", "strokeWidth": 2, "strokeJoin": "round", "point": bool(counts.max() <= 30)},
            "encoding": {"y": y | {"field": "m"}},
        },
    ]
    base: dict[str, Any] = {
        "x": {
            "field": "s",
            "type": "quantitative",
            "title": None,
            "axis": {"labelExpr": _STEP, "tickCount": 5, "grid": False},
            "scale": scale_x,
        },
        **_run_encoding(runs, legend=not is_page),
    }
    chart: dict[str, Any] = {
        "description": _summary(metric, runs),
        "data": {"name": "rows", "values": rows},
        "transform": [
            {
                "window": [{"op": "mean", "field": "v", "as": "m"}, {"op": "mean", "field": "d", "as": "e"}],
                "frame": [-half, half],
                "groupby": ["r"],
                "sort": [{"field": "s"}],
            },
            {"calculate": "isValid(datum.v) ? datum.m : null", "as": "m"},
            {"calculate": "isValid(datum.d) && isValid(datum.m) ? datum.m - datum.e : null", "as": "a"},
            {"calculate": "isValid(datum.d) && isValid(datum.m) ? datum.m + datum.e : null", "as": "b"},
            {"filter": "datum.s >= x0 && datum.s <= x1 && indexof(hidden, datum.r) < 0"},
        ],
        "layer": [
            *({**layer, "encoding": base | layer["encoding"]} for layer in layers),
            *(_reference(level, metric.reference_label, y) for level in levels),
        ],
        "params": [{"name": n, "value": v} for n, v in {"x0": 0, "x1": last, "hidden": [], "at": -1}.items()],
    }
    if is_page:
        cursor = {"x": {"value": {"expr": "scale('x', at)"}}, "opacity": {"value": {"expr": "at < 0 ? 0 : 1"}}}
        chart["layer"].append(
            {"mark": {"type": "rule", "color": "var(--soft)", "strokeWidth": 0.6}, "encoding": cursor}
        )
    return _framed(chart, metric.label if not is_page else None)


def frontier_chart(metric: Metric, runs: list[Run], is_page: bool = True) -> dict | None:
    """A judge, or the reward, against the Fréchet distance: each run a path through its evaluations.

    Up and to the left is better. The reward of an evaluation is the mean of what was logged since the one before. None
    where no run has two such points.
    """
    rows: list[dict[str, Any]] = []
    for index, run in enumerate(runs):
        distances = dict(zip(*run.series("eval_frechet_distance"), strict=True))
        steps, values = run.series(metric.key)
        points, before = [], -1
        for step, distance in distances.items():
            known = values[(steps > before) & (steps <= step) & np.isfinite(values)]
            if metric.is_evaluation:
                known = values[(steps == step) & np.isfinite(values)]
            before = step
            if len(known) and math.isfinite(distance):
                points.append({"r": index, "s": int(step), "x": _rounded(distance), "y": _rounded(known.mean())})
        rows += [point | {"run": run.name, "end": int(point is points[-1])} for point in points]
    if not rows or np.bincount([row["r"] for row in rows]).max() < 2:
        return None
    axis = {"type": "quantitative", "scale": {"zero": False, "padding": 12}}
    tooltip = [{"field": "run"}, {"field": "s", "title": "step"}, {"field": "y", "title": metric.label}]
    tooltip.append({"field": "x", "title": "Fréchet distance"})
    base = {
        "x": axis | {"field": "x", "title": "Fréchet distance (lower is better)", "axis": {"grid": False}},
        "y": axis | {"field": "y", "title": None},
        **_run_encoding(runs, legend=not is_page),
    }
    end = {"condition": {"test": "datum.end", "value": 130}, "value": 26}
    chart = {
        "description": f"{metric.label} against the Fréchet distance, each run a path from its first evaluation on",
        "data": {"name": "rows", "values": rows},
        "transform": [{"filter": "indexof(hidden, datum.r) < 0"}],
        "layer": [
            {"mark": {"type": "line", "opacity": 0.7}, "encoding": base | {"order": {"field": "s"}}},
            {
                "mark": {"type": "point", "filled": True, "opacity": 1},
                "encoding": base | {"size": end, "tooltip": tooltip},
            },
        ],
        "params": [{"name": "hidden", "value": []}],
    }
    return _framed(chart, None if is_page else f"{metric.label} against Fréchet distance")


def _framed(chart: dict, title: str | None) -> dict:
    size = {"width": "container", "height": 190} if title is None else {"width": 420, "height": 260, "title": title}
    size |= {"padding": {"left": 2, "right": 6, "top": 6, "bottom": 2}}
    return {**chart, **size, "autosize": {"type": "fit-x", "contains": "padding"}, "config": _CONFIG}


def _run_encoding(runs: list[Run], legend: bool) -> dict:
    """Runs by colour and, beyond NUM_COLOURS, by dashes. A legend, on paper, has their names."""
    names = json.dumps([run.name for run in runs])
    shown = {"title": None, "labelExpr": f"{names}[datum.value]", "labelLimit": 400, "orient": "bottom"}
    shown |= {"symbolOpacity": 1, "symbolStrokeWidth": 0}
    return {
        "color": {**_colour(runs), "legend": shown if legend and len(runs) > 1 else None},
        "strokeDash": {"condition": {"test": f"datum.r >= {NUM_COLOURS}", "value": [5, 3]}, "value": [1, 0]},
        "detail": {"field": "r"},
    }


def _colour(runs: list[Run]) -> dict:
    colours = [f"var(--c{index % NUM_COLOURS})" for index in range(len(runs))]
    return {"field": "r", "type": "nominal", "scale": {"domain": list(range(len(runs))), "range": colours}}


def _reference(level: float, label: str, y: dict) -> dict:
    return {
        "data": {"values": [{"level": level, "text": label}]},
        "encoding": {"y": y | {"field": "level"}},
        "layer": [
            {"mark": {"type": "rule", "strokeDash": [4, 3], "color": "var(--soft)"}},
            {
                "mark": {"type": "text", "align": "left", "dx": 4, "dy": -6, "fontSize": 11},
                "encoding": {"x": {"value": 0}, "text": {"field": "text"}},
            },
        ],
    }


def _summary(metric: Metric, runs: list[Run]) -> str:
    series = ((run.name, run.series(metric.key)[1]) for run in runs)
    ends = (f"{name} from {values[0]:.3g} to {values[-1]:.3g}" for name, values in series if len(values))
    return f"{metric.label} over training steps: " + "; ".join(ends)


def _rounded(value: float) -> float | None:
    return float(f"{value:.5g}") if math.isfinite(value) else None
