"""What a step does to the weights: parameter groups, some of which sit out a step, and the moving average."""

from __future__ import annotations

import copy
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from marval_rl.models import MaskedModel
from marval_rl.runtime.distributed import gathered_in_chunks

# The networks that a trainer's parameter groups belong to: the one that is averaged and saved, and its companion.
MODEL = "model"
AUXILIARY = "auxiliary"
NETWORKS = (MODEL, AUXILIARY)


def decay_groups(model: MaskedModel, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups: `weight_decay` for the parameters that the model says decay, none for the others."""
    decayed: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        (decayed if model.decays(name, parameter) else others).append(parameter)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    return [{**group, "network": MODEL} for group in groups]


def make_optimizer(groups: list[dict[str, Any]], args: TrainingArguments) -> torch.optim.Optimizer:
    """The optimizer that `args.optim` names, on our own parameter groups; `pause` says which of them sit out a step.

    Each group names its "network", one of NETWORKS.
    """
    optimizer_class, options = Trainer.get_optimizer_cls_and_kwargs(args)
    optimizer = optimizer_class([{**group, "paused": False} for group in groups], **options)
    _hide_paused_gradients(optimizer)
    return optimizer


def pause(optimizer: torch.optim.Optimizer, networks: Collection[str]) -> None:
    """From now on no step moves the parameters of these networks nor the optimizer's state of them; of all others it
    does. With NETWORKS a step does nothing at all.

    Args:
        optimizer: One of `make_optimizer`, bare or in the wrappers of accelerate and DeepSpeed, which share its groups.
        networks: Their names.
    """
    for group in optimizer.param_groups:
        group["paused"] = group["network"] in networks


def _hide_paused_gradients(optimizer: torch.optim.Optimizer) -> None:
    """Hide the gradients of paused groups from each step: torch's optimizers pass over a parameter without one.

    A plain run has none there, but ZeRO replaces missing gradients by zeros, with which Adam's momentum would
    keep moving the weights, and its second moment would decay. ZeRO steps the optimizer on one group at a time; with
    offload it keeps using the same gradient tensors, so they are put back.
    """
    hidden: list[tuple[Tensor, Tensor | None]] = []

    def hide(stepping: torch.optim.Optimizer, *_: Any) -> None:
        for group in stepping.param_groups:
            if group["paused"]:
                hidden.extend((parameter, parameter.grad) for parameter in group["params"])
        for parameter, _gradient in hidden:
            parameter.grad = None

    def put_back(*_: Any) -> None:
        for parameter, gradient in hidden:
            parameter.grad = gradient
        hidden.clear()

    optimizer.register_step_pre_hook(hide)
    optimizer.register_step_post_hook(put_back)


class ExponentialMovingAverage:
    """Keeps `module`, an averaged copy of the model: w_ema <- d w_ema + (1 - d) w after each update.

    The copy is complete on every process and keeps the precision it began with, whatever an engine does to the model.

    Args:
        model: The model to follow; the average starts as a copy of it.
        decay: d, in 0..1.
        warmup: Use min(decay, (1 + n) / (10 + n)) at update n. Without it an average of 0.9999 is noise for 10,000
            steps.
    """

    def __init__(self, model: nn.Module, decay: float, warmup: bool = True):
        if not 0 <= decay < 1:
            raise ValueError(f"ema_decay must lie in [0, 1), not {decay}")
        self.module: Any = copy.deepcopy(model).eval().requires_grad_(False)
        self.decay = decay
        self.warmup = warmup
        self.num_updates = 0

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Move the average towards the parameters of `model`. All processes must call it."""
        self.num_updates += 1
        decay = min(self.decay, (1 + self.num_updates) / (10 + self.num_updates)) if self.warmup else self.decay
        averages = self.module.parameters()
        for parameters in gathered_in_chunks(model.parameters()):
            chunk: list[Tensor] = [next(averages) for _ in parameters]
            current = [p.detach().to(average.dtype) for p, average in zip(parameters, chunk, strict=True)]
            torch._foreach_lerp_(chunk, current, 1 - decay)
