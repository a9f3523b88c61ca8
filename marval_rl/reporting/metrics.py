"""Reading metrics.jsonl: one JSON object a line, each with an integer "step"."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np


def read_metrics(path: Path | str) -> list[dict]:
    """Read the lines of a metrics.jsonl in their order; [] for an empty file.

    A last line that is no JSON was torn by a killed process and is left out. Raises ValueError, with the line number,
    for any other unreadable line and for a line without an integer "step".
    """
    path = Path(path)
    numbered = [
        (number, line)
        for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").split("\n"), start=1)
        if line.strip()
    ]
    lines = []
    for number, text in numbered:
        try:
            line = json.loads(text)
        except json.JSONDecodeError as error:
            if number == numbered[-1][0]:
                break
            raise ValueError(f"{path}, line {number} is no JSON ({error.msg}): mend or remove that line") from error
        if not isinstance(line, dict) or type(line.get("step")) is not int:
            raise ValueError(f'{path}, line {number} has no integer "step": {text[:80]!r}; mend or remove that line')
        lines.append(line)
    return lines


def series(lines: list[dict], key: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps [N] (int, increasing) and values [N] (float64) of one metric; null and absent values are left out.

    A resumed run logs the steps after its checkpoint a second time: the later line wins, since its weights live on.
    """
    values = {line["step"]: line[key] for line in lines if is_number(line.get(key))}
    steps = sorted(values)
    return np.array(steps, dtype=np.int64), np.array([values[step] for step in steps], dtype=np.float64)


def metric_keys(lines: list[dict]) -> list[str]:
    """Every key that holds a number somewhere, in order of first appearance."""
    return list(dict.fromkeys(key for line in lines for key, value in line.items() if is_number(value)))


def is_number(value: object) -> bool:
    """Whether a JSON value is a number (true and false are not; NaN and the infinities are)."""
    return isinstance(value, int | float) and not isinstance(value, bool)
