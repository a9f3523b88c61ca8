"""Latents of MaskGen: those of TA-TiTok, or the pixels of patches in a row."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Self

import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from safetensors import SafetensorError
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from marval_rl.errors import CheckpointError, first_line
from marval_rl.models.latents import patchify, unpatchify
from marval_rl.models.maskgen.config import MaskGenConfig
from marval_rl.models.maskgen.tatitok import TATiTokConfig, TATiTokModel
from marval_rl.models.official.reading import check_finite
from marval_rl.paths import looks_like_hub_id

IMAGES_AT_ONCE = 16


class TATiTokCodec:
    """Latents are posterior samples of TA-TiTok times a scale; its decoder reads the prompt's features too.

    Args:
        tokenizer: TA-TiTok; it is frozen.
        scale: Factor of the latents, 0.7525 for the published models.
    """

    def __init__(self, tokenizer: TATiTokModel, scale: float):
        self.tokenizer = tokenizer.eval().requires_grad_(False)
        self.scale = scale

    @classmethod
    def from_pretrained(cls, name_or_path: str | Path, config: MaskGenConfig) -> Self:
        """Load a tokenizer's folder or hub id, strictly and in float32.

        Raises:
            CheckpointError: If it is missing, damaged, incomplete, or has other latents than the model's.
        """
        tokenizer = load_tokenizer(name_or_path)
        names = ("image_size", "num_tokens", "latent_channels")
        found, wanted = ([getattr(c, name) for name in names] for c in (tokenizer.config, config))
        if found != wanted:
            differing = ", ".join(
                f"{n} {f} instead of {w}" for n, f, w in zip(names, found, wanted, strict=True) if f != w
            )
            raise CheckpointError(f"the tokenizer {name_or_path} does not fit the model: {differing} (--vae ...)")
        return cls(tokenizer, config.latent_scale)

    @property
    def network(self) -> TATiTokModel:
        return self.tokenizer

    @property
    def stride(self) -> int:
        return self.tokenizer.config.image_size

    def to(self, device: torch.device | str) -> Self:
        self.tokenizer.to(device)
        return self

    def encode(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] in 0..1 -> latents [B, C, 1, L], a fresh posterior sample each time."""
        return self.from_moments(self.moments(images))

    @torch.no_grad()
    def moments(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] in 0..1 -> mean and log variance of the posterior, [B, 2C, 1, L], unscaled."""
        size = self.tokenizer.config.image_size
        if images.shape[1:] != (3, size, size):
            raise ValueError(f"the tokenizer takes images of 3 x {size} x {size}, not {list(images.shape[1:])}")
        return torch.cat([self.tokenizer.encode(part) for part in images.split(IMAGES_AT_ONCE)])

    def from_moments(self, moments: Tensor) -> Tensor:
        """A scaled posterior sample from mean and log variance [B, 2C, 1, L]; float32."""
        return DiagonalGaussianDistribution(moments.float()).sample() * self.scale

    def decode(self, latents: Tensor, text: Tensor | None = None) -> Tensor:
        """Latents [B, C, 1, L] and the decoder's text features [B, T, W] -> images [B, 3, H, W] in 0..1, float32.

        Differentiable; the decoder runs again in the backward pass.
        """
        if text is None:
            raise ValueError("TA-TiTok's decoder reads the prompt: give its text features (model.decoder_text(labels))")
        texts = text.to(self.tokenizer.dtype)
        parts = list(zip(latents.split(IMAGES_AT_ONCE), texts.split(IMAGES_AT_ONCE), strict=True))
        if latents.requires_grad and torch.is_grad_enabled():
            return torch.cat([checkpoint(self._decode, *part, use_reentrant=False) for part in parts])
        return torch.cat([self._decode(*part) for part in parts])

    def _decode(self, latents: Tensor, text: Tensor) -> Tensor:
        return self.tokenizer.decode(latents / self.scale, text).float().clamp(0, 1)


class PatchCodec:
    """Latents are the pixels of patches, -1..1, one patch per token, row by row; for small images. No text is read."""

    def __init__(self, patch: int, grid: tuple[int, int]):
        self.patch = patch
        self.grid = grid

    def to(self, device: torch.device | str) -> Self:
        return self

    def encode(self, images: Tensor) -> Tensor:
        return patchify(images * 2 - 1, self.patch).transpose(1, 2).unsqueeze(2)

    def moments(self, images: Tensor) -> Tensor:
        return self.encode(images)

    def from_moments(self, moments: Tensor) -> Tensor:
        return moments

    def decode(self, latents: Tensor, text: Tensor | None = None) -> Tensor:
        tokens = latents.squeeze(2).transpose(1, 2)
        return ((unpatchify(tokens, self.patch, self.grid) + 1) / 2).clamp(0, 1)


def maskgen_codec(config: MaskGenConfig) -> TATiTokCodec | PatchCodec:
    """The codec of a MaskGen model, on the CPU. Raises as `codec_for`."""
    if config.vae is not None:
        return TATiTokCodec.from_pretrained(config.vae, config)
    patch = math.isqrt(config.latent_channels // config.image_channels)
    _, height, width = config.image_shape
    rows, columns = (height // patch, width // patch) if patch else (0, 0)
    if (
        config.image_channels * patch**2 == config.latent_channels
        and (rows * patch, columns * patch) == (height, width)
        and rows * columns == config.num_tokens
    ):
        return PatchCodec(patch, (rows, columns))
    raise ValueError(
        f"{config.num_tokens} tokens of {config.latent_channels} channels need TA-TiTok, and the model's configuration "
        "names none: give its folder or hub id (--vae ...)"
    )


def load_tokenizer(name_or_path: str | Path) -> TATiTokModel:
    """TA-TiTok from a folder or hub id as `marval-rl convert` writes it: strictly, in float32.

    Raises:
        CheckpointError: If it is missing, damaged, incomplete, of another class, or not finite.
    """
    path = Path(name_or_path)
    if path.exists() and not (path / "config.json").is_file():
        raise CheckpointError(f"{path} is not a tokenizer's folder: it holds no config.json (`marval-rl convert`)")
    if not looks_like_hub_id(name_or_path) and not path.exists():
        raise CheckpointError(f"no tokenizer at {path}: the path does not exist (--vae ...)")
    try:
        fields = TATiTokConfig.get_config_dict(str(name_or_path))[0]
        if fields.get("model_type") != TATiTokConfig.model_type:
            raise CheckpointError(
                f"{name_or_path} is not a TA-TiTok: its config.json says model_type {fields.get('model_type')!r} "
                "(`marval-rl convert` makes one of the official weights)"
            )
        tokenizer, info = TATiTokModel.from_pretrained(
            str(name_or_path), output_loading_info=True, dtype=torch.float32, use_safetensors=True
        )
    except (OSError, ValueError, RuntimeError, TypeError, SafetensorError) as error:
        raise CheckpointError(f"cannot load the tokenizer {name_or_path}: {first_line(error)}") from error
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[what]:
            shown = ", ".join(map(str, sorted(info[what], key=str)[:5]))
            raise CheckpointError(
                f"the tokenizer {name_or_path} is incomplete or another: {len(info[what])} "
                f"{what.replace('_', ' ')}: {shown}"
            )
    check_finite(tokenizer.state_dict(), path)
    return tokenizer.eval()
