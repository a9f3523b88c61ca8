"""Exponential moving average of weights, with a warm-up so that early samples are not those of the initial weights."""

from __future__ import annotations

import copy

import torch
from torch import nn

from marval_rl.runtime.distributed import whole_in_chunks


class ExponentialMovingAverage:
    """Keeps `module`, an averaged copy of the model: w_ema <- d w_ema + (1 - d) w after each update.

    The copy is whole on every process and keeps the precision it began with, whatever an engine does to the model.

    Args:
        model: The model to follow; the average starts as a copy of it.
        decay: d, in 0..1.
        warmup: Use min(decay, (1 + n) / (10 + n)) at update n. Without it an average of 0.9999 is noise for 10,000
            steps.
    """

    def __init__(self, model: nn.Module, decay: float, warmup: bool = True):
        if not 0 <= decay < 1:
            raise ValueError(f"ema_decay must lie in [0, 1), not {decay}")
        self.module = copy.deepcopy(model).eval().requires_grad_(False)
        self.decay = decay
        self.warmup = warmup
        self.num_updates = 0

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Move the average towards the parameters of `model`. All processes must call it."""
        self.num_updates += 1
        decay = min(self.decay, (1 + self.num_updates) / (10 + self.num_updates)) if self.warmup else self.decay
        averages = self.module.parameters()
        for parameters in whole_in_chunks(model.parameters()):
            chunk = [next(averages) for _ in parameters]
            current = [p.detach().to(average.dtype) for p, average in zip(parameters, chunk, strict=True)]
            torch._foreach_lerp_(chunk, current, 1 - decay)
