"""A small line chart as inline SVG. No script: the browser's :hover shows the values of the step under the pointer."""

from __future__ import annotations

from html import escape

import numpy as np

from marval_rl.reporting.catalogue import Metric
from marval_rl.reporting.curves import Curve
from marval_rl.reporting.scales import Axis, axis_for, format_number, round_ticks

WIDTH, HEIGHT = 340, 210
LEFT, RIGHT, TOP, BOTTOM = 42, 8, 24, 36
MOST_STOPS = 48  # places along the steps where the pointer finds values
MOST_READOUTS = 6  # more values than this do not fit below a chart; the tooltip holds them all


def draw_chart(metric: Metric, curves: list[Curve], references: list[float], last_step: int) -> str:
    """Draw one metric over training steps 0..last_step; `references` are the levels to compare with (dashed)."""
    x_axis = Axis(0.0, float(last_step), round_ticks(0.0, float(last_step)))
    reach = [curve.smooth + sign * np.nan_to_num(curve.spread) for curve in curves for sign in (-1, 1)]
    everything = np.concatenate([*reach, *(curve.values for curve in curves), np.array(references)])
    if not np.isfinite(everything).any():
        return '<p class="missing">Not one finite value was logged.</p>'
    y_axis = axis_for(everything, may_be_log=metric.log)
    unit = ", ".join(filter(None, [metric.unit, "log scale" if y_axis.log else "", metric.direction]))
    parts = [
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(_summary(metric, curves))}">',
        _grid(x_axis, y_axis),
        f'<text class="unit" x="0" y="11">{escape(unit)}</text>',
        f'<text class="unit" x="{WIDTH - RIGHT}" y="{HEIGHT - 4}" text-anchor="end">training step</text>',
        *(_reference(level, metric.reference_label, y_axis) for level in references),
        *(_curve(curve, x_axis, y_axis) for curve in curves),
        *_stops(curves, x_axis, y_axis),
        "</svg>",
    ]
    return "".join(parts)


def _x(axis: Axis, steps: np.ndarray | float) -> np.ndarray:
    return LEFT + axis.at(steps) * (WIDTH - LEFT - RIGHT)


def _y(axis: Axis, values: np.ndarray | float) -> np.ndarray:
    return HEIGHT - BOTTOM - axis.at(values) * (HEIGHT - TOP - BOTTOM)


def _grid(x_axis: Axis, y_axis: Axis) -> str:
    parts = []
    for tick, label in zip(y_axis.ticks, y_axis.labels(), strict=True):
        y = _y(y_axis, tick)
        parts.append(f'<path class="grid" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 3.5:.1f}" text-anchor="end">{label}</text>')
    base = HEIGHT - BOTTOM
    parts.append(f'<path class="base" d="M{LEFT} {base}H{WIDTH - RIGHT}"/>')
    for tick, label in zip(x_axis.ticks, x_axis.labels(), strict=True):
        x = _x(x_axis, tick)
        anchor = "end" if x > WIDTH - RIGHT - 12 else "middle"
        parts.append(f'<text x="{x:.1f}" y="{base + 14}" text-anchor="{anchor}">{label}</text>')
    return "".join(parts)


def _reference(level: float, label: str, y_axis: Axis) -> str:
    y = _y(y_axis, level)
    text_y = y - 4 if y > TOP + 12 else y + 12
    return (
        f'<path class="reference" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>'
        f'<text class="halo" x="{LEFT + 4}" y="{text_y:.1f}">{escape(label)} {format_number(level)}</text>'
    )


def _curve(curve: Curve, x_axis: Axis, y_axis: Axis) -> str:
    steps, values, smooth, spread = curve.thinned()
    x, y = _x(x_axis, steps), _y(y_axis, smooth)
    parts = [f'<g class="r{curve.run}">']
    known = np.isfinite(smooth) & np.isfinite(spread)
    if known.any():
        upper = _y(y_axis, smooth[known] + spread[known])
        lower = _y(y_axis, smooth[known] - spread[known])
        outline = zip(np.append(x[known], x[known][::-1]), np.append(upper, lower[::-1]), strict=True)
        parts.append('<path class="band" d="M' + "L".join(f"{a:.1f} {b:.1f}" for a, b in outline) + 'Z"/>')
    elif curve.is_noisy:
        parts.append(f'<path class="logged" d="{_path(x, _y(y_axis, values))}"/>')
    parts.append(f'<path class="line" d="{_path(x, y)}"/>')
    if len(steps) <= 24:
        parts += [f'<circle cx="{a:.1f}" cy="{b:.1f}" r="2.2"/>' for a, b in zip(x, y, strict=True) if np.isfinite(b)]
    return "".join(parts) + "</g>"


