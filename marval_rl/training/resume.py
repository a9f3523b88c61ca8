"""Finding the checkpoint to go on from."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch

from marval_rl.errors import CheckpointError
from marval_rl.training.checkpoints import UNFINISHED, checkpoints_in, damage, step_of

LATEST = "latest"

T = TypeVar("T")


def find_checkpoint(output_dir: Path, resume: str) -> Path:
    """The checkpoint that `resume` names, or the newest whole one of the run for "latest".

    Of several processes the first reads the files and the others do as it says.

    Raises:
        CheckpointError: In all processes, if there is none, or the one named is damaged.
    """
    return _as_the_first_says(lambda: _find_checkpoint(output_dir, resume))


def _find_checkpoint(output_dir: Path, resume: str) -> Path:
    if resume != LATEST:
        if (wrong := damage(Path(resume))) is not None:
            raise CheckpointError(f"{resume} is no whole checkpoint: {wrong}")
        return Path(resume)
    passed_over = []
    for folder in reversed(checkpoints_in(output_dir)):
        if (wrong := damage(folder)) is None:
            for other, told in passed_over:
                print(f"{other} is damaged ({told}); resuming from {folder}")
            return folder
        passed_over.append((folder, wrong))
    found = "".join(f"; {folder.name} is damaged: {wrong}" for folder, wrong in passed_over)
    raise CheckpointError(f"{output_dir} holds no whole checkpoint to resume from{found}; start without --resume")


def _as_the_first_says(decide: Callable[[], T]) -> T:
    """What `decide` returns in the first process, in all of them; so with the CheckpointError that it raises."""
    if not torch.distributed.is_initialized():
        return decide()
    decided: list[T | CheckpointError | None] = [None]
    if torch.distributed.get_rank() == 0:
        try:
            decided = [decide()]
        except CheckpointError as error:
            decided = [error]
    torch.distributed.broadcast_object_list(decided)
    if isinstance(decided[0], CheckpointError):
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


def earlier_run(output_dir: Path) -> list[Path]:
    """What an earlier run left in the folder."""
    names = ("checkpoint-*", "superseded-*", UNFINISHED, "metrics.jsonl", "final", "best", "best.unfinished", "samples")
    return [path for name in names for path in output_dir.glob(name)]


def check_output_dir(output_dir: Path, overwrite: bool) -> None:
    """Make sure that the run folder can be used.

    Raises:
        ValueError: If an earlier run is there and overwrite is False.
    """
    if earlier_run(output_dir) and not overwrite:
        raise ValueError(
            f"{output_dir} already holds a run: go on with it (--resume), choose another --output_dir, or delete it "
            "with --overwrite_output_dir"
        )
    output_dir.mkdir(parents=True, exist_ok=True)


def remove_earlier_run(output_dir: Path) -> None:
    """Delete what `earlier_run` finds: only once the new run is ready to begin."""
    for path in earlier_run(output_dir):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
