"""Checkpoints that are complete or absent: written in another folder, listed in a manifest, then renamed."""

from __future__ import annotations

import errno
import json
import os
import shutil
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from marval_rl.environment import environment
from marval_rl.errors import CheckpointError, first_line
from marval_rl.runtime.distributed import gather_objects

UNFINISHED = "unfinished"  # the folder beside the checkpoints in which they are written and deleted
MANIFEST = "manifest.json"  # written last
STATE_FILE = "trainer_state.json"
FORMAT = 1

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

# What a full disk raises: OSError from Python and DeepSpeed, RuntimeError from torch.save, the third from safetensors.
WRITE_ERRORS = (OSError, RuntimeError, SafetensorError)


@dataclass(frozen=True)
class Layout:
    """How a run's state is spread: over how many processes, and by which stage of ZeRO (None without DeepSpeed)."""

    world_size: int
    zero_stage: int | None = None

    def __str__(self) -> str:
        processes = f"{self.world_size} process{'es' if self.world_size > 1 else ''}"
        return processes if self.zero_stage is None else f"{processes} under ZeRO-{self.zero_stage}"


def step_of(checkpoint: Path) -> int | None:
    """The step in the name checkpoint-<step>; None for another name."""
    step = checkpoint.name.removeprefix("checkpoint-")
    return int(step) if step.isdecimal() and step != checkpoint.name else None


def checkpoints_in(output_dir: Path) -> list[Path]:
    """The run's checkpoints from the oldest to the newest, complete or not."""
    steps = {folder: step_of(folder) for folder in output_dir.glob("checkpoint-*")}
    return [folder for _, folder in sorted((step, folder) for folder, step in steps.items() if step is not None)]


# ---- Reading ----


def find_problem(checkpoint: Path, checksums: bool = True) -> str | None:
    """Find what is wrong with a checkpoint.

    Args:
        checkpoint: The folder.
        checksums: Read all files and compare their checksums; otherwise only their sizes.

    Returns:
        A description that begins with the file's name; None if the checkpoint is complete.
    """
    try:
        files = json.loads((checkpoint / MANIFEST).read_text())["files"]
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except (OSError, ValueError):  # unreadable, or damaged: not text, or not JSON
        return f"{MANIFEST} is damaged"
    for name, facts in files.items():
        try:
            size = (checkpoint / name).stat().st_size
            if size != facts["size"]:
                return f"{name} has {size} bytes where {facts['size']} were written"
            if checksums and _crc32(checkpoint / name) != facts["crc32"]:
                return f"{name} is not what was written: its checksum differs"
        except FileNotFoundError:
            return f"{name} is missing"
        except OSError as error:
            return f"{name} cannot be read: {error.strerror}"
    return None


def layout_of(checkpoint: Path) -> Layout:
    """The layout that wrote a checkpoint."""
    return Layout(**json.loads((checkpoint / MANIFEST).read_text())["layout"])


def complete_checkpoints(output_dir: Path) -> list[Path]:
    """The run's checkpoints whose files all exist with the right sizes, the newest last."""
    return [folder for folder in checkpoints_in(output_dir) if find_problem(folder, checksums=False) is None]


def resume_hint(output_dir: Path) -> str:
    """What there is to resume from, for the message of an error that ends a run."""
    complete = complete_checkpoints(output_dir)
    if not complete:
        return "there is no checkpoint yet"
    return f"{complete[-1]} is complete, --resume continues from it"


# ---- Writing ----


def write_error(output_dir: Path, target: Path, reason: str) -> CheckpointError:
    """The error to raise when a file or folder of the run cannot be written."""
    free = shutil.disk_usage(output_dir).free
    return CheckpointError(
        f"{target} could not be written: {reason} ({free / 1e9:.1f} GB are free there, make room first); "
        f"{resume_hint(output_dir)}"
    )


