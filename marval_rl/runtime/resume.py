"""What a run finds in its folder: the checkpoint to resume from, settings that have changed, what may be deleted."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
import yaml

from marval_rl.errors import CheckpointError, MarvalError, RecipeError
from marval_rl.runtime.checkpoints import (
    UNFINISHED,
    checkpoints_in,
    damage,
    layout_of,
    step_of,
    whole_checkpoints,
)

LATEST = "latest"
AUTO = "auto"
SCHEDULER_FILE = "scheduler.pt"  # every checkpoint that can be resumed has it, under DeepSpeed too

# What may change when a run is resumed, and counts from there on: its length, what it writes and looks at, and how it
# uses the machine. All else makes another run.
FREE_ON_RESUME = frozenset(
    {
        *("max_steps", "num_train_epochs", "max_skipped_steps"),
        *("max_frechet_ratio", "min_diversity", "min_mode_coverage", "max_kl", "best_metric"),
        *("logging_strategy", "logging_steps", "logging_first_step", "log_level", "log_level_replica", "disable_tqdm"),
        *("report_to", "run_name", "project", "trackio_space_id", "trackio_bucket_id", "trackio_static_space_id"),
        *("save_strategy", "save_steps", "save_total_limit"),
        *("eval_strategy", "eval_steps", "eval_delay", "eval_num_images", "eval_batch_size", "eval_unmasking_steps"),
        *("eval_seed", "eval_guidance_scale", "eval_guidance_schedule", "eval_diffusion_steps", "sample_grid_columns"),
        *("eval_reward_funcs", "eval_reward_kwargs", "judges", "feature_extractor"),
        *("use_cpu", "deepspeed", "dataloader_num_workers", "dataloader_pin_memory", "dataloader_prefetch_factor"),
        *("gradient_checkpointing", "gradient_checkpointing_kwargs"),
        *("activation_checkpointing", "activation_checkpointing_kwargs", "torch_empty_cache_steps"),
        *("ddp_find_unused_parameters", "ddp_bucket_cap_mb", "ddp_broadcast_buffers", "ddp_static_graph"),
        *("ddp_backend", "ddp_timeout"),
    }
)
OF_ONE_START = ("output_dir", "overwrite_output_dir", "eval_on_start")  # say nothing of the steps that follow

T = TypeVar("T")


def find_checkpoint(output_dir: Path, resume: str) -> Path | None:
    """The checkpoint that `resume` names; for "latest" and "auto" the newest complete one of the run.

    Of several processes the first reads the files and the others do as it says.

    Returns:
        None only for "auto", where neither a checkpoint nor a final model is there: the run starts anew.

    Raises:
        CheckpointError: In all processes, if there is none to resume from, or the one named is damaged.
    """
    return _as_the_first_says(lambda: _find_checkpoint(output_dir, resume))


def _find_checkpoint(output_dir: Path, resume: str) -> Path | None:
    if resume not in (LATEST, AUTO):
        if (wrong := _unusable(Path(resume))) is not None:
            raise CheckpointError(f"{resume} is not a complete checkpoint: {wrong}")
        return Path(resume)
    passed_over = []
    for folder in reversed(checkpoints_in(output_dir)):
        if (wrong := _unusable(folder)) is None:
            for other, told in passed_over:
                print(f"{other} is damaged ({told}); resuming from {folder}")
            return folder
        passed_over.append((folder, wrong))
    if resume == AUTO and not passed_over and not (output_dir / "final").exists():
        return None
    found = "".join(f"; {folder.name} is damaged: {wrong}" for folder, wrong in passed_over)
    start = (
        "--overwrite_output_dir deletes what is there and starts anew" if kept_of(output_dir) else "start without it"
    )
    raise CheckpointError(f"{output_dir} holds no complete checkpoint to --resume from{found}; {start}")


def _unusable(checkpoint: Path) -> str | None:
    """Why a run cannot be resumed from a checkpoint; None if it can."""
    wrong = damage(checkpoint)
    if wrong is None and layout_of(checkpoint) is not None and not (checkpoint / SCHEDULER_FILE).exists():
        return "it holds weights without the optimizer's state (save_only_model): begin a new run from them"
    return wrong


def changed_settings(
    checkpoint: Path, settings: Mapping[str, Any], defaults: Mapping[str, Any], world_size: int
) -> list[str]:
    """A line for each setting that differs from those of the checkpoint's run, and counts from here on.

    Args:
        checkpoint: Beside the recipe.yaml of its run. Of a run without one nothing is known, and a line says so.
        settings: Of the resumed run, in the types that YAML knows; what is missing has its default.
        defaults: Of all settings.
        world_size: Processes of the resumed run.

    Raises:
        RecipeError: In all processes, for settings that would make it another run.
    """
    return _as_the_first_says(lambda: _changed_settings(checkpoint, settings, defaults, world_size))


def _changed_settings(
    checkpoint: Path, settings: Mapping[str, Any], defaults: Mapping[str, Any], world_size: int
) -> list[str]:
    path = checkpoint.parent / "recipe.yaml"
    if not path.exists():
        return [f"{path} is missing: whether the settings are those of the run is not known"]
    recorded = yaml.safe_load(path.read_text(encoding="utf-8"))
    before, now = ({name: of.get(name, default) for name, default in defaults.items()} for of in (recorded, settings))
    written = layout_of(checkpoint)
    processes = world_size if written is None else written.world_size
    if before["gradient_accumulation_steps"] * processes == now["gradient_accumulation_steps"] * world_size:
        before["gradient_accumulation_steps"] = now["gradient_accumulation_steps"]  # as many images an update
    differing = [name for name in defaults if before[name] != now[name] and name not in OF_ONE_START]
    told = {name: f"{name} is {now[name]}, and was {before[name]}" for name in differing}
    refused = [told[name] for name in differing if name not in FREE_ON_RESUME]
    if refused:
        raise RecipeError(
            f"a resumed run keeps the settings of {path}, but {'; '.join(refused)}: leave out what differs, or begin a "
            f"new run from its weights; if it is the same under another name, change it in {path} first"
        )
    return [f"from here on {told[name]}" for name in differing]


def _as_the_first_says(decide: Callable[[], T]) -> T:
    """What `decide` returns in the first process, in all of them; so with the MarvalError that it raises."""
    if not torch.distributed.is_initialized():
        return decide()
    decided: list[T | MarvalError | None] = [None]
    if torch.distributed.get_rank() == 0:
        try:
            decided = [decide()]
        except MarvalError as error:
            decided = [error]
    torch.distributed.broadcast_object_list(decided)
    if isinstance(decided[0], MarvalError):
        raise decided[0]
    return decided[0]


def set_aside_newer(output_dir: Path, checkpoint: Path) -> None:
    """Rename the run's checkpoints that are newer than the one it goes on from to superseded-<step>: a later `--resume`
    must not take them for its own."""
    if checkpoint.parent.resolve() != output_dir.resolve():
        return
    for folder in sorted(output_dir.glob("checkpoint-*")):
        if (step_of(folder) or 0) > step_of(checkpoint):
            aside = output_dir / f"superseded-{step_of(folder)}"
            if aside.exists():
                shutil.rmtree(aside)
            folder.rename(aside)
            print(f"{folder} is newer than {checkpoint}: renamed to {aside}")


def kept_of(output_dir: Path) -> list[Path]:
    """What an earlier run left in the folder and only the user may throw away: checkpoints and models."""
    return _found(output_dir, "checkpoint-*", "superseded-*", "final", "best")


def earlier_run(output_dir: Path) -> list[Path]:
    """All that an earlier run left in the folder; of `runs`, where TensorBoard writes, its own files alone."""
    events = _found(output_dir, "runs/*/events.out.tfevents.*", "runs/*/*/events.out.tfevents.*")
    return [
        *kept_of(output_dir),
        *_found(output_dir, UNFINISHED, "metrics.jsonl", "best.unfinished", "samples"),
        *events,
    ]


def _found(output_dir: Path, *patterns: str) -> list[Path]:
    return [path for pattern in patterns for path in sorted(output_dir.glob(pattern))]


def check_output_dir(output_dir: Path, overwrite: bool) -> None:
    """Make sure that a new run can use the folder. What a run left that ended before its first checkpoint is in no way.

    Raises:
        ValueError: If an earlier run's checkpoints or models are there and overwrite is False.
    """
    kept = [path.name for path in kept_of(output_dir)]
    if kept and not overwrite:
        others = "choose another --output_dir, or delete it with --overwrite_output_dir"
        if whole_checkpoints(output_dir):
            raise ValueError(f"{output_dir} already holds a run: resume it (--resume), {others}")
        raise ValueError(
            f"{output_dir} already holds a run ({', '.join(kept)}), but no complete checkpoint to resume from: {others}"
        )


def remove_earlier_run(output_dir: Path) -> None:
    """Delete what `earlier_run` finds: only once the new run is ready to begin."""
    for path in earlier_run(output_dir):
        if path.is_dir():
            shutil.rmtree(path)
            continue
        path.unlink()
        for folder in path.relative_to(output_dir).parents[:-1]:  # of runs/, where they are empty now
            if not any((output_dir / folder).iterdir()):
                (output_dir / folder).rmdir()
