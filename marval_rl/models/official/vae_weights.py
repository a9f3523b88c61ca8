"""The KL-16 VAE of the official code (kl16.ckpt, latent diffusion's layout) <-> diffusers' `AutoencoderKL`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from marval_rl.errors import CheckpointError
from marval_rl.models.official.reading import weights_of
from marval_rl.models.official.shapes import check_ranks, check_shapes

LATENT_SCALE = 0.2325  # the official code multiplies latents by it; the file does not hold it
NORM_GROUPS = 32
LOSS_PREFIX = "loss."  # the discriminator and LPIPS of the VAE's own training
IRRELEVANT = ("sample_size", "force_upcast")  # what a VAE computes does not depend on them
RANKS = {
    "encoder.conv_in.weight": 4,
    "decoder.conv_in.weight": 4,
    "decoder.conv_out.weight": 4,
    "encoder.down.0.block.0.conv1.weight": 4,
}

# diffusers' names -> latent diffusion's. The decoder's levels count the other way round; see `_official_name`.
RENAMED = [
    (r"mid_block\.resnets\.0\.", "mid.block_1."),
    (r"mid_block\.resnets\.1\.", "mid.block_2."),
    (r"mid_block\.attentions\.0\.", "mid.attn_1."),
    (r"down_blocks\.(\d+)\.", r"down.\1."),
    (r"resnets\.", "block."),
    (r"attentions\.", "attn."),
    (r"downsamplers\.0\.", "downsample."),
    (r"upsamplers\.0\.", "upsample."),
    (r"conv_norm_out\.", "norm_out."),
    (r"conv_shortcut\.", "nin_shortcut."),
    (r"group_norm\.", "norm."),
    (r"to_([qkv])\.", r"\1."),
    (r"to_out\.0\.", "proj_out."),
]
# The order in which the official classes register their parts, and so the order of their state dict.
ORDER = [
    *("encoder", "decoder", "quant_conv", "post_quant_conv"),
    *("conv_in", "down", "mid", "up", "norm_out", "conv_out"),
    *("block_1", "attn_1", "block_2", "block", "attn", "downsample", "upsample", "conv"),
    *("norm", "q", "k", "v", "proj_out"),
    *("norm1", "conv1", "norm2", "conv2", "nin_shortcut"),
    *("weight", "bias"),
]


def is_vae(content: Mapping[str, Any]) -> bool:
    """Whether an official file's content is a VAE's: its "model" has an image encoder."""
    state = content.get("model")
    return isinstance(state, dict) and "encoder.conv_in.weight" in state


def read_vae(content: Mapping[str, Any], path: Path) -> AutoencoderKL:
    """diffusers' AutoencoderKL with the weights of an official file, bit for bit. Every size comes from the weights.

    Args:
        content: What `read_checkpoint` returned.
        path: For messages.

    Raises:
        CheckpointError: If weights are missing, extra (but for "loss.*") or of another shape.
    """
    weights = {
        name: tensor for name, tensor in weights_of(content, "model", path).items() if not name.startswith(LOSS_PREFIX)
    }
    config = vae_config(weights, path)
    autoencoder = _on_meta(config)
    names = official_names(autoencoder)
    ours = autoencoder.state_dict()
    check_shapes(weights, {official: _official_shape(name, ours[name]) for official, name in names.items()}, path)
    converted = {name: weights[official].reshape(ours[name].shape) for official, name in names.items()}
    autoencoder.load_state_dict(converted, strict=True, assign=True)
    return autoencoder.eval()


def vae_checkpoint(autoencoder: AutoencoderKL, path: str | Path) -> dict[str, Any]:
    """{"model": ...}: the official form of an AutoencoderKL, bit for bit and in the official order.

    Raises:
        CheckpointError: If the official classes cannot express it: other norms or blocks, or another latent scale.
    """
    ours = autoencoder.state_dict()
    weights = {
        official: ours[name].reshape(_official_shape(name, ours[name]))
        for official, name in official_names(autoencoder).items()
    }
    restored = _on_meta(vae_config(weights, Path(path))).config
    for field, value in autoencoder.config.items():
        if not field.startswith("_") and field not in IRRELEVANT and _plain(value) != _plain(restored[field]):
            raise CheckpointError(f"{path} has {field} {value}, but the official VAE has {restored[field]}")
    return {"model": weights}


def vae_config(weights: Mapping[str, Tensor], path: Path) -> dict[str, Any]:
    """The arguments of AutoencoderKL that belong to official weights; only names and shapes are read.

    Raises:
        CheckpointError: If the weights that tell the sizes are missing or odd.
    """
    check_ranks(weights, RANKS, path)
    levels = _count(weights, r"encoder\.down\.(\d+)\.")
    ranks = {f"encoder.down.{level}.block.0.conv1.weight": 4 for level in range(levels)}
    check_ranks(weights, ranks, path)
    channels = [weights[name].shape[0] for name in ranks]
    if any(count % NORM_GROUPS for count in channels):
        raise CheckpointError(
            f"the VAE {path} has blocks of {channels} channels, which {NORM_GROUPS} norm groups split"
        )
    with_attention = {
        part: [f"{part}.{level}.attn.0.q.weight" in weights for level in range(levels)]
        for part in ("encoder.down", "decoder.up")
    }
    return {
        "in_channels": weights["encoder.conv_in.weight"].shape[1],
        "out_channels": weights["decoder.conv_out.weight"].shape[0],
        "down_block_types": [
            "AttnDownEncoderBlock2D" if attention else "DownEncoderBlock2D"
            for attention in with_attention["encoder.down"]
        ],
        "up_block_types": [
            "AttnUpDecoderBlock2D" if attention else "UpDecoderBlock2D"
            for attention in reversed(with_attention["decoder.up"])
        ],
        "block_out_channels": channels,
        "layers_per_block": _count(weights, r"encoder\.down\.0\.block\.(\d+)\."),
        "latent_channels": weights["decoder.conv_in.weight"].shape[1],
        "norm_num_groups": NORM_GROUPS,
        "scaling_factor": LATENT_SCALE,
        "sample_size": 256,
    }


def official_names(autoencoder: AutoencoderKL) -> dict[str, str]:
    """Official name -> diffusers' name of every weight, in the official order."""
    levels = len(autoencoder.config.block_out_channels)
    names = {_official_name(name, levels): name for name in autoencoder.state_dict()}
    return {official: names[official] for official in sorted(names, key=_rank)}


def _official_name(name: str, levels: int) -> str:
    name = re.sub(r"up_blocks\.(\d+)\.", lambda match: f"up.{levels - 1 - int(match[1])}.", name)
    for pattern, replacement in RENAMED:
        name = re.sub(pattern, replacement, name)
    return name


def _official_shape(name: str, tensor: Tensor) -> torch.Size:
    """The official attention is made of 1 x 1 convolutions, diffusers' of linear layers."""
    is_linear = ".attentions." in name and tensor.ndim == 2
    return torch.Size((*tensor.shape, 1, 1)) if is_linear else tensor.shape


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _rank(official_name: str) -> list[int]:
    return [int(part) if part.isdigit() else ORDER.index(part) for part in official_name.split(".")]


def _count(weights: Mapping[str, Tensor], pattern: str) -> int:
    return len({match[1] for match in (re.match(pattern, name) for name in weights) if match})


def _on_meta(config: Mapping[str, Any]) -> AutoencoderKL:
    with torch.device("meta"):
        return AutoencoderKL(**config)
