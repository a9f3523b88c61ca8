"""`marval-rl bench`: ratios of sampling times, measured in turn in one process, and shares of the machine's best."""

from __future__ import annotations

import argparse
import copy
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from marval_rl.benchmarks.sampling import Settings, compare, compare_students, efficiency, growth
from marval_rl.benchmarks.timing import bandwidth, matrix_rate
from marval_rl.benchmarks.training import throughput, trainer_steps
from marval_rl.cli.arguments import add_device_arguments, autocast_dtype, chosen_device, quiet_libraries
from marval_rl.errors import check_output
from marval_rl.models import MARModel, MaskedConfig, MaskedModel
from marval_rl.models.checkpoints import load_model, new_model
from marval_rl.models.compiling import CapturedGenerations, compile_blocks
from marval_rl.paths import path_or_id
from marval_rl.recipes.network_arguments import PUBLISHED_SIZES, ModelArguments
from marval_rl.recipes.values import read_list
from marval_rl.trainers.distill import student_from_teacher

# Widths and depths of the demo's recipes, MAR's dropout; latents that are the pixels of grey digits.
_PIXELS = {"image_channels": 1, "latent_stride": 1, "latent_channels": 1, "num_classes": 10, "clip_sample_range": 1.0}
SIZES: dict[str, Callable[[], MaskedConfig]] = {
    "digits": lambda: ModelArguments(dropout=0.1).config({"image_size": 8, **_PIXELS}),
    "mnist": lambda: ModelArguments(patch_size=7, head_hidden_size=256, dropout=0.1).config(
        {"image_size": 28, **_PIXELS}
    ),
    **PUBLISHED_SIZES,
}
SHOWN_SHARE = 0.005  # of a phase, in the tables


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "teacher", type=path_or_id, nargs="?", metavar="TEACHER", help="model folder, run folder or hub id"
    )
    parser.add_argument(
        "student", type=path_or_id, nargs="?", metavar="STUDENT", help="the one-step student to compare with it"
    )
    parser.add_argument(
        "--model_size",
        choices=SIZES,
        help="instead of TEACHER and STUDENT: a model of this size with random weights, as fast as trained ones",
    )
    parser.add_argument("--steps", type=int, default=16, metavar="K", help="unmasking steps of both (default: 16)")
    parser.add_argument("--guidance_scale", type=float, default=1.2, help="of the teacher (default: 1.2)")
    parser.add_argument("--diffusion_steps", type=int, default=100, metavar="N", help="of the teacher (default: 100)")
    parser.add_argument("--batch_sizes", nargs="+", default=["1", "64"], metavar="B", help="default: 1 64")
    parser.add_argument("--repeats", type=int, default=5, help="timed runs; the median counts (default: 5)")
    parser.add_argument("--no_baseline", action="store_true", help="leave out the official sampler, which is slow")
    parser.add_argument("--growth", action="store_true", help="also the student's time by K, tokens and batch")
    parser.add_argument(
        "--compile",
        action="store_true",
        help="also the student with its blocks compiled, and on a GPU as a CUDA graph",
    )
    parser.add_argument(
        "--trainers",
        action="store_true",
        help="also a step of each trainer and its phases, of the last of --batch_sizes",
    )
    parser.add_argument(
        "--throughput", action="store_true", help="also how fast images are measured, and encoded by a VAE for a cache"
    )
    add_device_arguments(parser)
    parser.add_argument("--json", action="store_true", help="print the figures as JSON in place of tables")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the figures as JSON too")


def run(args: argparse.Namespace, extra: list[str]) -> None:
    """Prints tables or JSON, and writes JSON where --output says."""
    quiet_libraries()
    if args.output is not None:
        check_output(args.output)
    device, dtype = chosen_device(args), autocast_dtype(args)
    teacher, student = (model.to(device) for model in models(args))
    settings = Settings(args.steps, args.guidance_scale, args.diffusion_steps, dtype, args.repeats)
    sizes = read_list("--batch_sizes", args.batch_sizes, list[int])
    with_baseline = isinstance(teacher, MARModel) and not args.no_baseline  # the official sampler of MAR
    figures = measure(teacher, student, settings, sizes, with_baseline)
    if args.growth:
        figures["growth"] = growth(student, settings, sizes)
    if args.trainers:
        figures["trainers"] = trainer_steps(teacher, student, args.steps, sizes[-1], args.repeats, dtype is not None)
    if args.throughput:
        figures["throughput"] = throughput(student, sizes[-1], args.repeats)
    if args.compile:
        compiled = copy.deepcopy(student)
        compile_blocks(compiled)
        for row in figures["sampling"]:
            row["compiled_speedup"] = compare_students(compiled, student, settings, row["batch_size"])
        if device.type == "cuda":
            compiled.captured = CapturedGenerations(compiled)
            for row in figures["sampling"]:
                row["captured_speedup"] = compare_students(compiled, student, settings, row["batch_size"])
    figures = {"machine": machine(device, args.dtype), "settings": described(args), **figures}
    if args.json:
        json.dump(figures, sys.stdout, indent=2)
        print()
    else:
        print("\n".join(tables(figures)))
    if args.output is not None:
        args.output.write_text(json.dumps(figures, indent=2) + "\n")


