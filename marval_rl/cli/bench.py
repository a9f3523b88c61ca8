"""`marval-rl bench`: how much faster a student generates than its teacher, as ratios measured in one process."""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import torch

from marval_rl.cli.arguments import add_device_arguments, autocast_dtype, chosen_device, quiet_libraries
from marval_rl.errors import check_output
from marval_rl.models import MaskedModel, generate
from marval_rl.models.checkpoints import load_model, new_model
from marval_rl.paths import path_or_id
from marval_rl.recipes.network_arguments import PUBLISHED_SIZES
from marval_rl.recipes.values import WrongType, convert, rejoin_list
from marval_rl.trainers.distill import student_from_teacher


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "teacher", type=path_or_id, nargs="?", metavar="TEACHER", help="model folder, run folder or hub id"
    )
    parser.add_argument(
        "student", type=path_or_id, nargs="?", metavar="STUDENT", help="the one-step student to compare with it"
    )
    parser.add_argument(
        "--model_size",
        choices=PUBLISHED_SIZES,
        help="instead of TEACHER and STUDENT: MAR-B, -L or -H with random weights, as fast as trained ones",
    )
    parser.add_argument("--steps", type=int, default=16, metavar="K", help="unmasking steps of both (default: 16)")
    parser.add_argument("--guidance_scale", type=float, default=1.2, help="of the teacher (default: 1.2)")
    parser.add_argument("--diffusion_steps", type=int, default=100, metavar="N", help="of the teacher (default: 100)")
    parser.add_argument("--batch_sizes", nargs="+", default=[1, 64], metavar="B", help="default: 1 64")
    parser.add_argument("--repeats", type=int, default=5, help="timed runs; the median counts (default: 5)")
    add_device_arguments(parser)
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the figures as JSON too")


def run(args: argparse.Namespace, extra: list[str]) -> None:
    """Prints a table, and writes it as JSON where --output says."""
    quiet_libraries()
    if args.output is not None:
        check_output(args.output)
    device = chosen_device(args)
    teacher, student = models(args)
    rows = compare(
        teacher.to(device),
        student.to(device),
        dtype=autocast_dtype(args),
        num_unmasking_steps=args.steps,
        guidance_scale=args.guidance_scale,
        num_diffusion_steps=args.diffusion_steps,
        batch_sizes=batch_sizes(args.batch_sizes),
        repeats=args.repeats,
    )
    threads = f", {torch.get_num_threads()} threads" if device.type == "cpu" else ""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
    print(
        f"K = {args.steps}, teacher with {args.diffusion_steps} guided diffusion steps, {args.dtype}, latents only, "
        f"{name}{threads}, torch {torch.__version__}"
    )
    for row in rows:
        print(
            f"batch {row['batch_size']:4d}: teacher {row['teacher_seconds']:8.4f} s, student "
            f"{row['student_seconds']:8.4f} s, {row['speedup']:6.1f} times as fast (median of {args.repeats})"
        )
    if args.output is not None:
        args.output.write_text(json.dumps(rows, indent=2) + "\n")


def batch_sizes(given: list) -> list[int]:
    """--batch_sizes 1 64, 1,64 or "[1, 64]". Raises ValueError."""
    try:
        return convert(rejoin_list(given) if isinstance(given[0], str) else given, list[int])
    except WrongType as expected:
        raise ValueError(f"--batch_sizes: expected {expected}, got {' '.join(given)!r}") from None


def models(args: argparse.Namespace) -> tuple[MaskedModel, MaskedModel]:
    """Teacher and student, loaded or of a published size with random weights. Raises ValueError if neither is given."""
    given = (args.teacher, args.student)
    if args.model_size is not None and given == (None, None):
        torch.manual_seed(0)
        teacher = new_model(PUBLISHED_SIZES[args.model_size]()).eval()
        teacher.set_blank_conditions()
        return teacher, student_from_teacher(teacher, student_timestep=700).eval()
    if args.model_size is not None or None in given:
        raise ValueError("give TEACHER and STUDENT, or --model_size base, large or huge")
    teacher, student = load_model(args.teacher, one_step=False), load_model(args.student, one_step=True)
    teacher.set_blank_conditions()
    student.share_conditions(teacher)
    return teacher, student


def compare(
    teacher: MaskedModel,
    student: MaskedModel,
    *,
    dtype: torch.dtype | None,
    num_unmasking_steps: int,
    guidance_scale: float,
    num_diffusion_steps: int,
    batch_sizes: list[int],
    repeats: int,
) -> list[dict[str, float]]:
    """Median seconds to generate a batch, teacher and student in turn after a warm-up of each, and their ratio."""
    rows = []
    for batch_size in batch_sizes:
        labels = torch.arange(batch_size, device=teacher.device) % teacher.config.num_classes

        def run_teacher(labels: torch.Tensor = labels) -> None:
            generate(
                teacher,
                labels,
                num_unmasking_steps=num_unmasking_steps,
                guidance_scale=guidance_scale,
                num_diffusion_steps=num_diffusion_steps,
            )

        def run_student(labels: torch.Tensor = labels) -> None:
            generate(student, labels, num_unmasking_steps=num_unmasking_steps)

        with torch.autocast(teacher.device.type, dtype, enabled=dtype is not None):
            run_teacher()
            run_student()
            # In turn, so that a slow phase of the machine affects both.
            pairs = [(_seconds(run_teacher), _seconds(run_student)) for _ in range(repeats)]
        slow, fast = (statistics.median(times) for times in zip(*pairs, strict=True))
        rows.append(
            {"batch_size": batch_size, "teacher_seconds": slow, "student_seconds": fast, "speedup": slow / fast}
        )
    return rows


def _seconds(function) -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start
