"""The tiny MaskGen-KL and TA-TiTok of the official reference figures, their weights, and how close ours must come."""

from __future__ import annotations

import functools
import json
import math
import zlib
from pathlib import Path

import torch
from mar_reference import relative_l2
from safetensors.torch import load_file
from torch import Tensor, nn

from marval_rl.models.maskgen.config import MaskGenConfig
from marval_rl.models.maskgen.model import MaskGenModel
from marval_rl.models.maskgen.prompts import PromptFeatures
from marval_rl.models.maskgen.tatitok import TATiTokConfig, TATiTokModel
from marval_rl.models.unmasking import visible_positions

GOLDEN = Path(__file__).parent / "golden" / "maskgen"
WEIGHTS = ("crc", "stable")
UNIT_NORMS = ("norm", "norm1", "norm2", "z_proj_ln", "in_ln", "ln_pre", "ln_post", "ln_1", "ln_2", "ln_final")
ONE_PASS, GRADIENT, STEPS, GENERATION = 2e-5, 1e-4, 5e-4, 2e-3  # relative L2
LATENT_SCALE = 0.7525


@functools.cache
def golden(name: str) -> dict[str, Tensor]:
    """The arrays of golden/maskgen/{name}.safetensors."""
    return load_file(GOLDEN / f"{name}.safetensors")


@functools.cache
def facts() -> dict:
    """The figures that are no arrays."""
    return json.loads((GOLDEN / "maskgen.json").read_text())


def tiny_config(**overrides) -> MaskGenConfig:
    sizes = {
        "image_size": 32,
        "num_tokens": 12,
        "text_width": 48,
        "text_length": 10,
        "micro_condition_size": 32,
        "hidden_size": 64,
        "num_layers": 3,
        "num_heads": 4,
        "head_hidden_size": 64,
        "head_num_layers": 2,
    }
    return MaskGenConfig(**{**sizes, **overrides})


def drawn_by_rule(name: str, shape: torch.Size) -> Tensor:
    """See golden/maskgen/README.md."""
    if len(shape) <= 1:
        std = 0.1
    elif name.endswith("weight") and "embedding" not in name:
        std = 1 / math.sqrt(math.prod(shape[1:]))
    else:
        std = 0.5
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    tensor = torch.empty(shape).normal_(0, std, generator=generator)
    return tensor + 1 if name.endswith(tuple(f"{norm}.weight" for norm in UNIT_NORMS)) else tensor


def load_by_rule(module: nn.Module, **replaced: Tensor) -> nn.Module:
    state = {name: drawn_by_rule(name, tensor.shape) for name, tensor in module.state_dict().items()}
    module.load_state_dict({**state, **replaced}, strict=True)
    return module.eval()


def reference_prompts(null_score: bool = True) -> PromptFeatures:
    """The three prompts of the figures, with their scores."""
    figures = golden("transformer")
    return PromptFeatures(
        ["first", "second", "third"],
        torch.cat([figures["text"], figures["null_text"]]),
        torch.cat([figures["pooled"], figures["null_pooled"]]).squeeze(1),
        scores=figures["aesthetic"],
    )


def reference_model(weights: str) -> MaskGenModel:
    """A new tiny model in eval mode with the weights "crc" or "stable", loaded strictly, and the figures' prompts."""
    model = MaskGenModel(tiny_config())
    load_by_rule(model, **(golden("weights_stable") if weights == "stable" else {}))
    model.set_prompts(reference_prompts())
    return model


def reference_tokenizer(uneven: bool = False, **overrides) -> TATiTokModel:
    sizes = {"image_size": 32, "patch_size": 8, "num_tokens": 12, "text_width": 48, "text_length": 10}
    encoder = {"encoder_hidden_size": 48, "encoder_num_layers": 2, "encoder_num_heads": 4}
    decoder = {"decoder_hidden_size": 48, "decoder_num_layers": 2, "decoder_num_heads": 4}
    if uneven:
        decoder = {"decoder_hidden_size": 64, "decoder_num_layers": 3, "decoder_num_heads": 8}
    return load_by_rule(TATiTokModel(TATiTokConfig(**{**sizes, **encoder, **decoder, **overrides})))


def order_of(mask: Tensor) -> tuple[Tensor, int]:
    """An order whose first entries are those that mask [B, L] hides, and their number."""
    return mask.argsort(dim=1, descending=True, stable=True), int(mask[0].sum())


def assert_close(actual: Tensor, expected: Tensor, tolerance: float = ONE_PASS) -> None:
    """Relative L2 over the whole array."""
    error = relative_l2(actual.float(), expected.float())
    assert error <= tolerance, f"relative L2 {error:.2e} > {tolerance:.0e}"


def all_conditions(
    model: MaskGenModel,
    tokens: Tensor,
    labels: Tensor | None,
    order: Tensor,
    num_masked: int,
    drop_mask: Tensor | None = None,
) -> Tensor:
    """z [B, L, D] of all tokens, also of the known ones."""
    everything = torch.arange(order.shape[1]).expand(len(order), -1)
    return model.conditions_of(tokens, labels, visible_positions(order, num_masked), everything, drop_mask, False)
