"""`marval-rl evaluate` of a model of digits: Frechet distance, judges, diversity, mode coverage and speed."""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import torch

from marval_rl.cli.arguments import load_for_sampling, sampling_settings
from marval_rl.cli.evaluate import default_output, write_results
from marval_rl.errors import check_output
from marval_rl.evaluation.diversity import check_num_images
from marval_rl.models.generation import generate_images
from marval_rl.recipes.data_arguments import DataArguments


def evaluate_digits(args: argparse.Namespace) -> None:
    """Writes evaluation.json and prints it as a table."""
    if args.redraws < 1:
        raise ValueError(f"--redraws must be at least 1, not {args.redraws}")
    check_output(args.output or default_output(Path(args.model)))
    model, codec, device = load_for_sampling(args)
    groups = args.class_groups or ("parity" if model.config.num_classes == 2 else None)
    data = DataArguments(dataset="digits", class_groups=groups)
    data.fit(model.config, args.model, data.crop(data.load_held_out(), model.config))
    check_num_images(args.num_images, model.config.num_classes, "--num_images")
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
            "autocast_dtype": args.dtype,
            "num_images": args.num_images,
            "redraws": args.redraws,
            "batch_size": args.batch_size,
            "dataset": data.dataset,
            "class_groups": groups,
            "device": str(device),
            "threads": torch.get_num_threads(),
        },
        "seed": args.seed,
        "model": args.model,
    }
    for name, value in results.items():
        if isinstance(value, float):
            spread = f" +- {deviations[name]:.4f}" if name in deviations else ""
            print(f"{name:36s} {value:10.4f}{spread}")
    write_results(results, args.output or default_output(Path(args.model)))


def mean_and_std(draws: list[dict[str, float | None]]) -> tuple[dict[str, float | None], dict[str, float]]:
    """Each measure's mean over the draws, and its standard deviation where there are several."""
    means = {name: None if draws[0][name] is None else statistics.mean(d[name] for d in draws) for name in draws[0]}
    if len(draws) == 1:
        return means, {}
    return means, {name: statistics.stdev(d[name] for d in draws) for name, mean in means.items() if mean is not None}
