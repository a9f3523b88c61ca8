"""Reading metrics.jsonl: one JSON object per line, each with an integer "step"."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np


def read_metrics(path: Path | str) -> list[dict]:
    """Read the lines of a metrics.jsonl in their order; [] for an empty file.

    A last line that is not JSON was torn by a killed process and is left out.

    Raises:
        ValueError: For any other unreadable line and for a line without an integer "step"; it names the line.
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
            raise ValueError(f"{path}, line {number} is not JSON ({error.msg}): fix or remove that line") from error
        if not isinstance(line, dict) or type(line.get("step")) is not int:
            raise ValueError(f'{path}, line {number} has no integer "step": {text[:80]!r}; fix or remove that line')
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


def add_speed(lines: list[dict], images_per_step: int | None) -> None:
    """Add "seconds_per_step", and "images_per_second" where the batch is known, to each line of training, in place.

    The time between two lines is divided among their steps. A line of evaluation is written when evaluation ends, right
    after the training line of its step, so the time before it belongs to no step.
    """
    before = None
    for line in lines:
        if not is_number(line.get("time")):
            continue
        steps = line["step"] - before["step"] if before else 0
        seconds = line["time"] - before["time"] if before else 0.0
        if "loss" in line and steps > 0 and seconds > 0:
            line["seconds_per_step"] = seconds / steps
            if images_per_step:
                line["images_per_second"] = images_per_step * steps / seconds
        before = line


def time_spent(lines: list[dict]) -> dict[str, float]:
    """Seconds of a run: "total", and of it "evaluation" (until the evaluation's line, from the line before it).

    A first evaluation, before any training, counts from the start of the run.
    """
    evaluation, before = 0.0, 0.0
    timed = [line for line in lines if is_number(line.get("time"))]
    for line in timed:
        if any(key.startswith("eval_") for key in line) and "loss" not in line:
            evaluation += max(line["time"] - before, 0.0)
        before = line["time"]
    return {"total": max((line["time"] for line in timed), default=0.0), "evaluation": evaluation}
