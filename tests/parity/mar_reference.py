"""The tiny model of the official reference figures, its weights, and how close ours must come to them."""

from __future__ import annotations

import functools
import json
import math
import zlib
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from marval_rl.models import MARConfig, MARModel
from marval_rl.models.unmasking import visible_positions

GOLDEN = Path(__file__).parent / "golden"
WEIGHTS = ("crc", "stable")
UNIT_NORMS = ("norm", "norm1", "norm2", "z_proj_ln", "in_ln", "encoder_norm", "decoder_norm", "norm_out")

# One pass through a network; a reverse chain; a whole generation. See golden/README.md for where they come from.
RTOL, ATOL = 1e-4, 1e-5
CHAIN_TOLERANCE = 2e-4
GENERATION_TOLERANCE = 2e-3


@functools.cache
def golden(name: str) -> dict[str, Tensor]:
    """The arrays of golden/{name}.safetensors."""
    return load_file(GOLDEN / f"{name}.safetensors")


@functools.cache
def golden_facts() -> dict:
    """The figures that are no arrays."""
    return json.loads((GOLDEN / "mar.json").read_text())


def tiny_config() -> MARConfig:
    return MARConfig(
        image_size=64,
        latent_stride=16,
        latent_channels=16,
        num_classes=10,
        buffer_size=4,
        encoder_hidden_size=64,
        encoder_num_layers=2,
        encoder_num_heads=4,
        decoder_hidden_size=64,
        decoder_num_layers=2,
        decoder_num_heads=4,
        head_hidden_size=64,
        head_num_layers=2,
        attention_dropout=0.0,
        projection_dropout=0.0,
    )


def reference_model(weights: str) -> MARModel:
    """A new tiny model in eval mode with the weights "crc" or "stable", loaded strictly."""
    model = MARModel(tiny_config())
    if weights == "stable":
        state = golden("weights_stable")
    else:
        state = {name: drawn_by_rule(name, tensor.shape) for name, tensor in model.state_dict().items()}
    model.load_state_dict(state, strict=True)
    return model.eval()


def drawn_by_rule(name: str, shape: torch.Size) -> Tensor:
    if len(shape) < 2:
        std = 0.1
    elif name.endswith(".weight") and name != "class_emb.weight":
        std = 1 / math.sqrt(math.prod(shape[1:]))
    else:
        std = 0.5
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    tensor = torch.empty(shape).normal_(0, std, generator=generator)
    return tensor + 1 if name.endswith(tuple(f"{norm}.weight" for norm in UNIT_NORMS)) else tensor


def assert_parity(actual: Tensor, expected: Tensor, scale: float | Tensor = 1.0) -> None:
    """What one pass through a network must meet. `scale` is that of the numbers whose difference the result is."""
    torch.testing.assert_close(actual, expected, rtol=RTOL, atol=ATOL * float(scale))


def meets_parity(actual: Tensor, expected: Tensor) -> bool:
    """Whether `assert_parity` would pass; for the controls, which must not."""
    return torch.allclose(actual, expected, rtol=RTOL, atol=ATOL)


def relative_l2(actual: Tensor, expected: Tensor) -> float:
    """|actual - expected| / |expected| over the whole array."""
    assert actual.shape == expected.shape
    return ((actual - expected).norm() / expected.norm()).item()


def encode(model: MARModel, tokens: Tensor, class_embedding: Tensor, order: Tensor, num_masked: int) -> Tensor:
    """The encoder's output while the first num_masked tokens of the order are masked."""
    return model.encode(tokens, class_embedding, visible_positions(order, num_masked))


def decode_all(model: MARModel, encoded: Tensor, order: Tensor, num_masked: int) -> Tensor:
    """The conditions of all tokens, also of those that are known."""
    everything = torch.arange(order.shape[1]).expand(len(order), -1)
    return model.decode(encoded, visible_positions(order, num_masked), everything)
