"""A GPU that computes nothing: shapes, types and devices as on "cuda", on a machine without one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode


class FusedAttention(TorchFunctionMode):
    """Attention as on a GPU; on a machine without one PyTorch would keep the attention weights of all pairs."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention and args[0].device.type == "cuda":
            dropout = (kwargs or {}).get("dropout_p", 0.0)
            return torch.ops.aten._scaled_dot_product_efficient_attention(*args, None, True, dropout)[0]
        return func(*args, **(kwargs or {}))


@contextmanager
def autocast_to(dtype: torch.dtype | None, device_type: str) -> Iterator[None]:
    """`torch.autocast`, which for "cuda" does nothing without a GPU; None does nothing anywhere."""
    if dtype is None:
        yield
        return
    torch.set_autocast_dtype(device_type, dtype)
    torch.set_autocast_enabled(device_type, True)
    torch.autocast_increment_nesting()
    try:
        yield
    finally:
        torch.autocast_decrement_nesting()
        torch.clear_autocast_cache()
        torch.set_autocast_enabled(device_type, False)
