"""What several processes of one training run do together: gather rows and metrics, see whole weights, and fail."""

from __future__ import annotations

import math
from collections import OrderedDict, defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from marval_rl.errors import MarvalError, RewardError


def gather_rows(values: Tensor) -> Tensor:
    """The rows of all processes, [n, ...] of each, concatenated in the order of their ranks; no gradient flows.

    Every process must give as many rows. One process gets its own rows back.
    """
    if not torch.distributed.is_initialized():
        return values.detach()
    own = values.detach().contiguous()
    parts = [torch.empty_like(own) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(parts, own)
    return torch.cat(parts)


def from_first_process(value: Any) -> Any:
    """The first process's value, in all of them; it must be picklable. All processes must call it."""
    if not torch.distributed.is_initialized():
        return value
    shared = [value]
    torch.distributed.broadcast_object_list(shared, src=0)
    return shared[0]


def in_any_process(flag: bool, device: torch.device) -> bool:
    """Whether the flag is set in at least one process. All processes must call it."""
    if not torch.distributed.is_initialized():
        return flag
    count = torch.tensor(float(flag), device=device)
    torch.distributed.all_reduce(count, torch.distributed.ReduceOp.MAX)
    return bool(count)


def mean_over_processes(values: dict[str, list[Tensor]]) -> dict[str, float]:
    """The mean of each name's values (scalars) over all processes, without those that are NaN.

    The processes may hold different names, and different numbers of values; a name without any is left out. All
    processes must call it.
    """
    own = {}
    for name, listed in values.items():
        stacked = torch.stack(listed).double()
        known = stacked[~stacked.isnan()]
        own[name] = (known.sum().item(), len(known))
    parts: list[dict[str, tuple[float, int]]] = [own]
    if torch.distributed.is_initialized():
        parts = [{}] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(parts, own)
    totals: dict[str, list[tuple[float, int]]] = defaultdict(list)
    for part in parts:
        for name, total in part.items():
            totals[name].append(total)
    sums = {name: (math.fsum(s for s, _ in listed), sum(n for _, n in listed)) for name, listed in totals.items()}
    return {name: total / count for name, (total, count) in sums.items() if count}


@contextmanager
def failing_together(device: torch.device, *error_types: type[MarvalError]) -> Iterator[None]:
    """Where one process raises an error of these types (RewardError if none is given), raise one in all: none waits
    for gradients that never come, and all write their part of the checkpoint."""
    error_types = error_types or (RewardError,)
    failure: MarvalError | None = None
    try:
        yield
    except error_types as error:
        failure = error
    if torch.distributed.is_initialized():
        failed = torch.tensor(float(failure is not None), device=device)
        torch.distributed.all_reduce(failed, torch.distributed.ReduceOp.MAX)
        if failed:
            failures: list[MarvalError | None] = [None] * torch.distributed.get_world_size()
            torch.distributed.all_gather_object(failures, failure and type(failure)(str(failure)))
            if failure is None:
                rank, told = next((rank, told) for rank, told in enumerate(failures) if told is not None)
                failure = type(told)(f"process {rank} failed: {told}")
    if failure is not None:
        raise failure


def is_partitioned(parameter: nn.Parameter) -> bool:
    """Whether ZeRO-3 keeps only this process's part of the parameter; DeepSpeed tells such by their number, too."""
    return hasattr(parameter, "ds_id")


@contextmanager
def whole_weights(module: nn.Module) -> Iterator[None]:
    """Within this context ZeRO-3's parameters are whole on every process, and forward passes without a gradient may be
    run; what is written to them is lost. Without ZeRO-3 it does nothing. All processes must enter it."""
    parameters = [parameter for parameter in module.parameters() if is_partitioned(parameter)]
    if not parameters:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(parameters), _without_hooks(module):
        yield


def whole_in_chunks(parameters: Iterable[nn.Parameter], max_numel: int = 1 << 26) -> Iterator[list[nn.Parameter]]:
    """Lists of the parameters in their order; while a list is out, its parameters are whole on every process.

    Under ZeRO-3 a list holds at most `max_numel` numbers, or one parameter: so much more memory is needed. Else it
    holds all. All processes must go through the lists together.
    """
    parameters = list(parameters)
    if not any(map(is_partitioned, parameters)):
        yield parameters
        return
    import deepspeed

    chunk: list[nn.Parameter] = []
    for parameter, following in zip(parameters, [*parameters[1:], None], strict=True):
        chunk.append(parameter)
        if following is None or sum(p.ds_numel for p in chunk) + following.ds_numel > max_numel:
            with deepspeed.zero.GatheredParameters(chunk):
                yield chunk
            chunk = []


def forget_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Zero what ZeRO-3 keeps of the gradients of these parameters; without ZeRO-3 there is nothing to do.

    It writes over them where a step brings a gradient, and elsewhere takes those of an earlier step for this one's:
    they would count in the norm that all gradients are clipped by.
    """
    partitioned = [p for p in parameters if is_partitioned(p) and p.requires_grad]
    if not partitioned:
        return
    from deepspeed.utils import safe_set_local_grad

    for parameter in partitioned:
        safe_set_local_grad(parameter, torch.zeros_like(parameter.ds_tensor))


@contextmanager
def _without_hooks(module: nn.Module) -> Iterator[None]:
    """Within this context no forward hook runs: ZeRO-3's would take the weights apart again after each module.

    They are set aside and not registered anew, so the engine's record of the order of the modules stays as it is.
    """
    kept = [(part, part._forward_pre_hooks, part._forward_hooks) for part in module.modules()]
    for part, _, _ in kept:
        part._forward_pre_hooks, part._forward_hooks = OrderedDict(), OrderedDict()
    try:
        yield
    finally:
        for part, before, after in kept:
            part._forward_pre_hooks, part._forward_hooks = before, after
