"""Images <-> latents <-> tokens, behind one small interface."""

from __future__ import annotations

from typing import Any, Protocol, Self

import torch
from torch import Tensor

from marval_rl.models.config import MaskedConfig


class LatentCodec(Protocol):
    """Turns images into the latents that a MAR model generates, and back."""

    def to(self, device: torch.device | str) -> Self:
        """Move to a device; returns itself."""

    def encode(self, images: Tensor) -> Tensor:
        """Images [B, C, H, W] in 0..1 -> latents [B, c, h, w], about unit scale."""

    def moments(self, images: Tensor) -> Tensor:
        """Images [B, C, H, W] in 0..1 -> what `from_moments` draws latents from; the part that is worth caching."""

    def from_moments(self, moments: Tensor) -> Tensor:
        """Moments -> latents [B, c, h, w]."""

    def decode(self, latents: Tensor, text: Tensor | None = None) -> Tensor:
        """Latents [B, c, h, w] -> images [B, C, H, W] in 0..1; differentiable.

        text: [B, T, W], what `MaskedModel.decoder_text` gives, for a decoder that reads it.
        """


class Autoencoder(LatentCodec, Protocol):
    """A codec with weights: a VAE, or TA-TiTok."""

    scale: float

    @property
    def network(self) -> Any:
        """The frozen network."""

    @property
    def stride(self) -> int:
        """What height and width of an image must be a multiple of."""


class PixelCodec:
    """The latents are the pixels themselves, moved from 0..1 to -1..1. For small images such as the digits."""

    def to(self, device: torch.device | str) -> Self:
        return self

    def encode(self, images: Tensor) -> Tensor:
        return images * 2 - 1

    def moments(self, images: Tensor) -> Tensor:
        return self.encode(images)

    def from_moments(self, moments: Tensor) -> Tensor:
        return moments

    def decode(self, latents: Tensor, text: Tensor | None = None) -> Tensor:
        return ((latents + 1) / 2).clamp(0, 1)


def codec_for(config: MaskedConfig) -> LatentCodec:
    """The codec that belongs to a model, on the CPU.

    Raises:
        CheckpointError: If the VAE that the configuration names cannot be loaded or has other latents.
        ValueError: If the latents are not pixels and the configuration names no VAE.
    """
    if config.model_type == "maskgen":
        from marval_rl.models.maskgen.codec import maskgen_codec

        return maskgen_codec(config)
    if config.vae is not None:
        from marval_rl.models.vae import VAECodec  # diffusers is slow to import, and pixels do without

        return VAECodec.from_pretrained(config.vae, config)
    if config.latent_stride == 1 and config.latent_channels == config.image_channels:
        return PixelCodec()
    raise ValueError(
        f"latents of stride {config.latent_stride} with {config.latent_channels} channels need a VAE, and the model's "
        "configuration names none: give a diffusers AutoencoderKL, by path or name (--vae ...)"
    )


def patchify(latents: Tensor, patch_size: int) -> Tensor:
    """Latents [B, c, h, w] -> tokens [B, L, c*p*p]: tokens row-major, channels inside a token c slowest, then
    row, column."""
    batch, channels, height, width = latents.shape
    p = patch_size
    x = latents.reshape(batch, channels, height // p, p, width // p, p)
    return x.permute(0, 2, 4, 1, 3, 5).reshape(batch, (height // p) * (width // p), channels * p * p)


def unpatchify(tokens: Tensor, patch_size: int, grid: int | tuple[int, int]) -> Tensor:
    """The inverse of `patchify`: tokens [B, L, c*p*p] -> latents [B, c, h, w]. grid: rows and columns of tokens."""
    batch, _, channels = tokens.shape
    p = patch_size
    rows, columns = (grid, grid) if isinstance(grid, int) else grid
    x = tokens.reshape(batch, rows, columns, channels // p**2, p, p)
    return x.permute(0, 3, 1, 4, 2, 5).reshape(batch, channels // p**2, rows * p, columns * p)
