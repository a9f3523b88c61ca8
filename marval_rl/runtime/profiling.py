"""Where the time of a run goes: a trace of some steps by torch.profiler, and the share of each phase."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function
from transformers import TrainerCallback
from transformers.trainer_callback import TrainerControl, TrainerState

ROLLOUT, REWARD, EVALUATION = "rollout", "reward", "evaluation"  # the phases that trainers mark
LOSS, STEP = "loss", "training step"  # a loss holds its rollout and its reward, a step its loss and the backward pass
OPTIMIZER = "optimizer"
LABEL = "marval_rl: "
DATA_LABEL = "enumerate(DataLoader)#"  # PyTorch's own
COMMUNICATION_LABELS = ("c10d::", "nccl:", "gloo:")
TRACE_FILE = "trace.json"


_stopwatch: ContextVar[dict[str, float] | None] = ContextVar("stopwatch", default=None)


@contextmanager
def timed_phases() -> Iterator[dict[str, float]]:
    """Within it the seconds of each phase are summed, without a profiler and its cost: label -> seconds."""
    seconds: dict[str, float] = defaultdict(float)
    token = _stopwatch.set(seconds)
    try:
        yield seconds
    finally:
        _stopwatch.reset(token)


@contextmanager
def phase(name: str) -> Iterator[None]:
    """Marks a phase of a step for `ProfileCallback` and `timed_phases`; it costs about a microsecond without them.

    A GPU works on while the host goes ahead, so in a measured step it is waited for at the end of a phase.
    """
    seconds = _stopwatch.get()
    start = time.perf_counter()
    with record_function(LABEL + name):
        yield
        if torch.cuda.is_available() and (seconds is not None or torch.autograd.profiler._is_profiler_enabled):
            torch.cuda.synchronize()
    if seconds is not None:
        seconds[LABEL + name] += time.perf_counter() - start


class OptimizerPhase(TrainerCallback):
    """Marks the optimizer's steps. DeepSpeed's engine takes them at the end of its backward pass."""

    running: AbstractContextManager[None] | None = None

    def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
        self.running = phase(OPTIMIZER)
        self.running.__enter__()

    def on_optimizer_step(self, *_: Any, **__: Any) -> None:
        if self.running is not None:
            self.running.__exit__(None, None, None)


class ProfileCallback(OptimizerPhase):
    """Profiles `num_steps` steps after the first of a start, which warms up; writes a trace and prints the shares.

    Args:
        num_steps: How many; at least one.
        folder: Where the trace is written, for Perfetto or chrome://tracing.
    """

    def __init__(self, num_steps: int, folder: Path):
        self.num_steps = num_steps
        self.folder = folder
        self.profiler: profile | None = None
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
    """The share of each phase in the time that passed; "other" is in no phase. Communication also counts in the phase
    that waits for it.

    Args:
        events: Label -> seconds, as torch.profiler sums them, or `timed_phases`.
        seconds: That passed.
    """
    took = {name: events.get(LABEL + name, 0.0) for name in (ROLLOUT, REWARD, LOSS, STEP, OPTIMIZER, EVALUATION)}
    loss, step = took.pop(LOSS), took.pop(STEP)
    found = {ROLLOUT: took.pop(ROLLOUT), REWARD: took.pop(REWARD)}
    found |= {"forward": max(0.0, loss - sum(found.values())), "backward": max(0.0, step - loss), **took}
    found["data"] = sum(spent for label, spent in events.items() if label.startswith(DATA_LABEL))
    found["other"] = max(0.0, seconds - sum(found.values()))
    found["communication"] = sum(spent for label, spent in events.items() if label.startswith(COMMUNICATION_LABELS))
    return {name: spent / seconds for name, spent in found.items()}
