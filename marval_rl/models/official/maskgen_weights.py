"""Official MaskGen-KL weights (bytedance/1d-tokenizer) <-> our configuration. The names of the weights are the same."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from marval_rl.errors import CheckpointError
from marval_rl.models.maskgen.config import MaskGenConfig
from marval_rl.models.maskgen.model import MaskGenModel
from marval_rl.models.official.mar_weights import count_blocks
from marval_rl.models.official.maskgen_files import OfficialFiles, check_agreement, count_of, section
from marval_rl.models.official.shapes import check_ranks, check_shapes

PUBLISHED = {"maskgen_kl_l": MaskGenConfig.large(), "maskgen_kl_xl": MaskGenConfig.extra_large()}
RANKS = {
    "decoder_pos_embed_learned": 3,
    "z_proj.weight": 2,
    "text_emb.weight": 2,
    "text_pooled_emb.weight": 2,
    "decoder_blocks.0.attn.to_q.weight": 2,
    "diffloss.net.input_proj.weight": 2,
}
MARK = "decoder_blocks.0.attn.add_k_proj.weight"  # no other official file has it


def is_maskgen(weights: Mapping[str, Any]) -> bool:
    """Whether a state dict is a MaskGen's."""
    return MARK in weights


def maskgen_config(files: OfficialFiles, num_heads: int | None = None) -> MaskGenConfig:
    """The configuration that official weights have: their sizes, and of the settings what no size tells.

    Args:
        files: What was read; meta tensors do.
        num_heads: Attention heads, for weights without settings of a width that was not published.

    Raises:
        CheckpointError: If weights are missing, extra or of another shape, contradict the settings, or if the number
            of heads is unknown.
    """
    weights, settings, path = files
    check_ranks(weights, RANKS, path)
    generator, tokenizer, head = (
        section(settings, *names) for names in (("model", "maskgen"), ("model", "vq_model"), ("losses",))
    )
    num_tokens, width = weights["decoder_pos_embed_learned"].shape[1:]
    head_width, channels = weights["diffloss.net.input_proj.weight"].shape
    layers, head_layers = (count_blocks(weights, p) for p in ("decoder_blocks", "diffloss.net.res_blocks"))
    text_width = weights["text_emb.weight"].shape[1]
    micro = weights["text_pooled_emb.weight"].shape[1] - text_width
    found = {
        "decoder_embed_dim": width,
        "decoder_depth": layers,
        **({"micro_condition_embed_dim": micro} if micro else {}),
    }
    check_agreement(generator, found, path)
    check_agreement(
        tokenizer, {"num_latent_tokens": num_tokens, "token_size": channels, "text_embed_dim": text_width}, path
    )
    check_agreement(head, {"diffloss_d": head_layers, "diffloss_w": head_width}, path)
    known = {config.hidden_size: config.num_heads for config in PUBLISHED.values()}
    heads = num_heads or known.get(width, 0)
    if "decoder_num_heads" in generator:
        heads = count_of(generator, "decoder_num_heads", 1, path)
        if num_heads not in (None, heads):
            raise CheckpointError(f"{path} contradicts --num_heads {num_heads}: its settings say {heads}")
    if not heads:
        raise CheckpointError(
            f"{path} does not tell how many attention heads its {width} channels have: say so with --num_heads N"
        )
    try:
        config = MaskGenConfig(
            image_size=count_of(section(settings, "dataset", "preprocessing"), "crop_size", 256, path),
            num_tokens=num_tokens,
            latent_channels=channels,
            latent_scale=float(tokenizer.get("scale_factor", MaskGenConfig().latent_scale)),
            text_width=text_width,
            text_length=count_of(tokenizer, "text_context_length", 77, path),
            micro_condition_size=micro,
            aesthetic_score=float(generator.get("sample_aesthetic_score", MaskGenConfig().aesthetic_score)),
            hidden_size=width,
            num_layers=layers,
            num_heads=heads,
            head_hidden_size=head_width,
            head_num_layers=head_layers,
            num_diffusion_steps=count_of(head, "num_sampling_steps", 100, path),
        )
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: {error}") from error
    with torch.device("meta"):
        expected = {name: tensor.shape for name, tensor in MaskGenModel(config).state_dict().items()}
    check_shapes(weights, expected, path)
    return config


def published_name(config: MaskGenConfig) -> str | None:
    """ "maskgen_kl_l" or "maskgen_kl_xl" for a network of that size, else None."""
    names = ("hidden_size", "num_layers", "num_heads", "num_tokens", "head_hidden_size", "head_num_layers")
    for name, published in PUBLISHED.items():
        if all(getattr(config, size) == getattr(published, size) for size in names):
            return name
    return None


def maskgen_official(model: MaskGenModel, path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Weights and nested settings as the official code saves them of a teacher.

    Raises:
        CheckpointError: For what the official code cannot run: a one-step student, words instead of a text tower,
            clipped samples, latents that are pixels.
    """
    config = model.config
    if config.is_one_step:
        raise CheckpointError(
            f"{path} is a one-step student: the official code would sample it as a many-step teacher, so there is no "
            "official form of it"
        )
    weights = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    settings = {
        "model": {
            "vq_model": {
                "quantize_mode": "vae",
                "token_size": config.latent_channels,
                "num_latent_tokens": config.num_tokens,
                "scale_factor": config.latent_scale,
                "text_embed_dim": config.text_width,
                "text_context_length": config.text_length,
                "finetune_decoder": False,
                "is_legacy": False,
            },
            "maskgen": {
                "decoder_embed_dim": config.hidden_size,
                "decoder_depth": config.num_layers,
                "decoder_num_heads": config.num_heads,
                "micro_condition": config.micro_condition_size > 0,
                "micro_condition_embed_dim": config.micro_condition_size,
                "sample_aesthetic_score": config.aesthetic_score,
                "text_drop_prob": 0.1,
                "cfg": 3.0,
                "cfg_schedule": "linear",
                "num_iter": config.num_tokens,
                "temperature": 1.0,
            },
        },
        "losses": {
            "diffloss_d": config.head_num_layers,
            "diffloss_w": config.head_hidden_size,
            "num_sampling_steps": str(config.num_diffusion_steps),
        },
        "dataset": {"preprocessing": {"crop_size": config.image_size}},
    }
    restored = maskgen_config(OfficialFiles(weights, settings, Path(path)))
    skipped = ("vae", "class_names", "num_classes", "text_tower", "text_pretrained")
    theirs, ours = restored.to_dict(), config.to_dict()
    for field in MaskGenConfig.__annotations__:
        if field not in skipped and theirs[field] != ours[field]:
            raise CheckpointError(f"{path} has {field} {ours[field]}, but the official code knows {theirs[field]} only")
    return weights, settings
