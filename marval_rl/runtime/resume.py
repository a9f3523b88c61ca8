"""What a run finds in its output folder: a checkpoint to resume from, changed settings, files of an earlier run."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import torch
import yaml

from marval_rl.errors import CheckpointError, MarvalError, RecipeError
from marval_rl.runtime.checkpoints import (
    UNFINISHED,
    checkpoints_in,
    complete_checkpoints,
    find_problem,
    layout_of,
    step_of,
)
from marval_rl.runtime.distributed import from_first_process

LATEST = "latest"
AUTO = "auto"

# Settings that may change when a run is resumed: its length, what it writes and evaluates, and how it uses the machine.
# Any other change makes it a different run.
FREE_ON_RESUME = frozenset(
    {
        *("max_steps", "num_train_epochs", "max_skipped_steps", "profile"),
        *("max_frechet_ratio", "min_diversity", "min_mode_coverage", "min_recall", "max_kl", "best_metric"),
        *("logging_strategy", "logging_steps", "logging_first_step", "log_level", "log_level_replica", "disable_tqdm"),
        *("report_to", "run_name", "project", "trackio_space_id", "trackio_bucket_id", "trackio_static_space_id"),
        *("save_strategy", "save_steps", "save_total_limit"),
        *("eval_strategy", "eval_steps", "eval_delay", "eval_num_images", "eval_batch_size", "eval_unmasking_steps"),
        *("eval_seed", "eval_guidance_scale", "eval_guidance_schedule", "eval_diffusion_steps", "sample_grid_columns"),
        *("eval_reward_funcs", "eval_reward_kwargs", "judges", "eval_features", "eval_reference"),
        *("eval_reference_images", "eval_redraws"),
        *("use_cpu", "deepspeed", "dataloader_num_workers", "dataloader_pin_memory", "dataloader_prefetch_factor"),
        *("gradient_checkpointing", "gradient_checkpointing_kwargs"),
        *("activation_checkpointing", "activation_checkpointing_kwargs", "torch_empty_cache_steps"),
        *("ddp_find_unused_parameters", "ddp_bucket_cap_mb", "ddp_broadcast_buffers", "ddp_static_graph"),
        *("ddp_backend", "ddp_timeout"),
    }
)
OF_ONE_START = ("output_dir", "overwrite_output_dir", "eval_on_start")  # they do not affect the steps that follow

T = TypeVar("T")
P = ParamSpec("P")


def decided_by_first(decide: Callable[P, T]) -> Callable[P, T]:
    """A function that returns in all processes what it finds in the first one, or raises its MarvalError."""

    @functools.wraps(decide)
    def decide_for_all(*args: P.args, **kwargs: P.kwargs) -> T:
        decided: Any = None
        if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
            try:
                decided = decide(*args, **kwargs)
            except MarvalError as error:
                decided = error
        decided = from_first_process(decided)
        if isinstance(decided, MarvalError):
            raise decided
        return decided

    return decide_for_all


@decided_by_first
def find_checkpoint(output_dir: Path, resume: str) -> Path | None:
    """Find the checkpoint that `resume` names; for "latest" and "auto" the newest complete one of the run.

    The first process reads the files and decides for all.

    Returns:
        The folder. None only for "auto", if there is neither a checkpoint nor a final model: the run starts over.

    Raises:
        CheckpointError: In all processes, if there is none to resume from, or the one named is damaged.
    """
    if resume not in (LATEST, AUTO):
        if (problem := find_problem(Path(resume))) is not None:
            raise CheckpointError(f"{resume} is not a complete checkpoint: {problem}")
        return Path(resume)
    damaged: list[tuple[Path, str]] = []
    for folder in reversed(checkpoints_in(output_dir)):
        if (problem := find_problem(folder)) is None:
            for other, reason in damaged:
                print(f"{other} is damaged ({reason}); resuming from {folder}")
            return folder
        damaged.append((folder, problem))
    if resume == AUTO and not damaged and not (output_dir / "final").exists():
        return None
    found = "".join(f"; {folder.name} is damaged: {problem}" for folder, problem in damaged)
    start = (
        "--overwrite_output_dir deletes what is there and starts over"
        if kept_outputs(output_dir)
        else "start without it"
    )
    raise CheckpointError(f"{output_dir} holds no complete checkpoint to --resume from{found}; {start}")


@decided_by_first
def changed_settings(
    checkpoint: Path, settings: Mapping[str, Any], defaults: Mapping[str, Any], world_size: int
) -> list[str]:
    """Compare the settings of a resumed run with those it was started with.

    Args:
        checkpoint: Its run's recipe.yaml is in the same folder.
        settings: Of the resumed run, in YAML's types; a missing one has its default.
        defaults: Of all settings.
        world_size: Processes of the resumed run.

    Returns:
        A line for each setting that changes from here on, or one that says that recipe.yaml is missing.

    Raises:
        RecipeError: In all processes, for changes that would make it a different run.
    """
    path = checkpoint.parent / "recipe.yaml"
    if not path.exists():
        return [f"{path} is missing: whether the settings are those of the run is not known"]
    recorded = yaml.safe_load(path.read_text(encoding="utf-8"))
    before, now = ({name: of.get(name, default) for name, default in defaults.items()} for of in (recorded, settings))
    processes = layout_of(checkpoint).world_size
    if before["gradient_accumulation_steps"] * processes == now["gradient_accumulation_steps"] * world_size:
        before["gradient_accumulation_steps"] = now["gradient_accumulation_steps"]  # as many images per update
    differing = [name for name in defaults if before[name] != now[name] and name not in OF_ONE_START]
    changes = {name: f"{name} is {now[name]}, and was {before[name]}" for name in differing}
    refused = [changes[name] for name in differing if name not in FREE_ON_RESUME]
    if refused:
        raise RecipeError(
            f"a resumed run keeps the settings of {path}, but {'; '.join(refused)}: leave out what differs, or start a "
            f"new run from its weights; if it is the same under another name, change it in {path} first"
        )
    return [f"from here on {changes[name]}" for name in differing]


def set_aside_newer(output_dir: Path, checkpoint: Path) -> None:
    """Rename checkpoints that are newer than the one to resume from to superseded-<step>, so that a later `--resume`
    ignores them."""
    kept = step_of(checkpoint)
    if kept is None or checkpoint.parent.resolve() != output_dir.resolve():
        return
    for folder in checkpoints_in(output_dir):
        if (step := step_of(folder)) is not None and step > kept:
            aside = output_dir / f"superseded-{step}"
            if aside.exists():
                shutil.rmtree(aside)
            folder.rename(aside)
            print(f"{folder} is newer than {checkpoint}: renamed to {aside}")


def kept_outputs(output_dir: Path) -> list[Path]:
    """The checkpoints and models of an earlier run, which are deleted only if the user asks for it."""
    return _found(output_dir, "checkpoint-*", "superseded-*", "final", "best")


def _found(output_dir: Path, *patterns: str) -> list[Path]:
    return [path for pattern in patterns for path in sorted(output_dir.glob(pattern))]


def check_output_dir(output_dir: Path, overwrite: bool) -> None:
    """Make sure that a new run can use the folder. A run that ended before its first checkpoint does not prevent that.

    Raises:
        ValueError: If checkpoints or models of an earlier run exist and overwrite is False.
    """
    kept = [path.name for path in kept_outputs(output_dir)]
    if kept and not overwrite:
        others = "choose another --output_dir, or delete it with --overwrite_output_dir"
        if complete_checkpoints(output_dir):
            raise ValueError(f"{output_dir} already holds a run: resume it (--resume), {others}")
        raise ValueError(
            f"{output_dir} already holds a run ({', '.join(kept)}), but no complete checkpoint to resume from: {others}"
        )


def remove_earlier_run(output_dir: Path) -> None:
    """Delete the files of an earlier run, those of TensorBoard too. Call it only once the new run is ready to begin."""
    others = (UNFINISHED, "metrics.jsonl", "best.unfinished", "samples")
    events = ("runs/*/events.out.tfevents.*", "runs/*/*/events.out.tfevents.*")
    for path in [*kept_outputs(output_dir), *_found(output_dir, *others, *events)]:
        if path.is_dir():
            shutil.rmtree(path)
            continue
        path.unlink()
        for folder in path.relative_to(output_dir).parents[:-1]:  # of runs/, where they are empty now
            if not any((output_dir / folder).iterdir()):
                (output_dir / folder).rmdir()
