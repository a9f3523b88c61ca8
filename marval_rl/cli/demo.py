"""`marval-rl demo`: teacher, one-step student, RL with both gradients, evaluation and report, on real digits."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

from PIL import Image, ImageDraw

COLUMNS = {  # measure -> head of its column
    "frechet_distance": "FD",
    "held_out_classifier/accuracy": "accuracy",
    "held_out_classifier/log_probability": "log-prob",
    "held_out_classifier/confidence": "confidence",
    "diversity": "diversity",
    "mode_coverage": "coverage",
    "images_per_second": "images/s",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output_dir", type=Path, default=Path("runs/demo"), help="default: runs/demo")
    default = Path("recipes/digits")  # of this folder, or else of those that ship
    parser.add_argument("--recipes", type=Path, default=default, metavar="DIR", help=f"default: {default}")
    parser.add_argument("--quick", action="store_true", help="a few steps of each, to check that it runs")


def run(args: argparse.Namespace, extra: list[str]) -> None:
    """Runs all stages, prints a table, and says where the report is."""
    start = time.monotonic()
    recipes = args.recipes
    runs = {name: args.output_dir / name for name in ("teacher", "distill", "grpo", "reward_backprop")}
    sources = {
        "teacher": [],
        "distill": ["--teacher", runs["teacher"]],
        "grpo": ["--model", runs["distill"], "--teacher", runs["teacher"]],
        "reward_backprop": ["--model", runs["distill"], "--teacher", runs["teacher"]],
    }
    commands = {"teacher": "pretrain", "distill": "distill", "grpo": "train", "reward_backprop": "train"}
    for name, command in commands.items():
        print(f"\n== {command} {recipes / name}.yaml ({minutes(start)})", flush=True)
        overrides = [*sources[name], "--output_dir", runs[name], "--overwrite_output_dir", "true"]
        call(command, recipes / f"{name}.yaml", *overrides, *(quick_overrides(name) if args.quick else []))

    print(f"\n== evaluate ({minutes(start)})", flush=True)
    count = "40" if args.quick else "1000"
    guided = ["--guidance_scale", "1.2", "--diffusion_steps", "4" if args.quick else "100"]
    evaluations = {
        "teacher, K=16": (runs["teacher"], ["--steps", "16", *guided]),
        "student, K=16": (runs["distill"], ["--steps", "16"]),
        "student, K=4": (runs["distill"], ["--steps", "4"]),
        "+ GRPO, K=4": (runs["grpo"], ["--steps", "4"]),
        "+ back-propagation, K=4": (runs["reward_backprop"], ["--steps", "4"]),
    }
    rows = {}
    for title, (run_folder, options) in evaluations.items():
        output = run_folder / "evaluation.json"
        call("evaluate", run_folder, *options, "--num_images", count, "--output", output, silent=True)
        rows[title] = json.loads(output.read_text())
    grids = {}
    for title, (run_folder, options) in evaluations.items():
        if title == "student, K=16":
            continue  # its run folder's grid shows the start of RL
        grids[title] = args.output_dir / f"{run_folder.name}.png"
        call("sample", run_folder, *options, "--per_class", "10", "--plain", "--output", grids[title], silent=True)
    picture = save_picture(grids, args.output_dir / "demo.png")

    print_table(rows)
    print("\nspeed:")
    quick_bench = ["--diffusion_steps", "4", "--repeats", "1", "--batch_sizes", "1", "8"]
    call("bench", runs["teacher"], runs["distill"], *(quick_bench if args.quick else []))
    report = args.output_dir / "report.html"
    call("report", runs["grpo"], runs["reward_backprop"], "--output", report, silent=True)
    print(f"\nreport:  {report}\npicture: {picture}\ntime:    {minutes(start)}")


def call(command: str, *arguments: object, silent: bool = False) -> None:
    """Runs another command in this process; its errors pass through."""
    import contextlib
    import io

    from marval_rl.cli.main import run_command

    with contextlib.redirect_stdout(io.StringIO()) if silent else contextlib.nullcontext():
        run_command([command, *map(str, arguments)])


def quick_overrides(name: str) -> list[str]:
    """Settings under which a recipe ends in seconds."""
    settings = {"max_steps": 8, "eval_steps": 8, "eval_num_images": 40, "logging_steps": 2, "save_steps": 8}
    settings |= {"per_device_train_batch_size": 24, "warmup_steps": 0, "lr_scheduler_type": "constant"}
    settings |= {"eval_diffusion_steps": 4} if name == "teacher" else {"auxiliary_warmup_steps": 4}
    return [part for key, value in settings.items() for part in (f"--{key}", str(value))] + [
        "--lr_scheduler_kwargs",
        "{}",
    ]


def print_table(rows: dict[str, dict[str, float]]) -> None:
    """Prints the figures, one line per model, below the distance of real images from each other."""
    width = max(map(len, rows))
    floor = next(iter(rows.values()))["frechet_floor"]
    print(f"\n{'':{width}s}" + "".join(f"{head:>12s}" for head in COLUMNS.values()))
    print(f"{'real images':{width}s}{floor:12.2f}")
    for title, row in rows.items():
        figures = [f"{row[name]:12.3f}" if row[name] is not None else f"{'-':>12s}" for name in COLUMNS]
        print(f"{title:{width}s}" + "".join(figures))
    print("FD: Frechet distance. accuracy, log-prob, confidence: of a held-out classifier. K: unmasking steps.")


def save_picture(grids: dict[str, Path], path: Path) -> Path:
    """The sample grids below each other, each with its title."""
    images = {title: Image.open(grid).convert("RGB") for title, grid in grids.items()}
    gap, head = 16, 26
    width = max(image.width for image in images.values()) + 2 * gap
    height = sum(image.height + head + gap for image in images.values())
    picture = Image.new("RGB", (width, height), "white")
    draw, y = ImageDraw.Draw(picture), 0
    for title, image in images.items():
        draw.text((gap, y + 5), title, fill="black", font_size=15)
        picture.paste(image, (gap, y + head))
        y += image.height + head + gap
    picture.save(path)
    return path


def minutes(start: float) -> str:
    seconds = int(time.monotonic() - start)
    return f"{seconds // 60} min {seconds % 60:02d} s"
