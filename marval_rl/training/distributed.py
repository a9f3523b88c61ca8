"""A failure in one process that all processes must hear of."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from marval_rl.errors import RewardError


@contextmanager
def failing_together(device: torch.device) -> Iterator[None]:
    """Where a reward fails in one process, raise RewardError in all: none waits for gradients that never come, and all
    write their part of the checkpoint."""
    failure: RewardError | None = None
    try:
        yield
    except RewardError as error:
        failure = error
    if torch.distributed.is_initialized():
        failed = torch.tensor(float(failure is not None), device=device)
        torch.distributed.all_reduce(failed, torch.distributed.ReduceOp.MAX)
        if failed and failure is None:
            failure = RewardError("a reward failed in another process")
    if failure is not None:
        raise failure
