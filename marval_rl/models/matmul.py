"""Float32 matrix products on processors whose units PyTorch's default leaves idle.

PyTorch multiplies float32 by MKL, which does not use AVX-512 on AMD's processors; oneDNN does, and is about twice as
fast there from a million multiplications on. PyTorch hands float32 to oneDNN when it may round to bfloat16, which
oneDNN does only with units for it (AMX): AMD's have none, and the product stays one of float32. That is looked at, not
assumed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

LEAST_WORK = 2**20  # multiplications of a product below which MKL is as fast
QUICK = "medium"  # PyTorch's name of the precision with which it takes oneDNN
CPU_INFO = Path("/proc/cpuinfo")


@cache
def onednn_is_faster() -> bool:
    """Whether products by oneDNN are float32's and faster here: on AMD with AVX-512. A property of the machine alone,
    so that a resumed run multiplies as it did before."""
    if torch.backends.cpu.get_cpu_capability() != "AVX512" or not CPU_INFO.is_file():
        return False
    if "AuthenticAMD" not in CPU_INFO.read_text():
        return False
    values = torch.linspace(-1, 1, 128 * 128).view(128, 128).sin()
    with _precision(QUICK):
        product = values @ values.T
    exact = values.double() @ values.double().T
    return bool((product - exact).abs().max() < 1e-5 * exact.abs().max())  # bfloat16 is off by 1e-3 and more


@contextmanager
def quick_products(device: torch.device, rows: int, width: int) -> Iterator[None]:
    """Within it float32 products on the CPU take the faster of the two libraries; nothing else changes.

    Args:
        device: That of the products.
        rows: Of a typical product.
        width: Its inputs and outputs.
    """
    if device.type != "cpu" or rows * width**2 < LEAST_WORK or not onednn_is_faster():
        yield
        return
    with _precision(QUICK):
        yield


def attention(q: Tensor, k: Tensor, v: Tensor, dropout: float) -> Tensor:
    """Scaled dot-product attention of q [B, H, M, d] over k and v [B, H, L, d]: [B, H, M, d].

    Its own small products are left to MKL within `quick_products`: by oneDNN it is several times slower.
    """
    is_plain = q.device.type == "cpu" and q.dtype == torch.float32 and dropout == 0
    if is_plain and not torch.compiler.is_compiling() and torch.get_float32_matmul_precision() == QUICK:
        return _AttentionByMKL.apply(q, k, v)
    return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout)


class _AttentionByMKL(torch.autograd.Function):
    """PyTorch's attention for CPUs, forward and backward pass with the library that it is quicker with."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with _precision("highest"):
            out, log_sums = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)
        ctx.save_for_backward(q, k, v, out, log_sums)
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        with _precision("highest"):
            return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                gradient, *ctx.saved_tensors, 0.0, False
            )


@contextmanager
def _precision(name: str) -> Iterator[None]:
    # Not torch.backends.mkldnn.matmul.fp32_precision: whoever then asks for the precision of all devices gets an error.
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(name)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
