"""`marval-rl demo`: teacher, one-step student, RL without and with the distribution anchor, on real digits."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

from PIL import Image

RECIPES, QUICK_RECIPES = Path("recipes/mnist"), Path("recipes/digits")  # of this folder, or else of those that ship
STEPS = 4  # unmasking steps of the student
STEPS_ALONE = "60"  # of RL without the anchor: by then all images of a class are alike
FIGURES = {  # measure -> its name in the table, and the figure of real images: another measure, or a number
    "frechet_distance": ("Frechet distance", "frechet_floor"),
    "frechet_distance/pixels": ("the same, pixels", "frechet_floor/pixels"),
    "held_out_classifier/accuracy": ("accuracy", "held_out_classifier/real_accuracy"),
    "held_out_classifier/log_probability": ("log-probability", "held_out_classifier/real_log_probability"),
    "diversity": ("diversity", 1.0),
    "recall/pixels": ("recall, pixels", None),
    "mode_coverage": ("coverage", 1.0),
    "image/edge_energy/vs_real": ("edges, of real", 1.0),
    "images_per_second": ("images per second", None),
}
EXPLANATION = """\
Frechet distance: of {num_images} images to held-out ones, in a classifier's features and in pixels; lower is better. \
accuracy,
log-probability: of a classifier that RL never saw. recall: share of real images near a generated one. diversity,
coverage, edges: 1 is as in real images. K: unmasking steps. RL's effect: RL + distribution against the student."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output_dir", type=Path, default=Path("runs/demo"), help="default: runs/demo")
    parser.add_argument(
        "--recipes", type=Path, metavar="DIR", help=f"default: {RECIPES}, which needs mlxtend; quick: {QUICK_RECIPES}"
    )
    parser.add_argument("--quick", action="store_true", help="a few steps of each, to check that it runs")


def run(args: argparse.Namespace, extra: list[str]) -> None:
    """Runs all stages, prints a table, and says where picture and report are."""
    from marval_rl.cli.sample import labelled  # imports torch

    start = time.monotonic()
    recipes = args.recipes or (QUICK_RECIPES if args.quick else RECIPES)
    teacher, student, rl_alone, rl = (args.output_dir / name for name in ("teacher", "distill", "rl_alone", "rl"))
    unmeasured = ["--eval_strategy", "no"]  # the last stage looks at all models
    alone = ["--distribution_weight", "0", "--max_steps", STEPS_ALONE]
    stages: list[tuple[str, str, Path, list[Any], list[Any]]] = [
        ("pretrain", "teacher", teacher, [], unmeasured),
        ("distill", "distill", student, ["--teacher", teacher], unmeasured),
        ("train", "reward_backprop", rl_alone, ["--model", student], alone),
        ("train", "reward_backprop", rl, ["--model", student], []),
    ]
    for command, recipe, run_folder, begins_with, settings in stages:
        print(f"\n== {command} {recipes / recipe}.yaml {' '.join(settings)} ({minutes(start)})", flush=True)
        options = [*begins_with, "--output_dir", run_folder, "--overwrite_output_dir", "true"]
        options += [*settings, *(quick_settings(recipe) if args.quick else [])]
        call(command, recipes / f"{recipe}.yaml", *options)

    print(f"\n== evaluate ({minutes(start)})", flush=True)
    guided: list[Any] = ["--steps", "16", "--guidance_scale", "1.2", "--diffusion_steps", "4" if args.quick else "25"]
    few: list[Any] = ["--steps", STEPS]
    models: dict[str, tuple[Path, list[Any], int]] = {
        "teacher, K=16": (teacher, guided, 1),
        f"student, K={STEPS}": (student, few, 4),
        "RL alone": (rl_alone, few, 4),
        "RL + distribution": (rl, few, 4),
    }
    evaluations: dict[str, Any] = {}
    grids = {"real images": args.output_dir / "real.png"}
    for title, (run_folder, options, redraws) in models.items():
        measured, grids[title] = run_folder / "evaluation.json", args.output_dir / f"{run_folder.name}.png"
        count = ["--num_images", "40" if args.quick else "1000", "--redraws", redraws, "--seed", "100"]
        call("evaluate", run_folder, *options, *count, "--output", measured, silent=True)
        call("sample", run_folder, *options, "--per_class", "6", "--plain", "--output", grids[title], silent=True)
        evaluations[title] = json.loads(measured.read_text())
    names = save_real_images(student, grids["real images"])
    picture = args.output_dir / "demo.png"
    labelled({title: Image.open(grid).convert("RGB") for title, grid in grids.items()}, names).save(picture)

    print_table(evaluations, before=f"student, K={STEPS}", after="RL + distribution")
    print("\nspeed:")
    quick_bench = ["--diffusion_steps", "4", "--repeats", "1", "--batch_sizes", "1", "8"]
    call("bench", teacher, student, *(quick_bench if args.quick else []))
    report = args.output_dir / "report.html"
    call("report", rl_alone, rl, "--output", report, silent=True)
    print(f"\nreport:  {report}\npicture: {picture}\ntime:    {minutes(start)}")


