"""The memory a training step takes, without taking it: parameters on the meta device, activations of fake tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily

from marval_rl.models import MARConfig, MARModel
from marval_rl.models.diffusion import forget_tensors, make_schedule
from marval_rl.models.mar import new_head
from marval_rl.trainers.lora import add_lora

FLOAT32 = 4
COLUMNS = ("weights", "gradients", "optimizer", "average", "frozen", "activations", "total")
STAGES = ("DDP", "ZeRO-1", "ZeRO-2", "ZeRO-3")


@dataclass
class Footprint:
    """Parameters by what training keeps for them, and the activations of a micro-batch.

    trained: parameters that are updated. averaged: parameters of the weight average. frozen: name -> parameters of the
    networks that are only looked at. activations: bytes that a micro-batch keeps for its backward pass. held:
    parameters of the trained networks that stay as they are: the student's own, with adapters.
    """

    trained: int
    averaged: int
    frozen: dict[str, int]
    activations: int
    held: int = 0


def memory_table(footprint: Footprint, half: bool, num_processes: int) -> list[str]:
    """Lines of a table: memory of each process by ZeRO stage (arXiv 1910.02054, section 5 and figure 1).

    DDP keeps weights, gradients and Adam's two moments in float32 (16 bytes a parameter). DeepSpeed with `half`, which
    is bf16 or fp16, keeps 2 + 2 bytes of weights and gradients and 12 of optimizer state (float32 weights and moments).
    Stage 1 shards the optimizer, 2 the gradients too, 3 the weights too; weights that are held have neither gradients
    nor optimizer. Frozen networks and the weight average are float32, in each process.
    """
    average = FLOAT32 * footprint.averaged
    frozen = FLOAT32 * sum(footprint.frozen.values())
    rows = []
    for stage, name in enumerate(STAGES):
        widths = (2, 2, 12) if half and stage > 0 else (4, 4, 8)
        shares = [num_processes if stage >= first else 1 for first in (3, 2, 1)]  # weights, gradients, optimizer
        kept = (footprint.trained + footprint.held, footprint.trained, footprint.trained)
        parts = [count * width / share for count, width, share in zip(kept, widths, shares, strict=True)]
        parts += [average, frozen, footprint.activations]
        rows.append((name, [*parts, sum(parts)]))
    unit, size = ("GiB", 2**30) if rows[0][1][-1] >= 2**30 else ("MiB", 2**20)
    lines = ["".join([f"  {unit:8s}", *(f"{column:>13s}" for column in COLUMNS)])]
    return lines + ["".join([f"  {name:8s}", *(f"{part / size:13.2f}" for part in parts)]) for name, parts in rows]


def count_parameters(make: Callable[[], nn.Module]) -> int:
    """Parameters of a network that is built on the meta device, without memory."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in make().parameters())


def mar_parameters(config: MARConfig) -> int:
    return count_parameters(lambda: MARModel(config))


def head_parameters(config: MARConfig) -> int:
    return count_parameters(lambda: new_head(config))


def adapter_parameters(config: MARConfig, peft_config: LoraConfig) -> int:
    """Parameters of the adapters alone."""
    student = adapted_on_meta(config, peft_config)
    return sum(parameter.numel() for parameter in student.parameters() if parameter.requires_grad)


def adapted_on_meta(config: MARConfig, peft_config: LoraConfig) -> MARModel:
    """A student with adapters on the meta device."""
    with unset_fake_temporarily(), torch.device("meta"):  # peft moves adapters, which fake tensors do not allow
        student = MARModel(config)
        add_lora(student, peft_config, seed=0)
    return student


def saved_bytes(
    make_networks: Callable[[], Iterable[nn.Module]], run: Callable[..., Any], config: MARConfig, half: bool
) -> int:
    """Bytes that autograd keeps for the backward pass of `run(*networks)`; nothing is computed.

    Counts each storage once and leaves the parameters out; with `half`, which is bf16 or fp16, it counts the copies of
    weights that autocast makes. Buffers that live only within one operation come on top.
    """
    make_schedule(config.num_train_timesteps)  # cached: it must be made before the fake mode, not in it
    kept: dict[int, torch.UntypedStorage] = {}
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            networks = list(make_networks())
            parameters = {_key(p) for network in networks for p in network.parameters()}

            def keep(tensor: Tensor) -> Tensor:
                if _key(tensor) not in parameters:
                    kept[_key(tensor)] = tensor.untyped_storage()  # held, so that no key is given to another
                return tensor

            hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
            with hooks, torch.autocast("cpu", torch.bfloat16, enabled=half):
                result = run(*networks)  # held while we count: its graph owns the saved tensors
                total = sum(storage.nbytes() for storage in kept.values())
            del result
    finally:
        forget_tensors()
    return total


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
