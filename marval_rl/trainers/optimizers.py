"""Parameter groups, and how some of them sit out a step."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

# The networks that a trainer's parameter groups belong to: the one that is averaged and saved, and its companion.
MODEL = "model"
AUXILIARY = "auxiliary"
NETWORKS = (MODEL, AUXILIARY)


def decay_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """MAR's two groups: no decay for vectors, biases and the whole diffusion head; `weight_decay` for all else."""
    decayed, others = [], []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        exempt = parameter.ndim == 1 or name.endswith(".bias") or "diffloss" in name
        (others if exempt else decayed).append(parameter)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    return [{**group, "network": MODEL} for group in groups]


def adamw(groups: list[dict[str, Any]], args: TrainingArguments) -> torch.optim.Optimizer:
    """The optimizer that `args.optim` names, on our own parameter groups; `rest` says which of them sit out a step.

    Each group names its "network", one of NETWORKS.
    """
    optimizer_class, options = Trainer.get_optimizer_cls_and_kwargs(args)
    optimizer = optimizer_class([{**group, "resting": False} for group in groups], **options)
    _heed_resting_groups(optimizer)
    return optimizer


def rest(optimizer: torch.optim.Optimizer, networks: Collection[str]) -> None:
    """From now on no step moves the parameters of these networks nor the optimizer's state of them; of all others it
    does. With NETWORKS a step does nothing at all.

    Args:
        optimizer: One that `adamw` made, bare or in the wrappers of accelerate and DeepSpeed, which share its groups.
    """
    for group in optimizer.param_groups:
        group["resting"] = group["network"] in networks


def _heed_resting_groups(optimizer: torch.optim.Optimizer) -> None:
    """Hide the gradients of resting groups from each step: torch's optimizers pass over a parameter without one.

    A plain run has none there anyhow, but ZeRO makes zeros of what is missing, with which Adam's momentum would go on
    moving the weights, and its second moment would decay. ZeRO steps the optimizer on one group at a time; with offload
    it keeps using the same gradient tensors, so they are put back.
    """
    hidden: list[tuple[nn.Parameter, Tensor | None]] = []

    def hide(stepping: torch.optim.Optimizer, *_: Any) -> None:
        for group in stepping.param_groups:
            if group["resting"]:
                hidden.extend((parameter, parameter.grad) for parameter in group["params"])
        for parameter, _ in hidden:
            parameter.grad = None

    def put_back(*_: Any) -> None:
        for parameter, gradient in hidden:
            parameter.grad = gradient
        hidden.clear()

    optimizer.register_step_pre_hook(hide)
    optimizer.register_step_post_hook(put_back)