def call(command: str, *arguments: object, silent: bool = False) -> None:
    """Runs another command in this process; its errors pass through."""
    import contextlib
    import io

    from marval_rl.cli.main import run_command

    with contextlib.redirect_stdout(io.StringIO()) if silent else contextlib.nullcontext():
        run_command([command, *map(str, arguments)])


def quick_settings(recipe: str) -> list[str]:
    """Settings that make a recipe short."""
    settings: dict[str, Any] = {"max_steps": 8, "logging_steps": 2, "save_steps": 8}
    settings |= {"per_device_train_batch_size": 24, "warmup_steps": 0, "lr_scheduler_type": "constant"}
    settings |= {"distill": {"auxiliary_warmup_steps": 4}}.get(recipe, {})
    settings |= {"reward_backprop": {"eval_steps": 8, "eval_num_images": 40}}.get(recipe, {})
    words = [part for key, value in settings.items() for part in (f"--{key}", str(value))]
    return [*words, "--lr_scheduler_kwargs", "{}"]


def save_real_images(run_folder: Path, path: Path) -> list[str]:
    """A grid of real images, held-out ones if there are any, of the data of a run; returns the names of its rows."""
    import torch
    import yaml

    from marval_rl.models.checkpoints import load_config
    from marval_rl.models.generation import save_image_grid
    from marval_rl.recipes.data_arguments import DataArguments

    recipe = yaml.safe_load((run_folder / "recipe.yaml").read_text())
    said = DataArguments(**{key: recipe[key] for key in ("dataset", "class_groups", "eval_dataset") if key in recipe})
    held_out = said.load_held_out()
    images = said.load_images() if held_out is None else held_out
    data = said.crop(images, load_config(run_folder)).in_memory()
    mixed = torch.randperm(len(data), generator=torch.Generator().manual_seed(0))  # of all modes of a class
    save_image_grid(data.images[mixed], data.class_labels[mixed], path, columns=6, min_height=64)
    return data.class_names


def print_table(evaluations: dict[str, dict[str, Any]], before: str, after: str) -> None:
    """Prints a line per figure: each model's, that of real images, and what RL did to it from `before` to `after`.

    More than two deviations over redraws count as a change.
    """
    print("\n" + " " * 17 + "".join(f"{title:>19s}" for title in [*evaluations, "real images"]) + "   RL's effect")
    for measure, (name, real) in FIGURES.items():
        values = [found[measure] for found in evaluations.values()]
        values.append(evaluations[after][real] if isinstance(real, str) else real)
        columns = "".join(f"{value:19.3f}" if value is not None else f"{'-':>19s}" for value in values)
        one, other = evaluations[before][measure], evaluations[after][measure]
        std = evaluations[before]["std"].get(measure)
        effect = ""
        if None not in (one, other, std):
            effect = "stayed" if abs(other - one) <= 2 * std else ("rose" if other > one else "fell")
        print(f"{name:17s}{columns}   {effect}")
    print(EXPLANATION.format(num_images=evaluations[after]["settings"]["num_images"]))


def minutes(start: float) -> str:
    seconds = int(time.monotonic() - start)
    return f"{seconds // 60} min {seconds % 60:02d} s"
