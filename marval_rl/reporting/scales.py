"""Axes, their ticks, and numbers as text."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

LOG_RATIO = 30.0  # positive values that span more than this get a logarithmic axis


@dataclass(frozen=True)
class Axis:
    """A linear or logarithmic axis from `low` to `high` with a few round ticks."""

    low: float
    high: float
    ticks: tuple[float, ...]
    log: bool = False

    def at(self, values: np.ndarray | float) -> np.ndarray:
        """Positions along the axis: 0 at `low`, 1 at `high`; NaN stays NaN."""
        if self.log:
            return np.log(np.asarray(values) / self.low) / math.log(self.high / self.low)
        return (np.asarray(values, dtype=np.float64) - self.low) / (self.high - self.low)

    def labels(self) -> list[str]:
        """The ticks as text, with as many digits as it takes to tell them apart."""
        off_by = 1e-3 * (self.high - self.low)
        digits = 3
        while digits < 9 and any(abs(float(f"{tick:.{digits}g}") - tick) > off_by for tick in self.ticks):
            digits += 1
        return [format_number(tick, digits) for tick in self.ticks]


def axis_for(values: np.ndarray, may_be_log: bool) -> Axis:
    """An axis that holds all finite `values` (at least one) with a little air; logarithmic where they span decades."""
    finite = np.asarray(values, dtype=np.float64)
    finite = finite[np.isfinite(finite)]
    low, high = float(finite.min()), float(finite.max())
    if may_be_log and low > 0 and high / low > LOG_RATIO:
        low, high = low / 1.15, high * 1.15
        return Axis(low, high, _log_ticks(low, high), log=True)
    is_flat = high - low <= 1e-9 * max(abs(low), abs(high))
    air = 0.06 * (high - low) if not is_flat else 0.5 * abs(high) or 0.5
    # Air below zero would suggest that a fraction or a loss can be negative.
    bottom = 0.0 if 0 <= low < air else low - air
    top = 0.0 if low < 0 and -air < high <= 0 else high + air
    return Axis(bottom, top, round_ticks(bottom, top))


def round_ticks(low: float, high: float, at_most: int = 5) -> tuple[float, ...]:
    """At most `at_most` multiples of 1, 2, 2.5 or 5 times a power of ten, inside [low, high]."""
    power = 10.0 ** math.floor(math.log10((high - low) / at_most))
    for factor in (1, 2, 2.5, 5, 10, 20):
        step = factor * power
        first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
        if last - first < at_most:
            break
    return tuple(index * step for index in range(first, last + 1))


def _log_ticks(low: float, high: float) -> tuple[float, ...]:
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = [factor * 10.0**power for power in powers for factor in (1, 3) if low <= factor * 10.0**power <= high]
    return tuple(ticks[:: math.ceil(len(ticks) / 5)])


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
