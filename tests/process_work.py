"""What the tests of `run_processes` run; a module of its own, because each new process imports it."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

from marval_rl.errors import RewardError


def fail(rank: int, num_processes: int, folder: Path) -> None:
    """Process 1 raises while process 0 is in the middle of something long."""
    (folder / f"{rank} {os.getpid()}").touch()
    while len(list(folder.iterdir())) < num_processes:
        time.sleep(0.05)
    if rank == 1:
        raise RewardError("reward 'x' raised something")
    time.sleep(600)


def be_killed(rank: int, num_processes: int) -> None:
    os.kill(os.getpid(), signal.SIGKILL)
