"""Official TA-TiTok weights (KL latents) <-> our configuration. The names of the weights are the same."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from marval_rl.errors import CheckpointError
from marval_rl.models.maskgen.tatitok import TATiTokConfig, TATiTokModel
from marval_rl.models.official.mar_weights import count_blocks
from marval_rl.models.official.maskgen_files import OfficialFiles, check_agreement, count_of, section
from marval_rl.models.official.shapes import check_ranks, check_shapes

SIZES = {"small": (512, 8, 8), "base": (768, 12, 12), "large": (1024, 24, 16)}  # width, blocks, heads
RANKS = {
    "latent_tokens": 2,
    "encoder.patch_embed.weight": 4,
    "encoder.positional_embedding": 2,
    "decoder.positional_embedding": 2,
    "decoder.decoder_embed.weight": 2,
    "decoder.text_guidance_proj.weight": 2,
    "decoder.text_guidance_positional_embedding": 2,
}
MARK = "decoder.text_guidance_proj.weight"  # no other official file has it


def is_tatitok(weights: Mapping[str, Any]) -> bool:
    """Whether a state dict is a TA-TiTok's."""
    return MARK in weights


def tatitok_config(files: OfficialFiles) -> TATiTokConfig:
    """The configuration that official weights have. Encoder and decoder differ in heads, which no shape tells: they are
    those of the published network of that width, or the settings' vit_enc_num_heads and vit_dec_num_heads.

    Raises:
        CheckpointError: If weights are missing, extra or of another shape, contradict the settings, or if the number
            of heads is unknown.
    """
    weights, settings, path = files
    check_ranks(weights, RANKS, path)
    written = section(settings, "model", "vq_model")
    num_tokens, encoder_width = weights["latent_tokens"].shape
    decoder_width, channels = weights["decoder.decoder_embed.weight"].shape
    patch = weights["encoder.patch_embed.weight"].shape[-1]
    check_agreement(
        written,
        {
            "num_latent_tokens": num_tokens,
            "token_size": channels,
            "vit_enc_patch_size": patch,
            "vit_dec_patch_size": patch,
        },
        path,
    )
    known = {width: heads for width, _, heads in SIZES.values()}
    heads = {}
    for part, width in (("enc", encoder_width), ("dec", decoder_width)):
        name = f"vit_{part}_num_heads"
        heads[part] = count_of(written, name, 1, path) if name in written else known.get(width, 0)
        if not heads[part]:
            raise CheckpointError(
                f"{path} does not tell how many attention heads its {width} channels have: write vit_{part}_num_heads "
                "into model.vq_model of its config.json"
            )
    try:
        config = TATiTokConfig(
            image_size=math.isqrt(weights["encoder.positional_embedding"].shape[0] - 1) * patch,
            patch_size=patch,
            num_tokens=num_tokens,
            latent_channels=channels,
            text_width=weights["decoder.text_guidance_proj.weight"].shape[1],
            text_length=weights["decoder.text_guidance_positional_embedding"].shape[0],
            encoder_hidden_size=encoder_width,
            encoder_num_layers=count_blocks(weights, "encoder.transformer"),
            encoder_num_heads=heads["enc"],
            decoder_hidden_size=decoder_width,
            decoder_num_layers=count_blocks(weights, "decoder.transformer"),
            decoder_num_heads=heads["dec"],
        )
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error
    with torch.device("meta"):
        expected = {name: tensor.shape for name, tensor in TATiTokModel(config).state_dict().items()}
    check_shapes(weights, expected, path)
    return config


def tatitok_official(model: TATiTokModel, path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Weights and nested settings as the official code saves them; sizes that have no name keep their heads beside."""
    config = model.config
    written: dict[str, Any] = {
        "quantize_mode": "vae",
        "token_size": config.latent_channels,
        "vit_enc_patch_size": config.patch_size,
        "vit_dec_patch_size": config.patch_size,
        "num_latent_tokens": config.num_tokens,
        "text_embed_dim": config.text_width,
        "text_context_length": config.text_length,
        "finetune_decoder": False,
        "is_legacy": False,
    }
    for short, part in (("enc", "encoder"), ("dec", "decoder")):
        size = tuple(getattr(config, f"{part}_{name}") for name in ("hidden_size", "num_layers", "num_heads"))
        names = [name for name, known in SIZES.items() if known == size]
        if names:
            written[f"vit_{short}_model_size"] = names[0]
        else:
            written[f"vit_{short}_num_heads"] = size[2]
    weights = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    settings = {"model": {"vq_model": written}, "dataset": {"preprocessing": {"crop_size": config.image_size}}}
    tatitok_config(OfficialFiles(weights, settings, Path(path)))
    return weights, settings
