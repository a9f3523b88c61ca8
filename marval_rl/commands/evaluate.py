"""`marval-rl evaluate`: quality, diversity, judges and speed of a model, as evaluation.json."""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import torch

from marval_rl.commands.model_arguments import add_sampling_arguments, load_for_sampling, sampling_settings
from marval_rl.commands.sources import DataArguments
from marval_rl.trainers.sampling import generate_images


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_sampling_arguments(parser)
    parser.add_argument("--num_images", type=int, default=1000, help="images to generate (default: 1000)")
    parser.add_argument("--redraws", type=int, default=1, help="draws, seeds from --seed on; gives mean and std")
    parser.add_argument("--dataset", default="digits", help="real images to compare with (default: digits)")
    parser.add_argument("--labelling", help="its classes (default: the one that fits the model's class names)")
    parser.add_argument("--output", type=Path, metavar="FILE", help="default: evaluation.json beside the model")


def run(args: argparse.Namespace, extra: list[str]) -> None:
    """Writes evaluation.json and prints it as a table."""
    if args.redraws < 1:
        raise ValueError(f"--redraws must be at least 1, not {args.redraws}")
    model, codec, device = load_for_sampling(args)
    labelling = args.labelling or ("parity" if model.config.num_classes == 2 else "digit")
    data = DataArguments(dataset=args.dataset, labelling=labelling)
    data.check_classes(model.config, args.model)
    settings = sampling_settings(args)
    evaluator = data.evaluator()
    draws, seconds = [], 0.0
    for seed in range(args.seed, args.seed + args.redraws):
        start = time.perf_counter()
        images, labels = generate_images(
            model,
            codec,
            args.num_images,
            settings,
            seed=seed,
            batch_size=args.batch_size,
            device=device,
            progress=args.progress,
        )
        seconds += time.perf_counter() - start
        draws.append(evaluator.evaluate(images, labels))
    means, deviations = mean_and_std(draws)
    results = {
        **means,
        "images_per_second": round(args.num_images * args.redraws / seconds, 2),
        "std": deviations,
        "settings": {
            **vars(settings),
            "num_images": args.num_images,
            "redraws": args.redraws,
            "batch_size": args.batch_size,
            "dataset": args.dataset,
            "labelling": labelling,
            "device": str(device),
            "threads": torch.get_num_threads(),
        },
        "seed": args.seed,
        "model": args.model,
    }
    output = args.output or default_output(Path(args.model))
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(results, indent=2) + "\n")
    for name, value in results.items():
        if isinstance(value, float):
            spread = f" +- {deviations[name]:.4f}" if name in deviations else ""
            print(f"{name:36s} {value:10.4f}{spread}")
    print(f"evaluation: {output}")


def mean_and_std(draws: list[dict[str, float | None]]) -> tuple[dict[str, float | None], dict[str, float]]:
    """Each measure's mean over the draws, and its standard deviation where there are several."""
    means = {name: None if draws[0][name] is None else statistics.mean(d[name] for d in draws) for name in draws[0]}
    if len(draws) == 1:
        return means, {}
    return means, {name: statistics.stdev(d[name] for d in draws) for name, mean in means.items() if mean is not None}


def default_output(model: Path) -> Path:
    """evaluation.json in the run folder, or in the model's own; here for a model from the hub."""
    folder = model.parent if model.name == "final" else model
    return (folder if folder.is_dir() else Path()) / "evaluation.json"
