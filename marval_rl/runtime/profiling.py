"""Where the time of a run goes: a trace of some steps by torch.profiler, and the share of each phase."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function
from transformers import TrainerCallback
from transformers.trainer_callback import TrainerControl, TrainerState

ROLLOUT, REWARD, EVALUATION = "rollout", "reward", "evaluation"  # the phases that trainers mark
LABEL = "marval_rl: "
DATA_LABEL = "enumerate(DataLoader)#"  # PyTorch's own
COMMUNICATION_LABELS = ("c10d::", "nccl:", "gloo:")
TRACE_FILE = "trace.json"


@contextmanager
def phase(name: str) -> Iterator[None]:
    """Marks a phase of a step for `ProfileCallback`; it costs about a microsecond where nothing is profiled.

    A GPU works on while the host goes ahead, so in a profiled step it is waited for at the end of a phase.
    """
    with record_function(LABEL + name):
        yield
        if torch.cuda.is_available() and torch.autograd.profiler._is_profiler_enabled:
            torch.cuda.synchronize()


class ProfileCallback(TrainerCallback):
    """Profiles `num_steps` steps after the first of a start, which warms up; writes a trace and prints the shares.

    Args:
        num_steps: How many; at least one.
        folder: Where the trace is written, for Perfetto or chrome://tracing.
    """

    def __init__(self, num_steps: int, folder: Path):
        self.num_steps = num_steps
        self.folder = folder
        self.profiler: profile | None = None
        self.is_done = False
        self.steps_seen = 0
        self.start = 0.0

    def on_step_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        # An evaluation belongs to the step before it, so a profile ends where the next step begins.
        if self.profiler is not None and self.steps_seen > self.num_steps:
            self._stop()
        if self.steps_seen == 1 and state.is_world_process_zero:
            activities = [ProfilerActivity.CPU]
            activities += [ProfilerActivity.CUDA] if torch.cuda.is_available() else []
            self.profiler = profile(activities=activities)
            self.profiler.start()
            self.start = time.perf_counter()
        self.steps_seen += 1

    def on_train_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.profiler is not None:
            self._stop()

    def _stop(self) -> None:
        assert self.profiler is not None
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds = time.perf_counter() - self.start
        self.profiler.stop()
        trace = self.folder / TRACE_FILE
        self.profiler.export_chrome_trace(str(trace))
        events = {event.key: event.cpu_time_total / 1e6 for event in self.profiler.key_averages()}
        self.profiler = None
        number = min(self.num_steps, self.steps_seen - 1)
        parts = ", ".join(f"{name} {100 * share:.0f}%" for name, share in shares(events, seconds).items())
        print(f"profile: {number} steps took {seconds:.2f} s: {parts}; the trace is {trace}")


def shares(events: dict[str, float], seconds: float) -> dict[str, float]:
    """The share of each phase in the time that passed; what is in no other phase is the update.

    Args:
        events: Label -> seconds, as torch.profiler sums them.
        seconds: That passed.
    """
    found = {name: events.get(LABEL + name, 0.0) for name in (ROLLOUT, REWARD, EVALUATION)}
    found["communication"] = sum(took for label, took in events.items() if label.startswith(COMMUNICATION_LABELS))
    found["data"] = sum(took for label, took in events.items() if label.startswith(DATA_LABEL))
    found["update"] = max(0.0, seconds - sum(found.values()))
    return {name: took / seconds for name, took in found.items()}
