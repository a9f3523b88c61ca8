"""Compiling a model's transformer blocks, each kind once, for any number of tokens and images."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers.modeling_layers import GradientCheckpointingLayer

from marval_rl.models.masked import MaskedModel

# Versions of a block that a run may need: of encoder and decoder, with all rows or some, of a batch of one or of one
# token, with and without a gradient, in training and evaluation. Blocks of all models share one count.
MOST_VERSIONS = 64


def compile_blocks(*models: MaskedModel, compiler: str | Callable[..., Any] = "inductor") -> None:
    """Compiles the blocks in place by `torch.compile`.

    The networks around them stay as they are: a generation meets as many lengths as it has unmasking steps, and a
    compiler that makes a version for each gives up after eight (torch's recompile_limit) and runs without it, silently.
    Here the lengths are dynamic from the start, and blocks of a kind share what was compiled. A compiled function that
    would be compiled again too often raises an error.

    Args:
        models: Teachers or students.
        compiler: torch.compile's `backend`.
    """
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    torch._dynamo.config.recompile_limit = MOST_VERSIONS
    for model in models:
        for block in model.modules():
            if isinstance(block, GradientCheckpointingLayer):
                block.compile(dynamic=True, backend=compiler)