def models(args: argparse.Namespace) -> tuple[MaskedModel, MaskedModel]:
    """Teacher and student, loaded or of a size with random weights. Raises ValueError if neither is given."""
    given = (args.teacher, args.student)
    if args.model_size is not None and given == (None, None):
        torch.manual_seed(0)
        teacher = new_model(SIZES[args.model_size]()).eval()
        teacher.set_blank_conditions()
        return teacher, student_from_teacher(teacher, student_timestep=700).eval()
    if args.model_size is not None or None in given:
        raise ValueError(f"give TEACHER and STUDENT, or --model_size {', '.join([*SIZES][:-1])} or {[*SIZES][-1]}")
    teacher, student = load_model(args.teacher, one_step=False), load_model(args.student, one_step=True)
    teacher.set_blank_conditions()
    student.share_conditions(teacher)
    return teacher, student


def measure(
    teacher: MaskedModel, student: MaskedModel, settings: Settings, batch_sizes: list[int], with_baseline: bool
) -> dict[str, Any]:
    """The rows of "sampling", and the machine's own rates, measured in the same run."""
    device = teacher.device
    rate, speed = matrix_rate(device, settings.dtype or torch.float32), bandwidth(device)
    rows = []
    for batch_size in batch_sizes:
        row = compare(teacher, student, settings, batch_size, with_baseline)
        rows.append({**row, **efficiency(student, settings, row, rate, speed)})
    return {"matrix_rate": rate, "bandwidth": speed, "sampling": rows}


def machine(device: torch.device, dtype: str) -> dict[str, Any]:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
    return {"device": name, "threads": torch.get_num_threads(), "dtype": dtype, "torch": torch.__version__}


def described(args: argparse.Namespace) -> dict[str, Any]:
    names = ("model_size", "steps", "guidance_scale", "diffusion_steps", "repeats")
    models = {"teacher": args.teacher, "student": args.student} if args.model_size is None else {}
    return {**{name: vars(args)[name] for name in names}, **{name: str(path) for name, path in models.items()}}


def tables(figures: dict[str, Any]) -> list[str]:
    """Lines for people."""
    settings, on = figures["settings"], figures["machine"]
    threads = f", {on['threads']} threads" if on["device"] == "cpu" else ""
    lines = [
        f"K = {settings['steps']}, teacher with {settings['diffusion_steps']} guided diffusion steps, {on['dtype']}, "
        f"latents only, {on['device']}{threads}, torch {on['torch']}",
        f"a matrix product: {figures['matrix_rate'] / 1e9:.0f} GFLOP/s; a copy: {figures['bandwidth'] / 1e9:.1f} GB/s",
        f"median of {settings['repeats']} runs in turn, +- half the spread",
    ]
    for row in figures["sampling"]:
        parts = [f"batch {row['batch_size']:4d}:"]
        for name in ("baseline", "teacher", "student"):
            if f"{name}_seconds" in row:
                parts.append(f"{name} {row[f'{name}_seconds']:.4f} s +-{50 * row[f'{name}_spread']:.0f}%,")
        lines.append(" ".join(parts))
        ratios = [f"student {row['speedup']:.1f} times as fast as the teacher"]
        if "teacher_over_baseline" in row:
            ratios += [f"{row['student_over_baseline']:.1f} times as the official sampler"]
            ratios += [f"teacher {row['teacher_over_baseline']:.2f} times as the official sampler"]
        if "compiled_speedup" in row:
            ratios.append(f"compiled student {row['compiled_speedup']:.2f} times as eager")
        if "captured_speedup" in row:
            ratios.append(f"and captured as a CUDA graph {row['captured_speedup']:.2f} times")
        lines.append("            " + ", ".join(ratios))
        lines.append(
            f"            student at {100 * row['flops_share']:.0f}% of the matrix rate; reading its weights takes "
            f"{100 * row['read_share']:.0f}% of its time"
        )
    for row in figures.get("growth", []):
        lines.append(
            f"student, K {row['steps']:3d}, {row['tokens']:4d} tokens, batch {row['batch_size']:4d}: "
            f"{row['seconds']:.4f} s"
        )
    for row in figures.get("trainers", []):
        parts = [f"{name} {100 * share:.0f}%" for name, share in row["shares"].items() if share >= SHOWN_SHARE]
        lines.append(
            f"{row['trainer']}, batch {row['batch_size']}: {row['seconds']:.4f} s an update: {', '.join(parts)}"
        )
    for row in figures.get("throughput", []):
        lines.append(f"{row['what']}, batch {row['batch_size']}: {row['images_per_second']:.1f} images/s")
    return lines
