"""Times taken in turn, and what the machine can do at best."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from marval_rl.evaluation.speed import seconds_of
from marval_rl.models.matmul import quick_products

MATRIX_SIZE = {"cpu": 1024, "cuda": 8192}
COPIED_BYTES = {"cpu": 2**28, "cuda": 2**31}
MACHINE_REPEATS = 5


@dataclass(frozen=True)
class Times:
    """Seconds of several runs."""

    seconds: list[float]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        """(slowest - fastest) / median: how far the median can be trusted."""
        return (max(self.seconds) - min(self.seconds)) / self.median


def in_turn(functions: Mapping[str, Callable[[], object]], repeats: int, device: torch.device) -> dict[str, Times]:
    """Seconds of each function. All are warmed up first, then run in turn, so that a slow phase of the machine affects
    all of them."""
    for function in functions.values():
        function()
    rounds = [{name: seconds_of(function, device) for name, function in functions.items()} for _ in range(repeats)]
    return {name: Times([one[name] for one in rounds]) for name in functions}


def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations per second of a large matrix product."""
    size = MATRIX_SIZE[device.type]
    a = torch.randn(size, size, device=device, dtype=dtype)

    def multiply() -> None:
        with quick_products(device, size, size):
            a @ a

    return 2 * size**3 / in_turn({"product": multiply}, MACHINE_REPEATS, device)["product"].median


def bandwidth(device: torch.device) -> float:
    """Bytes per second that are read and written by a copy within the device's memory."""
    source = torch.zeros(COPIED_BYTES[device.type] // 4, device=device)
    target = torch.empty_like(source)
    times = in_turn({"copy": lambda: target.copy_(source)}, MACHINE_REPEATS, device)["copy"]
    return 2 * COPIED_BYTES[device.type] / times.median
