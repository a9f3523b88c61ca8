"""An official MAR checkpoint <-> our configuration and weights. The names of the weights are the same."""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from marval_rl.errors import CheckpointError
from marval_rl.models.config import MARConfig
from marval_rl.models.mar import MARModel
from marval_rl.models.official.reading import arguments_of, check_finite, read_checkpoint, weights_of
from marval_rl.models.official.shapes import check_ranks, check_shapes

PUBLISHED = {"mar_base": MARConfig.base(), "mar_large": MARConfig.large(), "mar_huge": MARConfig.huge()}
STATE_KEYS = {"ema": "model_ema", "model": "model"}
# The weights that tell the sizes, and their dimensions.
RANKS = {
    "class_emb.weight": 2,
    "z_proj.weight": 2,
    "decoder_embed.weight": 2,
    "encoder_pos_embed_learned": 3,
    "diffusion_pos_embed_learned": 3,
    "encoder_blocks.0.mlp.fc1.weight": 2,
    "diffloss.net.input_proj.weight": 2,
}


@dataclass(frozen=True)
class OfficialMAR:
    """A checkpoint as read: what model it is, and its weights (float32, perhaps still on disk)."""

    config: MARConfig
    weights: dict[str, Tensor]


def read_mar(path: str | Path, weights: str = "ema", num_heads: int | None = None) -> OfficialMAR:
    """Read LTH14/mar's `checkpoint-last.pth`. The values of the weights are not looked at; `check_finite` does.

    Args:
        path: The file.
        weights: "ema" for the averaged weights, which the published figures are of, or "model" for the raw ones.
        num_heads: Attention heads, for a model of unpublished width whose file does not tell them.

    Raises:
        CheckpointError: If the file cannot be read, is not a MAR, or is inconsistent.
    """
    path = Path(path)
    content = read_checkpoint(path)
    state = weights_of(content, STATE_KEYS[weights], path)
    config = mar_config(state, arguments_of(content, path), path, num_heads)
    return OfficialMAR(config, state)


def load_official_mar(path: str | Path) -> OfficialMAR:
    """As `read_mar`, with finite weights in memory of their own: the file may change or go away afterwards."""
    official = read_mar(path)
    check_finite(official.weights, Path(path))
    return OfficialMAR(official.config, {name: tensor.clone() for name, tensor in official.weights.items()})


