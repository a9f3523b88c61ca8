"""`--dry_run`: what a recipe would do, without doing it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import huggingface_hub.constants
import torch

from marval_rl.recipes.planning.memory import memory_table
from marval_rl.recipes.planning.plan import Planner, TrainingPlan
from marval_rl.text import dump_yaml
from marval_rl.trainers.arguments import accelerator_here
from marval_rl.trainers.batches import rounds_in


def print_dry_run(settings: dict[str, Any], config: Any, make_plan: Planner) -> None:
    """Prints the resolved recipe, the batch arithmetic, parameter counts, memory and what is missing.

    All figures are for `config.world_size` processes. Of those that a launcher started only the first one prints.
    """
    if os.environ.get("RANK", "0") != "0":
        return
    print(dump_yaml(settings).rstrip())
    print()
    with offline():
        plan = make_plan()
    if plan.data is not None:
        print(plan.data)
    several = "; --num_processes N plans for N" if config.world_size == 1 else ""
    print(f"planned for {_processes(config)} in {config.precision}{several}")
    for line in [*batch_arithmetic(config), *length(config, plan), *parameters(plan), *memory(config, plan)]:
        print(line)
    missing_gpu = config.missing_gpu()
    for what in [*plan.missing, *([] if missing_gpu is None else [missing_gpu])]:
        print(f"missing: {what}")
    print("nothing was trained (--dry_run)")


@contextmanager
def offline() -> Iterator[None]:
    """Within it nothing is downloaded: a dry run reads this machine's disk only."""
    before = huggingface_hub.constants.HF_HUB_OFFLINE
    huggingface_hub.constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        huggingface_hub.constants.HF_HUB_OFFLINE = before


def devices(config: Any) -> list[str]:
    """What a run computes on, and why."""
    processes = _processes(config)
    if config.device.type == "cpu":
        network = " over gloo" if config.world_size > 1 else ""
        reason = "there is no GPU here" if accelerator_here() is None else "use_cpu"
        return [f"{processes} on the CPU{network}, in {config.precision} ({reason})"]
    idle = torch.accelerator.device_count() - 1
    unused = f"; {idle} more here: --num_processes {idle + 1} uses all" if config.world_size == 1 and idle > 0 else ""
    each = "a GPU" if config.world_size == 1 else "a GPU each"
    return [f"{processes} on {each}, in {config.precision}{unused}"]


def _processes(config: Any) -> str:
    return f"{config.world_size} process{'' if config.world_size == 1 else 'es'}"


def batch_arithmetic(config: Any) -> list[str]:
    """How many images make an update."""
    images = config.per_device_train_batch_size * config.gradient_accumulation_steps * config.world_size
    lines = [
        f"images per update: {images} = per_device_train_batch_size {config.per_device_train_batch_size} x "
        f"gradient_accumulation_steps {config.gradient_accumulation_steps} x {config.world_size} processes",
    ]
    settings = vars(config)
    if "num_generations" in settings:
        generation = config.per_device_train_batch_size * config.steps_per_generation * config.world_size
        lines.append(
            f"generation batch: {generation} images = {generation // config.num_generations} groups of "
            f"{config.num_generations}, used {config.num_iterations} time(s)"
        )
    if settings.get("distribution_weight"):
        own = settings.get("distribution_batch_size", config.per_device_train_batch_size) * config.world_size
        lines.append(
            f"distribution anchor: {own} generated images at once and {config.distribution_queue} recent ones against "
            f"at most {config.distribution_real_images:,} real ones, in the features {config.distribution_features}"
        )
    return lines


def length(config: Any, plan: TrainingPlan) -> list[str]:
    """Steps of an epoch and of the run, for these processes."""
    steps = None
    epoch = "an epoch: unknown while data or model are missing"
    if plan.rows is not None:
        pattern = config.batch_pattern()
        rounds = rounds_in(plan.rows, config.rows_per_batch * config.num_readers, pattern)
        steps = rounds * len(pattern) // config.gradient_accumulation_steps
        epoch = f"an epoch: {plan.rows:,} rows, {steps:,} optimizer steps"
    if config.max_steps > 0:
        return [epoch, f"optimizer steps: {config.max_steps:,}"]
    total = "" if steps is None else f"{int(config.num_train_epochs * steps):,} = "
    return [epoch, f"optimizer steps: {total}{config.num_train_epochs:g} epochs"]


def parameters(plan: TrainingPlan) -> list[str]:
    if plan.footprint is None:
        return ["parameters: unknown while a network is missing"]
    networks = plan.footprint.networks | plan.footprint.frozen
    return [f"parameters: {', '.join(f'{name} {count:,}' for name, count in networks.items())}"]


def memory(config: Any, plan: TrainingPlan) -> list[str]:
    """The table of memory of a process by ZeRO stage."""
    if plan.footprint is None:
        return []
    return [
        f"memory of each process, in {config.precision}, without the rewards' networks, the VAE's "
        "activations and buffers of single operations:",
        *memory_table(plan.footprint, config.precision != "float32", config.world_size),
    ]
