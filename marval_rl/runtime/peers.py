"""Notices that another process of the run hangs or is dead, names it, and ends this one instead of waiting for ever."""

from __future__ import annotations

import os
import re
import sys
import threading
import time
from itertools import count

import torch
from torch.distributed import DistError, Store

GRACE = 3.0  # seconds in which the others can report that they, too, have given up
POLL = 1.0  # seconds between two looks at the store

# In the messages of torch's backends, which raise plain RuntimeErrors.
SILENT = re.compile(r"tim(ed|e)[ -]?out", re.IGNORECASE)
GONE = re.compile(r"gloo|nccl|connection (was )?(closed|reset)|broken pipe|end ?of ?file|socket", re.IGNORECASE)

STORE_GONE = "process 0, or the launcher, is gone"  # whichever of them holds the store

_runs = count()  # every process of a group starts its runs in the same order


class Peers:
    """The processes of a run, seen from one of them.

    Each writes to the store of the process group which step it is in. A process that waited too long for the others, or
    lost the connection, writes that there too. Those that do not are the missing ones. A thread watches the store and
    ends a process that hangs where no error reaches it, as in a reward that never returns.

    `ddp_timeout` limits the waiting. gloo then raises an error, which is caught here; NCCL may end the process with its
    own message.

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
        """Describe which processes are missing, if the error says that some are; None for any other error."""
        silent, gone = SILENT.search(str(error)), GONE.search(str(error))
        if not (silent or gone or isinstance(error, DistError)):
            return None
        try:
            missing = self._find_missing("did not answer" if silent else "is gone")
            self.store.set(f"{self.run}/lost", missing)
            time.sleep(2 * POLL)  # the store may end with this process, and the others have to read it first
        except RuntimeError:
            return STORE_GONE
        return missing

    def close(self) -> None:
        """Stop watching: the run is over, and no other process waits for this one."""
        self._over.set()
        self._watch.join()

    def _find_missing(self, what: str) -> str:
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
                missing = self.store.get(f"{self.run}/lost").decode()
            except RuntimeError:
                missing, patience = STORE_GONE, self.timeout  # or process 0 has finished a little earlier
            if not self._over.wait(patience):
                print(f"marval-rl: error: process {self.rank} ends: another one found that {missing}", file=sys.stderr)
                sys.stderr.flush()
                os._exit(1)
