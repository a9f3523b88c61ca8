"""`--dry_run`: what a recipe would do, without doing it."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from typing import Any

import yaml

from marval_rl.errors import MarvalError
from marval_rl.trainers.base import MARTrainer

ADAM_BYTES = 16  # a trained float32 parameter: weight, gradient and Adam's two moments


def print_dry_run(settings: dict[str, Any], config: Any, make_trainer: Callable[[], MARTrainer]) -> None:
    """Prints the resolved recipe, the batch arithmetic, parameter counts, memory and what is missing."""
    print(yaml.safe_dump(settings, sort_keys=False).rstrip())
    print()
    for line in batch_arithmetic(config):
        print(line)
    with tempfile.TemporaryDirectory() as folder:
        config.output_dir = folder  # transformers makes it at once, and a dry run leaves nothing behind
        try:
            trainer = make_trainer()
        except MarvalError as error:
            print(f"missing: {error}")
            return
        for line in memory_estimate(trainer):
            print(line)
    print("nothing was trained (--dry_run)")


def batch_arithmetic(config: Any) -> list[str]:
    """How many images make an update."""
    images = config.per_device_train_batch_size * config.gradient_accumulation_steps * config.world_size
    lines = [
        f"images an update: {images} = per_device_train_batch_size {config.per_device_train_batch_size} x "
        f"gradient_accumulation_steps {config.gradient_accumulation_steps} x {config.world_size} processes",
        f"optimizer steps: {config.max_steps}",
    ]
    settings = vars(config)
    if "num_generations" in settings:
        generation = config.per_device_train_batch_size * config.steps_per_generation * config.world_size
        lines.append(
            f"generation batch: {generation} images = {generation // config.num_generations} groups of "
            f"{config.num_generations}, used {config.num_iterations} time(s)"
        )
    return lines


def memory_estimate(trainer: MARTrainer) -> list[str]:
    """Parameters, and the memory of weights, gradients, optimizer and weight average in float32 (no activations)."""
    trained = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in trainer.model.parameters())
    averaged = sum(p.numel() for p in trainer.ema.module.parameters())
    mebibytes = (ADAM_BYTES * trained + 4 * (total - trained) + 4 * averaged) / 2**20
    return [
        f"parameters: {total:,} ({trained:,} trained)",
        f"memory without activations: {mebibytes:,.1f} MiB (weights, gradients, Adam, weight average; float32)",
    ]
