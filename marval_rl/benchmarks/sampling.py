"""Teacher, student and the official sampler in turn; how close they come to the machine; how they grow."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from marval_rl.benchmarks.plain_sampler import sample_plainly
from marval_rl.benchmarks.timing import Times, in_turn
from marval_rl.models import MARConfig, MARModel, MaskedModel, generate
from marval_rl.models.generation import balanced_labels

Row = dict[str, Any]


@dataclass(frozen=True)
class Settings:
    """What is sampled.

    Attributes:
        num_unmasking_steps: K.
        guidance_scale: Of the teacher.
        num_diffusion_steps: Of the teacher.
        dtype: Autocast to it; None for the networks' own.
        repeats: Timed runs of each.
    """

    num_unmasking_steps: int
    guidance_scale: float
    num_diffusion_steps: int
    dtype: torch.dtype | None
    repeats: int


def compare_students(one: MaskedModel, other: MaskedModel, settings: Settings, batch_size: int) -> float:
    """How many times as fast the one generates as the other."""
    labels = balanced_labels(batch_size, one.config.num_classes).to(one.device)
    shared: dict[str, Any] = {
        "num_unmasking_steps": settings.num_unmasking_steps,
        "autocast_dtype": settings.dtype,
    }
    functions = {name: partial(generate, model, labels, **shared) for name, model in (("one", one), ("other", other))}
    times = in_turn(functions, settings.repeats, one.device)
    return times["other"].median / times["one"].median


def compare(
    teacher: MaskedModel, student: MaskedModel, settings: Settings, batch_size: int, with_baseline: bool
) -> Row:
    """Seconds to generate a batch by the student, the teacher and, with_baseline, the teacher as the official code
    samples it; their spreads, and the ratios of the medians."""
    device = teacher.device
    labels = balanced_labels(batch_size, teacher.config.num_classes).to(device)
    of_teacher: dict[str, Any] = {
        "num_unmasking_steps": settings.num_unmasking_steps,
        "guidance_scale": settings.guidance_scale,
        "num_diffusion_steps": settings.num_diffusion_steps,
    }
    functions: dict[str, Callable[[], object]] = {
        "teacher": partial(generate, teacher, labels, **of_teacher),
        "student": partial(generate, student, labels, num_unmasking_steps=settings.num_unmasking_steps),
    }
    if with_baseline:
        assert isinstance(teacher, MARModel)
        functions["baseline"] = partial(sample_plainly, teacher, labels, **of_teacher)
    with torch.autocast(device.type, settings.dtype, enabled=settings.dtype is not None):
        times = in_turn(functions, settings.repeats, device)
    row: Row = {"batch_size": batch_size}
    for name, taken in times.items():
        row |= {f"{name}_seconds": taken.median, f"{name}_spread": taken.spread}
    row["speedup"] = times["teacher"].median / times["student"].median
    if with_baseline:
        row["teacher_over_baseline"] = times["baseline"].median / times["teacher"].median
        row["student_over_baseline"] = times["baseline"].median / times["student"].median
    return row


def efficiency(student: MaskedModel, settings: Settings, row: Row, rate: float, bytes_per_second: float) -> Row:
    """How close the student came to the machine: row is `compare`'s.

    Args:
        rate: Floating-point operations per second of a matrix product in the student's precision.
        bytes_per_second: Of a copy.

    Returns:
        `flops_share`, of that rate, and `read_share`: the time that reading all weights in each unmasking step takes,
        over the time taken. What is near 1 is the limit.
    """
    labels = balanced_labels(row["batch_size"], student.config.num_classes).to(student.device)
    counter = FlopCounterMode(display=False)
    with counter:
        generate(student, labels, num_unmasking_steps=settings.num_unmasking_steps)
    width = 2 if settings.dtype is not None else 4
    steps = min(settings.num_unmasking_steps, student.config.num_tokens)
    read = steps * width * sum(parameter.numel() for parameter in student.parameters())
    seconds = row["student_seconds"]
    return {
        "flops": counter.get_total_flops(),
        "flops_share": counter.get_total_flops() / rate / seconds,
        "read_bytes": read,
        "read_share": read / bytes_per_second / seconds,
    }


def growth(student: MaskedModel, settings: Settings, batch_sizes: list[int]) -> list[Row]:
    """The student's seconds by the unmasking steps K, the number of tokens L, and the batch, one changed at a time.

    Raises:
        ValueError: For a model that is not a MAR: its number of tokens is its tokenizer's.
    """
    if not isinstance(student, MARModel):
        raise ValueError("--growth also changes the number of tokens, which only a MAR has of any number: leave it out")
    config, steps, batch = student.config, settings.num_unmasking_steps, batch_sizes[0]
    wider = config.to_dict() | {"image_size": [2 * length for length in config.image_shape[1:]]}
    larger = MARModel(MARConfig.from_dict(wider)).to(student.device).eval()
    cases = [(student, max(1, steps // 2), batch), (student, steps, batch), (student, 2 * steps, batch)]
    cases += [(larger, steps, batch), *((student, steps, size) for size in (2 * batch, 4 * batch))]
    functions = {}
    for number, (model, count, size) in enumerate(cases):
        labels = balanced_labels(size, config.num_classes).to(student.device)
        functions[str(number)] = partial(generate, model, labels, num_unmasking_steps=count)
    with torch.autocast(student.device.type, settings.dtype, enabled=settings.dtype is not None):
        times: dict[str, Times] = in_turn(functions, settings.repeats, student.device)
    return [
        {"steps": count, "tokens": model.config.num_tokens, "batch_size": size, "seconds": times[str(number)].median}
        for number, (model, count, size) in enumerate(cases)
    ]
