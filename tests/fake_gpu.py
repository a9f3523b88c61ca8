"""Runs code on "cuda" without a GPU: torch's fake tensors, which know shapes, types and devices and hold no values.

A tensor on the wrong device, or of a type that an operation refuses, raises as it would on a GPU. What would make the
host wait for the device is recorded with the function that asked for it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from marval_rl.models import generation
from marval_rl.models.diffusion import forget_tensors, make_schedule
from marval_rl.models.sampling import draw_rollout_noise
from marval_rl.recipes.planning.fake_device import FusedAttention, autocast_to
from marval_rl.trainers import grpo
from marval_rl.trainers.distill import DistillTrainer
from marval_rl.trainers.reward_trainer import RewardTrainer

ROOT = Path(__file__).parents[1]
OURS = (ROOT / "marval_rl", ROOT / "rewards")
STAND_INS = ROOT / "marval_rl" / "recipes" / "planning"
CUDA = torch.device("cuda", 0)


class HostWaits(TorchDispatchMode):
    """Records who reads a value from the GPU, and answers 1 or True in its place."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        reads_value = func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.equal.default)
        if reads_value:
            if args[0].device.type == "cuda":
                self.found.add(_who_asked())
            return True if args[0].dtype == torch.bool or func is torch.ops.aten.equal.default else 1
        result = func(*args, **kwargs)
        if func in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default):
            source = args[-1] if func is torch.ops.aten.copy_.default else args[0]
            if source.device.type == "cuda" and result.device.type == "cpu":
                self.found.add(_who_asked())
        return result


def _who_asked() -> str:
    """module.function of the innermost function of ours on the stack."""
    frame = sys._getframe(2)
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        for folder in OURS:
            if path.is_relative_to(folder) and not path.is_relative_to(STAND_INS):
                module = ".".join(path.relative_to(folder).with_suffix("").parts)
                return f"{module}.{frame.f_code.co_qualname.partition('.<locals>')[0]}"
        frame = frame.f_back
    return "a test"


def _drawn_on_gpu(*args: Any) -> dict[str, torch.Tensor]:
    return {name: values.to(CUDA) for name, values in draw_rollout_noise(*args).items()}


@contextmanager
def fake_gpu(bf16: bool = False) -> Iterator[HostWaits]:
    """Within it "cuda" is a device that computes nothing; with bf16, under autocast to it."""
    make_schedule(1000)  # cached; made of numbers, so before the fake mode
    waits = HostWaits()
    try:
        with (
            pytest.MonkeyPatch.context() as patch,
            FakeTensorMode(allow_non_fake_inputs=True),
            waits,
            FusedAttention(),
            autocast_to(torch.bfloat16 if bf16 else None, "cuda"),
        ):
            # No generator can be made for a device that is not there; fake draws take one of the CPU.
            for module in (generation, grpo):
                patch.setattr(module, "derive_generator", lambda *_: torch.Generator())
            patch.setattr(grpo, "draw_rollout_noise", _drawn_on_gpu)
            patch.setattr(torch.cuda, "get_rng_state", lambda device: None)
            patch.setattr(torch.cuda, "set_rng_state", lambda state, device: None)
            yield waits
    finally:
        forget_tensors()


def move(network: nn.Module) -> nn.Module:
    """Puts the weights on the fake GPU, in place."""
    state = network.state_dict()
    network.load_state_dict({n: torch.empty_like(t, device=CUDA) for n, t in state.items()}, assign=True)
    return network


def move_trainer(trainer: Any) -> None:
    """Puts a trainer of the CPU on the fake GPU, with all that it holds."""
    trainer.args.__class__ = type("OnGPU", (type(trainer.args),), {"device": CUDA})
    networks = [trainer.model, trainer.ema.module]
    if isinstance(trainer, DistillTrainer):
        networks.append(trainer.matching.teacher)
    if isinstance(trainer, RewardTrainer):
        anchors = trainer.anchors
        networks += [anchors.reference] if anchors.reference is not None else []
        networks += [anchors.gsim.teacher] if anchors.gsim is not None else []
        if anchors.distribution is not None:
            real = anchors.distribution.real
            anchors.distribution.set_of = anchors.distribution.set_of.to(CUDA)
            for by_class in (real.by_class, real.self_similarity):
                by_class.update({label: rows.to(CUDA) for label, rows in by_class.items()})
    for network in networks:
        trained = {name: parameter.requires_grad for name, parameter in network.named_parameters()}
        move(network)
        for name, parameter in network.named_parameters():
            parameter.requires_grad_(trained[name])


def take_step(trainer: Any, step: int) -> None:
    """One optimizer step as `train` takes it, with the guard's look at the gradients.

    Gradients are put in place of a backward pass: PyTorch's engine wants streams of a real device.
    """

    def backward(loss: torch.Tensor) -> None:
        assert loss.requires_grad
        for parameter in trainer.model.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.empty_like(parameter)

    trainer.accelerator.backward = backward
    trainer.state.global_step, trainer.last_step = step, -1
    # As transformers' loop has them.
    trainer._tr_loss, trainer.current_gradient_accumulation_steps = torch.zeros((), device=CUDA), 1
    rows = [trainer.train_dataset[index] for index in range(trainer.args.rows_per_batch)]
    inputs = trainer.data_collator(rows)
    optimizer = trainer.create_optimizer()
    loss = trainer.training_step(trainer.model, inputs)
    assert loss.device == CUDA and loss.shape == ()
    trainer.guard.judge(optimizer)
    optimizer.step()
    trainer.update_average()
    optimizer.zero_grad()
