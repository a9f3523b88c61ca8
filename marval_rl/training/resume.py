"""Finding the checkpoint to go on from."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from marval_rl.errors import CheckpointError

LATEST = "latest"
STATE_FILE = "trainer_state.json"  # written last: a checkpoint that has it whole is whole


def is_complete(checkpoint: Path) -> bool:
    """Whether a checkpoint was written to its end."""
    try:
        json.loads((checkpoint / STATE_FILE).read_text())
    except (OSError, json.JSONDecodeError):
        return False
    return True


def find_checkpoint(output_dir: Path, resume: str) -> Path:
    """The checkpoint that `resume` names, or the newest complete one of the run for "latest".

    Raises:
        CheckpointError: If there is none, or the one named is incomplete.
    """
    if resume != LATEST:
        if not is_complete(Path(resume)):
            raise CheckpointError(f"{resume} is no complete checkpoint ({STATE_FILE} is missing or damaged)")
        return Path(resume)
    found = sorted((f for f in output_dir.glob("checkpoint-*") if step_of(f) is not None), key=step_of)
    complete = [folder for folder in found if is_complete(folder)]
    if not complete:
        raise CheckpointError(f"{output_dir} holds no complete checkpoint to resume from; start without --resume")
    if complete[-1] != found[-1]:
        print(f"{found[-1]} is incomplete (its writing was cut off); resuming from {complete[-1]}")
    return complete[-1]


def step_of(checkpoint: Path) -> int | None:
    """The step in the name checkpoint-<step>; None for another name."""
    step = checkpoint.name.removeprefix("checkpoint-")
    return int(step) if step.isdecimal() and step != checkpoint.name else None


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
    names = ("checkpoint-*", "superseded-*", "metrics.jsonl", "final", "samples")
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
