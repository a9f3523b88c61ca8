"""Parameter groups."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainingArguments


def decay_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """MAR's two groups: no decay for vectors, biases and the whole diffusion head; `weight_decay` for all else."""
    decayed, others = [], []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        exempt = parameter.ndim == 1 or name.endswith(".bias") or "diffloss" in name
        (others if exempt else decayed).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]


def adamw(groups: list[dict[str, Any]], args: TrainingArguments) -> torch.optim.Optimizer:
    """The optimizer that `args.optim` names, on our own parameter groups."""
    optimizer_class, options = Trainer.get_optimizer_cls_and_kwargs(args)
    return optimizer_class(groups, **options)
