"""What the processes of a training run do together: gather rows, metrics and weights, and fail."""

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
    """Concatenate the rows of all processes, [n, ...] in each, in the order of their ranks; no gradient flows.

    Every process must have the same number of rows. A single process gets its own back.
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


def gather_objects(value: Any) -> list[Any]:
    """The values of all processes, in the order of their ranks; they must be picklable. All processes must call it."""
    if not torch.distributed.is_initialized():
        return [value]
    gathered: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(gathered, value)
    return gathered


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
    totals: dict[str, list[tuple[float, int]]] = defaultdict(list)
    for part in gather_objects(own):
        for name, total in part.items():
            totals[name].append(total)
    sums = {name: (math.fsum(s for s, _ in listed), sum(n for _, n in listed)) for name, listed in totals.items()}
    return {name: total / count for name, (total, count) in sums.items() if count}


@contextmanager
def failing_together(device: torch.device, *error_types: type[MarvalError]) -> Iterator[None]:
    """Where one process raises an error of these types (RewardError if none is given), raise one in all of them: none
    waits for gradients that never come, and all write their part of the checkpoint."""
    error_types = error_types or (RewardError,)
    failure: MarvalError | None = None
    try:
        yield
    except error_types as error:
        failure = error
    if not in_any_process(failure is not None, device):
        return
    failures = gather_objects(failure and type(failure)(str(failure)))
    if failure is None:
        rank, cause = next((rank, error) for rank, error in enumerate(failures) if error is not None)
        failure = type(cause)(f"process {rank} failed: {cause}")
    raise failure


def is_partitioned(parameter: nn.Parameter) -> bool:
    """Whether ZeRO-3 keeps only this process's part of the parameter; DeepSpeed, too, looks for this attribute."""
    return hasattr(parameter, "ds_id")


@contextmanager
def gathered_weights(module: nn.Module) -> Iterator[None]:
    """Within this context ZeRO-3's parameters are complete on every process, for passes without gradients; what
    is written to them is lost. Without ZeRO-3 it does nothing. All processes must enter it."""
    parameters = [parameter for parameter in module.parameters() if is_partitioned(parameter)]
    if not parameters:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(parameters), _without_hooks(module):
        yield


def gathered_in_chunks(parameters: Iterable[nn.Parameter], max_numel: int = 1 << 26) -> Iterator[list[nn.Parameter]]:
    """Yield the parameters in lists, in their order; those of the current list are complete on every process.

    Under ZeRO-3 a list holds at most `max_numel` elements, or one parameter, which bounds the extra memory. Otherwise
    one list holds all. All processes must iterate together.
    """
    listed: list[Any] = list(parameters)  # DeepSpeed adds attributes
    if not any(map(is_partitioned, listed)):
        yield listed
        return
    import deepspeed

    chunk: list[Any] = []
    for parameter, following in zip(listed, [*listed[1:], None], strict=True):
        chunk.append(parameter)
        if following is None or sum(p.ds_numel for p in chunk) + following.ds_numel > max_numel:
            with deepspeed.zero.GatheredParameters(chunk):
                yield chunk
            chunk = []


def forget_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Set ZeRO-3's stored gradients of these parameters to zero; without ZeRO-3 there is nothing to do.

    ZeRO-3 overwrites them only where a step has a gradient. Elsewhere those of an earlier step would count in the norm
    by which all gradients are clipped.
    """
    partitioned: list[Any] = [p for p in parameters if is_partitioned(p) and p.requires_grad]
    if not partitioned:
        return
    from deepspeed.utils import safe_set_local_grad

    for parameter in partitioned:
        safe_set_local_grad(parameter, torch.zeros_like(parameter.ds_tensor))


@contextmanager
def _without_hooks(module: nn.Module) -> Iterator[None]:
    """Within this context no forward hook runs: ZeRO-3's would partition the weights again after each module.

    The hooks are removed and put back without registering them again, so that the engine's record of the order of the
    modules stays the same.
    """
    kept = [(part, part._forward_pre_hooks, part._forward_hooks) for part in module.modules()]
    for part, _, _ in kept:
        part._forward_pre_hooks, part._forward_hooks = OrderedDict(), OrderedDict()
    try:
        yield
    finally:
        for part, before, after in kept:
            part._forward_pre_hooks, part._forward_hooks = before, after
