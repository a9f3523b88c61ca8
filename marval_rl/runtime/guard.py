"""Steps whose loss or gradient is not finite: skipped in all processes, counted, named, and too many end the run."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from accelerate.utils import DeepSpeedOptimizerWrapper
from torch import Tensor
from transformers import TrainerCallback
from transformers.trainer_callback import TrainerControl, TrainerState

from marval_rl.errors import NonFiniteError
from marval_rl.runtime.distributed import gather_objects


class NonFiniteGuard:
    """Checks each optimizer step; one is bad if a loss or the gradient is not finite in any process.

    A loss that is not finite gets a gradient of NaN. Gradients are averaged over the processes, so all of them see it
    without further communication before they step: plain runs here, DeepSpeed in its own check for overflow. In a bad
    step no weight and no state of the optimizer changes.

    Args:
        max_skipped_steps: How many bad steps in a row are skipped; one more ends the run.
    """

    def __init__(self, max_skipped_steps: int):
        if max_skipped_steps < 0:
            raise ValueError(f"max_skipped_steps must not be negative, but is {max_skipped_steps}")
        self.max_skipped_steps = max_skipped_steps
        self.step_is_bad = False
        self.in_a_row = 0
        self.unreported = 0  # skipped since the last line of metrics
        self._named: list[tuple[str, Tensor]] = []

    def begin_step(self) -> None:
        """Forget the step before."""
        self.step_is_bad = False
        self._named.clear()

    def blame(self, name: str, tensor: Tensor) -> None:
        """Record whether a tensor of this step is finite. If the step is bad, the first one that is not is named.

        It does not synchronise with the device.
        """
        self._named.append((name, tensor.detach().isfinite().all()))

    def watch(self, loss: Tensor) -> Tensor:
        """The loss of a micro-batch; its gradient is NaN if the loss is not finite, and unchanged otherwise."""
        self.blame("loss", loss)
        return loss * torch.where(loss.detach().isfinite(), 1.0, torch.nan)

    def judge(self, optimizer: Any) -> None:
        """Find out whether the step is bad, after the last backward pass.

        DeepSpeed has stepped by then, or has skipped the step.
        """
        if isinstance(optimizer, DeepSpeedOptimizerWrapper):
            self.step_is_bad = optimizer.step_was_skipped
            return
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        # Waits for the device, once per step: the optimizer must not step on what is not finite.
        self.step_is_bad = bool(gradients) and not torch.stack(torch._foreach_norm(gradients)).isfinite().all().item()

    def count(self, step: int) -> None:
        """After a step: report a bad one. All processes call it.

        Raises:
            NonFiniteError: In all of them, if there were too many in a row.
        """
        if not self.step_is_bad:
            self.in_a_row = 0
            return
        self.in_a_row += 1
        self.unreported += 1
        culprit = self._culprit()
        if self.in_a_row > self.max_skipped_steps:
            raise NonFiniteError(
                f"{self.in_a_row} steps in a row were not finite and have been skipped, more than max_skipped_steps "
                f"{self.max_skipped_steps}; in step {step} the first figure that is not finite was {culprit}: check "
                "it, or lower learning_rate"
            )
        if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
            row = f"{self.in_a_row} in a row, max_skipped_steps is {self.max_skipped_steps}"
            print(f"step {step} is skipped, it is not finite: {culprit} ({row})", file=sys.stderr)

    def report(self) -> dict[str, float]:
        """The steps skipped since the last line of metrics; nothing if there were none."""
        skipped, self.unreported = self.unreported, 0
        return {"skipped_steps": float(skipped)} if skipped else {}

    def _culprit(self) -> str:
        names = gather_objects(next((name for name, finite in self._named if not finite), None))
        for rank, name in enumerate(names):
            if name is not None:
                return f"{name} in process {rank}" if len(names) > 1 else name
        return "the gradient"


class GuardCallback(TrainerCallback):
    """Lets the guard look at each step.

    Args:
        guard: The guard.
        skip: Called in a bad step with its optimizer, whose step must then do nothing.
        forget: Called after a bad step, to drop the metrics that it recorded.

    With float16 a loss scaler skips steps by itself, as it should while it looks for its scale.
    """

    def __init__(self, guard: NonFiniteGuard, skip: Callable[[Any], None], forget: Callable[[], None]):
        self.guard = guard
        self.skip = skip
        self.forget = forget

    def on_pre_optimizer_step(
        self, args: Any, state: TrainerState, control: TrainerControl, optimizer: Any, **kwargs: Any
    ) -> None:
        if not args.fp16:
            self.guard.judge(optimizer)
            if self.guard.step_is_bad:
                self.skip(optimizer)

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.guard.step_is_bad:
            self.forget()
        self.guard.count(state.global_step - 1)