def mar_config(
    weights: Mapping[str, Tensor], args: Mapping[str, Any], path: Path, num_heads: int | None = None
) -> MARConfig:
    """The configuration that weights have. They give every size; the rest comes from the official command line.

    Where `args` is silent, the published models' settings hold: KL-16 latents without patches, and the heads of the
    published model of that width.

    Args:
        weights: The state dict; only names and shapes are read, so meta tensors do.
        args: The attributes of the official `args`; may be empty.
        path: For messages.
        num_heads: See `read_mar`.

    Raises:
        CheckpointError: If weights are missing, extra or of another shape, if they contradict `args`, or if the number
            of heads is known to neither.
    """
    check_ranks(weights, RANKS, path)
    num_classes, width = weights["class_emb.weight"].shape
    decoder_width = weights["decoder_embed.weight"].shape[0]
    num_tokens = weights["diffusion_pos_embed_learned"].shape[1]
    head_width, token_channels = weights["diffloss.net.input_proj.weight"].shape
    read = {
        "class_num": num_classes,
        "buffer_size": weights["encoder_pos_embed_learned"].shape[1] - num_tokens,
        "diffloss_d": count_blocks(weights, "diffloss.net.res_blocks"),
        "diffloss_w": head_width,
    }
    patch_size = _positive(args, "patch_size", 1, path)
    stride = _positive(args, "vae_stride", 16, path)
    channels = _positive(args, "vae_embed_dim", 16, path)
    image_size = _positive(args, "img_size", math.isqrt(num_tokens) * stride * patch_size, path)
    for name, value in read.items():
        _agree(f"args.{name}", _positive(args, name, value, path), "the weights", value, path)
    _agree(
        f"image size {image_size} / VAE stride {stride} / patch size {patch_size}, squared",
        (image_size // stride // patch_size) ** 2,
        "the position table",
        num_tokens,
        path,
    )
    _agree(f"{channels} latent channels x patch size^2", channels * patch_size**2, "z_proj", token_channels, path)
    encoder_heads, decoder_heads = _heads(width, decoder_width, args, path, num_heads)
    try:
        config = MARConfig(
            image_size=image_size,
            latent_stride=stride,
            latent_channels=channels,
            patch_size=patch_size,
            num_classes=num_classes,
            encoder_hidden_size=width,
            encoder_num_layers=count_blocks(weights, "encoder_blocks"),
            encoder_num_heads=encoder_heads,
            decoder_hidden_size=decoder_width,
            decoder_num_layers=count_blocks(weights, "decoder_blocks"),
            decoder_num_heads=decoder_heads,
            mlp_ratio=weights["encoder_blocks.0.mlp.fc1.weight"].shape[0] / width,
            buffer_size=read["buffer_size"],
            head_hidden_size=head_width,
            head_num_layers=read["diffloss_d"],
            attention_dropout=_rate(args, "attn_dropout", path),
            projection_dropout=_rate(args, "proj_dropout", path),
            num_diffusion_steps=_positive(args, "num_sampling_steps", 100, path),
        )
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error
    with torch.device("meta"):
        expected = {name: tensor.shape for name, tensor in MARModel(config).state_dict().items()}
    check_shapes(weights, expected, path)
    return config


def published_name(config: MARConfig) -> str | None:
    """ "mar_base", "mar_large" or "mar_huge" for a network of that size, else None."""
    for name, published in PUBLISHED.items():
        if _sizes(config) == _sizes(published):
            return name
    return None


def mar_checkpoint(model: MARModel, path: str | Path) -> dict[str, Any]:
    """What the official code would have saved of a teacher: model, model_ema (the same weights) and args.

    Heads of a model of unpublished size are kept as `encoder_num_heads` and `decoder_num_heads`, the names that the
    official class gives them.

    Args:
        model: A teacher, float32.
        path: Where it came from, for messages.

    Raises:
        CheckpointError: For what the official code cannot run: a one-step student, clipped samples, another diffusion
            process.
    """
    config = model.config
    if config.is_one_step:
        raise CheckpointError(
            f"{path} is a one-step student: the official code would sample it as a many-step teacher, so there is no "
            "official form of it"
        )
    args = argparse.Namespace(
        img_size=config.image_size,
        vae_stride=config.latent_stride,
        vae_embed_dim=config.latent_channels,
        patch_size=config.patch_size,
        class_num=config.num_classes,
        buffer_size=config.buffer_size,
        diffloss_d=config.head_num_layers,
        diffloss_w=config.head_hidden_size,
        num_sampling_steps=str(config.num_diffusion_steps),
        attn_dropout=config.attention_dropout,
        proj_dropout=config.projection_dropout,
    )
    name = published_name(config)
    if name is not None:
        args.model = name
    else:
        args.encoder_num_heads, args.decoder_num_heads = config.encoder_num_heads, config.decoder_num_heads
    weights = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    restored = mar_config(weights, vars(args), Path(path))
    for field in _FIELDS:
        ours, theirs = getattr(config, field), getattr(restored, field)
        if ours != theirs:
            raise CheckpointError(f"{path} has {field} {ours}, but the official code knows {theirs} only")
    return {"model": weights, "model_ema": weights, "args": args}


# Everything of a configuration that shapes what a model computes; names and the place of the VAE do not.
_FIELDS = [name for name in MARConfig.__annotations__ if name not in ("model_type", "vae", "class_names")]
_SETTINGS = ("attention_dropout", "projection_dropout", "num_diffusion_steps", "clip_sample_range", "one_step_timestep")


def _sizes(config: MARConfig) -> dict[str, Any]:
    return {name: getattr(config, name) for name in _FIELDS if name not in _SETTINGS}


def count_blocks(weights: Mapping[str, Tensor], prefix: str) -> int:
    """How many different numbers follow the prefix; `check_shapes` finds gaps between them."""
    pattern = re.compile(re.escape(prefix) + r"\.(\d+)\.")
    return len({match[1] for match in map(pattern.match, weights) if match})


def _heads(
    width: int, decoder_width: int, args: Mapping[str, Any], path: Path, num_heads: int | None
) -> tuple[int, int]:
    """Attention heads of encoder and decoder; no weight's shape gives them."""
    if num_heads is not None and num_heads < 1:
        raise ValueError(f"num_heads must be at least 1, not {num_heads}")
    known = {config.encoder_hidden_size: config.encoder_num_heads for config in PUBLISHED.values()}
    name = args.get("model")
    if "encoder_num_heads" in args and "decoder_num_heads" in args:
        found = (_positive(args, "encoder_num_heads", 0, path), _positive(args, "decoder_num_heads", 0, path))
    elif isinstance(name, str) and name in PUBLISHED:
        published = PUBLISHED[name]
        for part, size in (("encoder", width), ("decoder", decoder_width)):
            _agree(f"the width of args.model {name}", published.encoder_hidden_size, f"the {part}'s width", size, path)
        found = (published.encoder_num_heads, published.decoder_num_heads)
    elif num_heads is not None:
        return num_heads, num_heads
    elif width in known and decoder_width in known:
        return known[width], known[decoder_width]
    else:
        raise CheckpointError(
            f"{path} does not tell how many attention heads its {width} channels have: say so with --num_heads N"
        )
    if num_heads is not None:
        for heads in found:
            _agree("--num_heads", num_heads, "args", heads, path)
    return found


def _agree(one: str, value: int, other: str, other_value: int, path: Path) -> None:
    if value != other_value:
        raise CheckpointError(f"{path} contradicts itself: {one} is {value}, but {other_value} by {other}")


def _positive(args: Mapping[str, Any], name: str, default: int, path: Path) -> int:
    """A positive integer of `args`, or written as text, as the official num_sampling_steps is."""
    value = args.get(name, default)
    if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) < 10:
        value = int(value)
    if type(value) is not int or value < 1:
        raise CheckpointError(f"args.{name} of {path} is {value!r:.40}, not a positive integer")
    return value


def _rate(args: Mapping[str, Any], name: str, path: Path) -> float:
    """A dropout rate of `args`; 0.1 is the official default."""
    value = args.get(name, 0.1)
    if type(value) not in (int, float) or not 0 <= value < 1:
        raise CheckpointError(f"args.{name} of {path} is {value!r:.40}, not a rate in 0..1")
    return float(value)
