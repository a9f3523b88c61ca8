"""When another process of the run hangs or dies: noticing it, saying which, and ending instead of waiting for ever."""

from __future__ import annotations

import os
import re
import sys
import threading
import time
from itertools import count

import torch
from torch.distributed import DistError, Store

GRACE = 3.0  # seconds that the others get to say that they, too, have given up
POLL = 1.0  # seconds between two looks at the store

# What torch's backends say when the other end is silent or gone; they raise plain RuntimeErrors.
SILENT = re.compile(r"tim(ed|e)[ -]?out", re.IGNORECASE)
GONE = re.compile(r"gloo|nccl|connection (was )?(closed|reset)|broken pipe|end ?of ?file|socket", re.IGNORECASE)

STORE_GONE = "process 0, or the launcher, is gone"  # whichever holds the store

_runs = count()  # every process of a group makes its runs in the same order


class Peers:
    """The processes of a run, seen from one of them.

    Each notes in the store of the process group which step it is in. The first that waited too long for the others, or
    lost the connection, says so there; the others do the same, and those who do not are the ones that are missing. A
    thread reads along and ends a process that hangs where no error reaches it, as in a reward that never returns.

    `ddp_timeout` bounds the waiting. With gloo that is an error to be caught here; NCCL ends the process with a
    message of its own.

    Args:
        timeout: Seconds after which a collective operation gives up.
    """

    def __init__(self, timeout: float):
        self.timeout = timeout
        self.rank, self.world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
        self.store: Store = torch.distributed.distributed_c10d._get_default_store()
        self.run = f"marval_rl/{next(_runs)}"
        self._over = threading.Event()
        self._watch = threading.Thread(target=self._watch_store, daemon=True)
        self._watch.start()

    def note_step(self, step: int) -> None:
        """Let the others know which step this process is in."""
        self.store.set(f"{self.run}/step/{self.rank}", str(step))

    def explain(self, error: Exception) -> str | None:
        """Which processes are missing, if the error says that some are; None for any other error."""
        silent, gone = SILENT.search(str(error)), GONE.search(str(error))
        if not (silent or gone or isinstance(error, DistError)):
            return None
        try:
            told = self._ask_around("did not answer" if silent else "is gone")
            self.store.set(f"{self.run}/lost", told)
            time.sleep(2 * POLL)  # with this process the store may go, and the others are to read it
        except RuntimeError:
            return STORE_GONE
        return told

    def close(self) -> None:
        """Stop reading along: the run is over, and nobody waits for this process any more."""
        self._over.set()
        self._watch.join()

    def _ask_around(self, what: str) -> str:
        self.store.set(f"{self.run}/gave_up/{self.rank}", "1")
        deadline = time.monotonic() + GRACE
        missing = [rank for rank in range(self.world_size) if rank != self.rank]
        while missing and time.monotonic() < deadline:
            missing = [rank for rank in missing if not self.store.check([f"{self.run}/gave_up/{rank}"])]
            time.sleep(0.1)
        waited = f" within {self.timeout:.0f} s (ddp_timeout)" if what == "did not answer" else ""
        if not missing:
            return f"the processes lost each other{waited} in step {self._step_of(self.rank)}"
        names = " and ".join(f"process {rank} (in step {self._step_of(rank)})" for rank in missing)
        return f"{names} {what}{waited}"

    def _step_of(self, rank: int) -> str:
        key = f"{self.run}/step/{rank}"
        return self.store.get(key).decode() if self.store.check([key]) else "0, not begun"

    def _watch_store(self) -> None:
        patience = 2 * GRACE
        while not self._over.wait(POLL):
            try:
                if not self.store.check([f"{self.run}/lost"]):
                    continue
                told = self.store.get(f"{self.run}/lost").decode()
            except RuntimeError:
                told, patience = STORE_GONE, self.timeout  # it may also have ended as it should, a little earlier
            if not self._over.wait(patience):
                print(f"marval-rl: error: process {self.rank} ends: another one found that {told}", file=sys.stderr)
                sys.stderr.flush()
                os._exit(1)
