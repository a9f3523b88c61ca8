"""Callbacks of every run: metrics file, progress, epoch of the data, weight average, and a clean stop on Ctrl-C."""

from __future__ import annotations

import json
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tqdm import tqdm
from transformers import TrainerCallback
from transformers.trainer_callback import TrainerControl, TrainerState

from marval_rl.runtime.distributed import in_any_process

SHOWN = ("loss", "reward", "kl", "eval_frechet_distance", "eval_diversity")  # beside the progress bar
PLAIN_SECONDS = 30  # between two lines of progress where there is no terminal


class MetricsFileCallback(TrainerCallback):
    """Appends each log to `metrics.jsonl`. A resumed run drops the lines after its checkpoint, so that no step is there
    twice."""

    def __init__(self, path: Path):
        self.path = path
        self.start = 0.0

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if not state.is_world_process_zero:
            return
        kept, elapsed = [], 0.0
        if state.global_step > 0 and self.path.exists():
            for line in self.path.read_text().splitlines():
                try:
                    entry = json.loads(line)
                except json.JSONDecodeError:
                    continue  # a line that was cut off by the kill
                if entry["step"] <= state.global_step:
                    kept.append(line)
                    elapsed = entry["time"]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = self.path.with_suffix(".unfinished")  # a full disk must not delete the existing lines
        unfinished.write_text("".join(f"{line}\n" for line in kept))
        unfinished.replace(self.path)
        self.start = time.monotonic() - elapsed

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        # A line is a mean over steps. None may span a checkpoint: a resumed run does not know the steps before.
        control.should_log |= control.should_save

    def on_log(self, args: Any, state: TrainerState, control: TrainerControl, logs: dict[str, Any], **_: Any) -> None:
        if not state.is_world_process_zero or "train_runtime" in logs:
            return  # the summary at the end counts only from the last start
        entry = {"step": state.global_step, "time": round(time.monotonic() - self.start, 3), **logs}
        with self.path.open("a") as file:
            file.write(json.dumps(entry) + "\n")


class RunProgressCallback(TrainerCallback):
    """The newest figures: a progress bar on a terminal, else a plain line every PLAIN_SECONDS, for logs.

    transformers' own prints every log as a line.
    """

    def __init__(self):
        self.bar: tqdm | None = None
        self.figures: dict[str, str] = {}

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.start = self.last_line = time.monotonic()
        self.first_step, self.num_images = state.global_step, 0
        if state.is_world_process_zero and not args.disable_tqdm and sys.stderr.isatty():
            self.bar = tqdm(total=state.max_steps, initial=state.global_step)

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if args.starts_cycle(state.global_step - 1):
            self.num_images += args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)
        elif state.is_world_process_zero and not args.disable_tqdm:
            self._write_line(args, state)

    def _write_line(self, args: Any, state: TrainerState) -> None:
        now = time.monotonic()
        if now - self.last_line < PLAIN_SECONDS:
            return
        seconds_left = (
            (now - self.start) / (state.global_step - self.first_step) * (state.max_steps - state.global_step)
        )
        parts = [
            f"{args.output_dir}: step {state.global_step} of {state.max_steps}",
            *(f"{name} {value}" for name, value in self.figures.items()),
            f"{self.num_images / (now - self.last_line):.3g} images/s",
            f"{seconds_left // 60:.0f} min {seconds_left % 60:02.0f} s left",
        ]
        print(", ".join(parts), file=sys.stderr, flush=True)
        self.last_line, self.num_images = now, 0

    def on_log(self, args: Any, state: TrainerState, control: TrainerControl, logs: dict[str, Any], **_: Any) -> None:
        new = {name.removeprefix("eval_"): f"{logs[name]:.3g}" for name in SHOWN if logs.get(name) is not None}
        self.figures |= new
        if self.bar is not None:
            self.bar.set_postfix(self.figures, refresh=False)

    def on_train_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None


class EpochCallback(TrainerCallback):
    """Tells the batches which epoch begins, also in a resumed run, where it is not the first."""

    def on_epoch_begin(
        self, args: Any, state: TrainerState, control: TrainerControl, train_dataloader: Any, **kwargs: Any
    ) -> None:
        train_dataloader.batch_sampler.set_epoch(int(state.epoch or 0))


class AverageCallback(TrainerCallback):
    """Updates the weight average after each optimizer step, before evaluation and checkpoints see it."""

    def __init__(self, update: Callable[[], None]):
        self.update = update

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.update()


class InterruptCallback(TrainerCallback):
    """The first Ctrl-C (or SIGTERM) in any process ends training after the running step, with a checkpoint; a second
    one ends it at once."""

    def __init__(self):
        self.interrupted = False
        self._previous: dict[int, Any] = {}

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if threading.current_thread() is not threading.main_thread():
            return  # Python delivers signals to the main thread only
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._handle)

    def _handle(self, number: int, frame: Any) -> None:
        self.interrupted = True
        signal.signal(number, self._previous[number])

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        # Signals reach processes in different steps, or only one of them: all end after this step.
        if in_any_process(self.interrupted, args.device):
            control.should_save = control.should_training_stop = True

    def restore(self) -> None:
        """Restore the signal handlers, however training ended."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()
