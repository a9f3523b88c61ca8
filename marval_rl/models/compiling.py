"""What spares a GPU the host's time: compiled transformer blocks, and generations captured as CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_layers import GradientCheckpointingLayer

from marval_rl.models.masked import MaskedModel
from marval_rl.models.sampling import student_tokens

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


class CapturedGenerations:
    """Generates a student's images by a CUDA graph of all unmasking steps, one for each batch size and K.

    A small batch leaves a GPU waiting for the host, which launches thousands of kernels; a graph is one launch. The
    first batch of its kind is captured, which takes as long as a few generations. `generate` uses it where a model has
    one.

    Args:
        student: A one-step student on a GPU. Its weights may change between generations, not move.
    """

    def __init__(self, student: MaskedModel) -> None:
        self.student = student
        self._graphs: dict[Hashable, Any] = {}
        self._pool: Any = None  # memory that all graphs share: one is replayed at a time

    def tokens(
        self,
        class_labels: Tensor | None,
        order: Tensor,
        noise: Tensor,
        num_unmasking_steps: int,
        autocast_dtype: torch.dtype | None,
    ) -> Tensor:
        """Tokens [B, L, C] from class_labels [B], order [B, L] and noise z [B, L, C]."""

        def run(order: Tensor, noise: Tensor, class_labels: Tensor | None = None) -> Tensor:
            inputs: dict[str, Any] = {"order": order, "noise": noise, "class_labels": class_labels}
            with torch.autocast(order.device.type, autocast_dtype, enabled=autocast_dtype is not None):
                return student_tokens(self.student, inputs, num_unmasking_steps)

        given = (order, noise) if class_labels is None else (order, noise, class_labels)
        kind = (len(order), class_labels is None, num_unmasking_steps, autocast_dtype)
        if kind not in self._graphs:
            own = tuple(tensor.clone() for tensor in given)  # the graph reads its inputs from here
            self._pool = self._pool or torch.cuda.graph_pool_handle()
            self._graphs[kind] = torch.cuda.make_graphed_callables(run, own, pool=self._pool)
        return self._graphs[kind](*given).clone()  # the next generation writes into the same memory