class CheckpointWriter:
    """Writes one checkpoint. All processes write into `folder`. An error is kept until all of them meet in `agree`, and
    raised there in all, so that none waits in a collective operation for one that failed.

    Args:
        output_dir: The run's folder, the same for all processes.
        step: The step of the checkpoint.
        layout: How the state is spread.
        save_total_limit: Keep this many checkpoints; None or 0 keeps all.
    """

    def __init__(self, output_dir: Path, step: int, layout: Layout, save_total_limit: int | None):
        self.output_dir = output_dir
        self.step = step
        self.layout = layout
        self.save_total_limit = save_total_limit
        self.rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
        self.folder = output_dir / UNFINISHED / f"checkpoint-{step}"
        self.target = output_dir / f"checkpoint-{step}"
        self.failure: str | None = None

    def begin(self) -> None:
        """Create the empty folder.

        Raises:
            CheckpointError: In all processes, if one cannot.
        """
        if self.rank == 0:
            with self.attempt():
                remove_unfinished(self.output_dir)
                self.folder.mkdir(parents=True)
        self.agree()

    @contextmanager
    def attempt(self, file: Path | None = None) -> Iterator[None]:
        """Within this context an error of writing is kept instead of raised. The incomplete file is deleted: on a full
        disk it takes the space that the next small one needs."""
        try:
            yield
        except WRITE_ERRORS as error:
            self.failure = self.failure or _describe(error, file)
            if file is not None:
                file.unlink(missing_ok=True)

    def attempting(self, save: Callable[..., Any]) -> Callable[..., None]:
        """The function save(state_dict, path) of a DeepSpeed checkpoint engine, run within `attempt`."""

        def attempted(state_dict: Any, path: str) -> None:
            with self.attempt(Path(path)):
                save(state_dict, path)

        return attempted

    def agree(self) -> None:
        """Exchange the errors of all processes.

        Raises:
            CheckpointError: In all of them, if one has failed. What was written is deleted.
        """
        failures = gather_objects(self.failure)
        failed = [f"process {rank}: {text}" for rank, text in enumerate(failures) if text is not None]
        if not failed:
            return
        if self.rank == 0:
            remove_unfinished(self.output_dir)
        gather_objects(None)  # the error is raised once the space is free again
        reason = failed[0] if self.layout.world_size > 1 else failed[0].removeprefix("process 0: ")
        raise write_error(self.output_dir, self.target, reason)

    def seal(self) -> None:
        """Flush everything to the disk, write the manifest, rename the folder, delete old checkpoints.

        Raises:
            CheckpointError: In all processes, if one has failed.
        """
        self.agree()
        entries: dict[str, dict[str, int]] = {}
        with self.attempt():
            files = sorted(path for path in self.folder.rglob("*") if path.is_file())
            for path in files[self.rank :: self.layout.world_size]:
                _to_disk(path)
                entries[str(path.relative_to(self.folder))] = {"size": path.stat().st_size, "crc32": _crc32(path)}
        shared = gather_objects(entries)
        self.agree()
        if self.rank == 0:
            with self.attempt():
                self._check_ranks()
                self._write_manifest({name: facts for part in shared for name, facts in part.items()})
                self._move_into_place()
        self.agree()
        if self.rank == 0:
            self._rotate()
            remove_unfinished(self.output_dir)

    def _check_ranks(self) -> None:
        missing = [rank for rank in range(self.layout.world_size) if not (self.folder / buffer_file(rank)).exists()]
        if missing:
            raise OSError(
                f"the files of process {missing[0]} are missing: output_dir must be one folder that all machines see"
            )

    def _write_manifest(self, files: dict[str, dict[str, int]]) -> None:
        here = environment()
        manifest = {
            "format": FORMAT,
            "step": self.step,
            "layout": asdict(self.layout),
            "versions": {name: here[name] for name in ("marval_rl", "torch", "transformers", "deepspeed")},
            "files": dict(sorted(files.items())),
        }
        path = self.folder / MANIFEST
        path.write_text(json.dumps(manifest, indent=1))
        _to_disk(path)
        _to_disk(self.folder)

    def _move_into_place(self) -> None:
        if self.target.exists():  # an incomplete one, or one of an earlier run
            self.target.rename(self.output_dir / UNFINISHED / "replaced")
        self.folder.rename(self.target)
        _to_disk(self.output_dir)

    def _rotate(self) -> None:
        if not self.save_total_limit:
            return
        for old in checkpoints_in(self.output_dir)[: -self.save_total_limit]:
            if old != self.target:
                old.rename(self.output_dir / UNFINISHED / old.name)  # at once, even if deleting fails


def buffer_file(rank: int) -> str:
    """The file of what a process keeps between steps. Each process writes one, so it shows which of them took part."""
    return f"buffer_{rank}.safetensors"


def remove_unfinished(output_dir: Path) -> None:
    """Delete the incomplete checkpoint of a run that was killed."""
    shutil.rmtree(output_dir / UNFINISHED, ignore_errors=True)


def _describe(error: Exception, file: Path | None) -> str:
    where = error.filename if isinstance(error, OSError) and error.filename is not None else file
    reason = error.strerror if isinstance(error, OSError) and error.strerror is not None else first_line(error)
    if "inline_container" in reason:  # torch.save reports positions in its archive
        reason = "it could not be written to its end"
    return reason if where is None else f"{Path(where).name}: {reason}"


def _crc32(path: Path, block: int = 1 << 22) -> int:
    value = 0
    with path.open("rb") as file:
        while data := file.read(block):
            value = zlib.crc32(data, value)
    return value


def _to_disk(path: Path) -> None:
    """Wait until a file or folder is on the disk, and not only in the page cache."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
