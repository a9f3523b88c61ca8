"""One metric of one run, made ready to be drawn: a quiet line, the logged values behind it, a band."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from marval_rl.reporting.catalogue import Metric
from marval_rl.reporting.run_folder import Run

MOST_POINTS = 240  # more would not be seen at the size of a chart


@dataclass(frozen=True)
class Curve:
    """Arrays [N] over increasing steps. `smooth` is `values` unless these are noisy; spread is NaN where absent."""

    run: int
    name: str
    steps: np.ndarray
    values: np.ndarray
    smooth: np.ndarray
    spread: np.ndarray

    @property
    def is_noisy(self) -> bool:
        return self.smooth is not self.values

    def thinned(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Steps, values, smooth, spread as means over at most MOST_POINTS neighbourhoods; gaps (NaN) stay gaps."""
        arrays = (self.steps.astype(np.float64), self.values, self.smooth, self.spread)
        if len(self.steps) <= MOST_POINTS:
            return arrays
        return tuple(np.array([part.mean() for part in np.array_split(array, MOST_POINTS)]) for array in arrays)


def curves_of(metric: Metric, runs: list[Run]) -> list[Curve]:
    """The curve of `metric` for each run that logged it at two steps or more."""
    curves = []
    for index, run in enumerate(runs):
        steps, values = run.series(metric.key)
        if len(steps) < 2:
            continue
        values = np.where(np.isfinite(values), values, np.nan)
        spread_of = dict(zip(*run.series(metric.spread_key), strict=True)) if metric.spread_key else {}
        spread = np.array([spread_of.get(step, np.nan) for step in steps])
        smooth = values
        if is_noisy(values):
            width = 2 * (len(values) // 30) + 3
            smooth, spread = running_mean(values, width), running_mean(spread, width)
        curves.append(Curve(index, run.name, steps, values, smooth, spread))
    return curves


def is_noisy(values: np.ndarray) -> bool:
    """Whether neighbours differ by so much, in many enough values, that the eye needs a mean."""
    finite = values[np.isfinite(values)]
    return len(finite) >= 20 and np.median(np.abs(np.diff(finite))) > 0.03 * np.ptp(finite)


def running_mean(values: np.ndarray, width: int) -> np.ndarray:
    """Mean over the `width` (odd) values around each one, fewer at the ends; NaN is left out, and stays NaN."""
    known = np.isfinite(values)
    assert width % 2 == 1 and width <= len(values), (width, len(values))
    window = np.ones(width)
    total = np.convolve(np.where(known, values, 0.0), window, mode="same")
    count = np.convolve(known.astype(np.float64), window, mode="same")
    return np.where(known, total / np.maximum(count, 1.0), np.nan)
