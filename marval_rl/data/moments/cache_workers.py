"""Several processes of `marval-rl cache` on one machine."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

from marval_rl.errors import DataError, RecipeError
from marval_rl.launched import check_company

PARENT = "MARVAL_RL_CACHE_PARENT"  # set for the processes that `run_workers` starts
PROGRAM = (sys.executable, "-m", "marval_rl")
POLL_SECONDS = 0.2


@dataclass(frozen=True)
class Place:
    """This process among those that fill the cache.

    parent: the process that started it by `run_workers`, or None
    """

    rank: int
    local_rank: int
    world_size: int
    parent: int | None

    def stop_if_orphaned(self) -> None:
        """A worker ends with the process that started it, however that ended."""
        if self.parent is not None and os.getppid() != self.parent:
            raise KeyboardInterrupt


def find_place(num_processes: int) -> Place | None:
    """The place that torchrun or `run_workers` has given to this process; None if it is the only one so far.

    Raises RecipeError if the environment is no whole number, or says another number of processes than the setting.
    """
    if "WORLD_SIZE" not in os.environ:
        check_company(1)
        return None
    defaults = {"RANK": "0" if os.environ["WORLD_SIZE"] == "1" else "", "LOCAL_RANK": "0", "WORLD_SIZE": ""}
    values = {name: os.environ.get(name, default) for name, default in defaults.items()}
    if not all(value.isdecimal() for value in values.values()) or int(values["RANK"]) >= int(values["WORLD_SIZE"]):
        raise RecipeError(f"the environment gives this process no place: {values}")
    world_size = int(values["WORLD_SIZE"])
    if num_processes not in (1, world_size):
        raise RecipeError(
            f"num_processes is {num_processes}, but the environment says WORLD_SIZE={world_size}: leave "
            "--num_processes out under torchrun, or unset WORLD_SIZE"
        )
    parent = os.environ.get(PARENT)
    return Place(int(values["RANK"]), int(values["LOCAL_RANK"]), world_size, int(parent) if parent else None)


def run_workers(arguments: Sequence[str], num_processes: int) -> None:
    """Run `marval-rl` with these arguments in several processes, and wait for all.

    If one dies the others go on, since their shards are kept. Ctrl-C ends them all.

    Raises:
        DataError: If any failed; it says which, and how.
    """
    threads = str(max(1, (os.cpu_count() or 1) // num_processes))
    shared = {"OMP_NUM_THREADS": threads, **os.environ, "WORLD_SIZE": str(num_processes), PARENT: str(os.getpid())}
    workers = [
        subprocess.Popen(
            [*PROGRAM, *arguments],
            env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            start_new_session=True,  # Ctrl-C reaches this process alone, which says so once
        )
        for rank in range(num_processes)
    ]
    running, failed = dict(enumerate(workers)), {}
    try:
        while running:
            for rank, worker in list(running.items()):
                code = worker.poll()
                if code is not None:
                    del running[rank]
                if code:
                    failed[rank] = f"process {rank + 1} of {num_processes} {_ending(code)}"
                    print(failed[rank] + ("; the others go on" if running else ""), file=sys.stderr, flush=True)
            time.sleep(POLL_SECONDS)
    finally:
        for worker in workers:
            worker.terminate()
        for worker in workers:
            worker.wait()
    if failed:
        reasons = ", ".join(failed[rank] for rank in sorted(failed))
        raise DataError(f"{reasons}; what is finished stays: run the same command again, it goes on from there")


def _ending(code: int) -> str:
    if code >= 0:
        return f"failed with exit code {code}"
    return f"was killed by {signal.Signals(-code).name}"
