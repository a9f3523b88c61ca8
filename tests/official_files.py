"""Files as the official MAR code writes them (LTH14/mar: checkpoint-last.pth, kl16.ckpt), at any size.

Written from that code's description, not from our reader, so that the two can disagree.
"""

from __future__ import annotations

import argparse
import functools
import json
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from tiny_models import tiny_config, tiny_model
from torch import Tensor, nn

from marval_rl.models import MARConfig


def official_config(**changes: Any) -> MARConfig:
    """A tiny model that the official code could have trained: 2 x 2 tokens of 4 channels x 2 x 2 cells."""
    settings = {
        "image_size": 64,
        "image_channels": 3,
        "latent_stride": 16,
        "latent_channels": 4,
        "attention_dropout": 0.1,
        "projection_dropout": 0.2,
        "num_diffusion_steps": 25,
    }
    return tiny_config(**{**settings, **changes})


def official_args(config: MARConfig, **changes: Any) -> argparse.Namespace:
    """Arguments of the official command line. The heads of tiny models stand under the class's own names for them."""
    args = {
        "batch_size": 64,
        "epochs": 400,
        "img_size": config.image_size,
        "vae_path": "pretrained_models/vae/kl16.ckpt",
        "vae_embed_dim": config.latent_channels,
        "vae_stride": config.latent_stride,
        "patch_size": config.patch_size,
        "num_iter": 64,
        "cfg": 1.0,
        "lr": None,
        "attn_dropout": config.attention_dropout,
        "proj_dropout": config.projection_dropout,
        "buffer_size": config.buffer_size,
        "diffloss_d": config.head_num_layers,
        "diffloss_w": config.head_hidden_size,
        "num_sampling_steps": str(config.num_diffusion_steps),
        "class_num": config.num_classes,
        "use_cached": True,
        "encoder_num_heads": config.encoder_num_heads,
        "decoder_num_heads": config.decoder_num_heads,
    }
    return argparse.Namespace(**{**args, **changes})


def mar_content(config: MARConfig | None = None) -> dict[str, Any]:
    """What a checkpoint holds: raw weights of seed 1, average weights of seed 2 as Parameters, optimizer, args."""
    config = official_config() if config is None else config
    raw, average = _mar_weights(1, config.to_json_string()), _mar_weights(2, config.to_json_string())
    return {
        "model": OrderedDict(raw),
        "model_ema": OrderedDict((name, nn.Parameter(tensor)) for name, tensor in average.items()),
        "optimizer": {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 1e-4, "params": [0]}]},
        "epoch": 399,
        "scaler": {"scale": 65536.0},
        "args": official_args(config),
    }


def write_mar(path: Path, config: MARConfig | None = None, *, legacy: bool = False, **changes: Any) -> Path:
    """Writes a checkpoint; `changes` replace parts of its content, and None takes a part away."""
    content = {**mar_content(config), **changes}
    content = {name: part for name, part in content.items() if part is not None}
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    return path


def vae_shapes(channels: tuple[int, ...], blocks: int, latents: int, attention: bool = True) -> dict[str, list[int]]:
    """Name -> shape of every weight of latent diffusion's autoencoder, in the order of its state dict."""
    shapes: dict[str, list[int]] = {}

    def conv(name: str, before: int, after: int, kernel: int = 3) -> None:
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = [after, before, kernel, kernel], [after]

    def norm(name: str, width: int) -> None:
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = [width], [width]

    def block(name: str, before: int, after: int) -> int:
        norm(f"{name}.norm1", before)
        conv(f"{name}.conv1", before, after)
        norm(f"{name}.norm2", after)
        conv(f"{name}.conv2", after, after)
        if before != after:
            conv(f"{name}.nin_shortcut", before, after, 1)
        return after

    def attend(name: str, width: int) -> None:
        norm(f"{name}.norm", width)
        for part in ("q", "k", "v", "proj_out"):
            conv(f"{name}.{part}", width, width, 1)

    def middle(name: str, width: int) -> None:
        block(f"{name}.block_1", width, width)
        attend(f"{name}.attn_1", width)
        block(f"{name}.block_2", width, width)

    last = len(channels) - 1
    conv("encoder.conv_in", 3, channels[0])
    width = channels[0]
    for level, after in enumerate(channels):
        for index in range(blocks):
            width = block(f"encoder.down.{level}.block.{index}", width, after)
        if attention and level == last:
            for index in range(blocks):
                attend(f"encoder.down.{level}.attn.{index}", width)
        if level != last:
            conv(f"encoder.down.{level}.downsample.conv", width, width)
    middle("encoder.mid", width)
    norm("encoder.norm_out", width)
    conv("encoder.conv_out", width, 2 * latents)

    conv("decoder.conv_in", latents, width)
    middle("decoder.mid", width)
    for level, after in enumerate(channels):  # listed from the finest level up, though run from the coarsest down
        width = channels[min(level + 1, last)]
        for index in range(blocks + 1):
            width = block(f"decoder.up.{level}.block.{index}", width, after)
        if level != 0:
            conv(f"decoder.up.{level}.upsample.conv", width, width)
    norm("decoder.norm_out", channels[0])
    conv("decoder.conv_out", channels[0], 3)
    conv("quant_conv", 2 * latents, 2 * latents, 1)
    conv("post_quant_conv", latents, latents, 1)
    return shapes


def vae_weights(
    channels: tuple[int, ...] = (32, 64, 64), blocks: int = 1, latents: int = 4, attention: bool = True, seed: int = 0
) -> dict[str, Tensor]:
    """Random weights of an official autoencoder."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(shape, generator=generator) * 0.05 + (1.0 if "norm" in name and "weight" in name else 0.0)
        for name, shape in vae_shapes(channels, blocks, latents, attention).items()
    }


def write_vae(path: Path, weights: dict[str, Tensor] | None = None) -> Path:
    """Writes a kl16.ckpt."""
    torch.save({"model": vae_weights() if weights is None else weights}, path)
    return path


@functools.cache
def _mar_weights(seed: int, config: str) -> dict[str, Tensor]:
    return tiny_model(seed, **json.loads(config)).state_dict()