def _path(x: np.ndarray, y: np.ndarray) -> str:
    """A polyline that is broken where y is NaN."""
    commands, pen_down = [], False
    for a, b in zip(x, y, strict=True):
        if np.isfinite(b):
            commands.append(f"{'L' if pen_down else 'M'}{a:.1f} {b:.1f}")
        pen_down = bool(np.isfinite(b))
    return "".join(commands)


def _stops(curves: list[Curve], x_axis: Axis, y_axis: Axis) -> list[str]:
    """Upright strips that, hovered, show the logged values nearest to their step; the last values show otherwise."""
    steps = np.unique(np.concatenate([curve.steps for curve in curves]))
    stops = steps[np.unique(np.linspace(0, len(steps) - 1, min(MOST_STOPS, len(steps))).round().astype(int))]
    edges = np.concatenate([[LEFT], (_x(x_axis, stops[1:]) + _x(x_axis, stops[:-1])) / 2, [WIDTH - RIGHT]])
    last = [(curve, curve.steps[-1], len(curve.steps) - 1) for curve in curves]
    parts = [f'<g class="rest">{_readout("last", last)}</g>']
    for stop, left, right in zip(stops, edges[:-1], edges[1:], strict=True):
        found = []
        for curve in curves:
            nearest = int(np.argmin(np.abs(curve.steps - stop)))
            if left <= _x(x_axis, float(curve.steps[nearest])) <= right:
                found.append((curve, int(curve.steps[nearest]), nearest))
        title = "\n".join([f"step {stop:,}", *(_tooltip_line(*hit, stop, len(curves) > 1) for hit in found)])
        dots = "".join(_dot(curve, index, x_axis, y_axis) for curve, _, index in found)
        parts.append(
            f'<g class="stop"><title>{escape(title)}</title>'
            f'<rect x="{left:.1f}" y="{TOP}" width="{right - left:.1f}" height="{HEIGHT - TOP - BOTTOM}"/>'
            f'<path d="M{_x(x_axis, float(stop)):.1f} {TOP}V{HEIGHT - BOTTOM}"/>{dots}'
            f"{_readout(f'step {stop:,}', found)}</g>"
        )
    return parts


def _tooltip_line(curve: Curve, step: int, index: int, stop: int, named: bool) -> str:
    text = f"{curve.name}: " * named + format_number(curve.values[index], 4)
    if np.isfinite(curve.spread[index]):
        text += f" ± {format_number(curve.spread[index])}"
    return text + (f" (step {step:,})" if step != stop else "")


def _dot(curve: Curve, index: int, x_axis: Axis, y_axis: Axis) -> str:
    if not np.isfinite(curve.values[index]):
        return ""
    x, y = _x(x_axis, float(curve.steps[index])), _y(y_axis, curve.values[index])
    return f'<circle class="r{curve.run}" cx="{x:.1f}" cy="{y:.1f}" r="3"/>'


def _readout(label: str, hits: list[tuple[Curve, int, int]]) -> str:
    values = "".join(
        f'<tspan class="r{curve.run}" dx="7">{format_number(curve.values[index])}</tspan>'
        for curve, _, index in (hits if len(hits) <= MOST_READOUTS else [])
    )
    return f'<text class="readout" x="0" y="{HEIGHT - 4}">{label}{values}</text>'


def _summary(metric: Metric, curves: list[Curve]) -> str:
    ends = (f"{c.name} from {format_number(c.values[0])} to {format_number(c.values[-1])}" for c in curves)
    return f"{metric.label}: " + "; ".join(ends)
