"""Processes of one training for the tests, forked from a server that has imported the libraries: the import takes eight
seconds per process, a fork less than one."""

from __future__ import annotations

import gc
import math
import multiprocessing
import os
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

LIBRARIES = ["marval_rl.trainers.distill", "marval_rl.trainers.grpo", "deepspeed"]


@dataclass
class Processes:
    """They run, and what process N prints is in folder/output_N.txt."""

    folder: Path
    running: list[ForkServerProcess]

    def output(self) -> str:
        return "\n".join((self.folder / f"output_{rank}.txt").read_text() for rank in range(len(self.running)))

    def alive(self) -> bool:
        """Whether all of them are."""
        return all(process.is_alive() for process in self.running)

    def kill(self, *ranks: int) -> None:
        """SIGKILL."""
        for rank in ranks:
            self.running[rank].kill()

    def wait(self, timeout: float, alone: float = 60.0) -> list[int | None]:
        """Exit codes; None of those that had to be killed because they took longer, or stayed so many seconds after
        another had failed."""
        deadline = time.monotonic() + timeout
        while self._unfinished() and time.monotonic() < deadline:
            if any(process.exitcode for process in self.running):
                deadline = min(deadline, time.monotonic() + alone)
                alone = math.inf
            time.sleep(0.05)
        codes = [process.exitcode for process in self.running]
        for process in self.running:
            process.kill()
            process.join()
        return codes

    def _unfinished(self) -> bool:
        return any(process.exitcode is None for process in self.running)


def start(folder: Path, world_size: int, function: Callable[..., None], *args: Any) -> Processes:
    """Run function(*args) in so many processes that find each other as torchrun's do, but that nobody else ends."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(LIBRARIES)
    folder.mkdir(parents=True, exist_ok=True)
    port = free_port()
    running = []
    for rank in range(world_size):
        process = context.Process(target=_enter, args=(folder, rank, world_size, port, function, args), daemon=True)
        process.start()
        running.append(process)
    return Processes(folder, running)


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def _enter(folder: Path, rank: int, world_size: int, port: int, function: Callable[..., None], args: Any) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    output = (folder / f"output_{rank}.txt").open("w", buffering=1)
    for stream in (sys.stdout, sys.stderr):
        os.dup2(output.fileno(), stream.fileno())
    sys.stdout = sys.stderr = output

    import torch

    gc.freeze()  # what was imported is not searched for garbage
    torch.set_num_threads(1)
    function(*args)
