"""Latents of a VAE: diffusers' `AutoencoderKL`, such as the KL-16 of the official MAR models."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Self

import torch
from diffusers import AutoencoderKL
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.utils import logging as diffusers_logging
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from marval_rl.errors import CheckpointError, first_line
from marval_rl.models.config import MARConfig
from marval_rl.models.official.reading import check_finite
from marval_rl.paths import looks_like_hub_id

IMAGES_AT_ONCE = 16  # the feature maps of one image take more than a hundred times the memory of its latents


class VAECodec:
    """Latents are posterior samples, shifted and scaled as the VAE's configuration says.

    latents = (sample - shift_factor) * scaling_factor; KL-16 has scale 0.2325 and no shift. The VAE is frozen.

    Args:
        autoencoder: The VAE.
    """

    def __init__(self, autoencoder: AutoencoderKL):
        self.autoencoder = autoencoder.eval().requires_grad_(False)
        self.scale = autoencoder.config.scaling_factor
        self.shift = autoencoder.config.shift_factor or 0.0

    @classmethod
    def from_pretrained(cls, name_or_path: str | Path, config: MARConfig | None = None) -> Self:
        """Load a VAE folder or hub id, strictly and in float32.

        Args:
            name_or_path: What `AutoencoderKL.save_pretrained` or `marval-rl convert` wrote, or a hub id.
            config: A model's configuration, to check that the latents are those it generates.

        Raises:
            CheckpointError: If it is missing, damaged, incomplete, or has other latents than the model's.
        """
        autoencoder = load_autoencoder(name_or_path)
        found = (stride_of(autoencoder), autoencoder.config.latent_channels)
        if config is not None and found != (config.latent_stride, config.latent_channels):
            raise CheckpointError(
                f"the VAE {name_or_path} has latents of stride {found[0]} with {found[1]} channels; the model "
                f"generates latents of stride {config.latent_stride} with {config.latent_channels}: choose its own "
                "(--vae ...)"
            )
        return cls(autoencoder)

    @property
    def network(self) -> AutoencoderKL:
        return self.autoencoder

    @property
    def stride(self) -> int:
        return stride_of(self.autoencoder)

    def to(self, device: torch.device | str) -> Self:
        self.autoencoder.to(device)
        return self

    def encode(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] in 0..1 -> latents [B, c, H/stride, W/stride], a fresh posterior sample each time."""
        return self.from_moments(self.moments(images))

    @torch.no_grad()
    def moments(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] in 0..1 -> mean and log-variance of the posterior, [B, 2c, h, w], unscaled.

        Raises:
            ValueError: If H or W is not a multiple of the stride; the VAE would drop the rest silently.
        """
        stride = stride_of(self.autoencoder)
        if images.shape[-2] % stride or images.shape[-1] % stride:
            raise ValueError(
                f"images of {tuple(images.shape[-2:])} pixels do not divide into the VAE's {stride} x {stride}"
            )
        parts = images.split(IMAGES_AT_ONCE)
        return torch.cat([self.autoencoder.encode(part * 2 - 1).latent_dist.parameters for part in parts])

    def from_moments(self, moments: Tensor) -> Tensor:
        """A scaled posterior sample from mean and log-variance [B, 2c, h, w]; float32."""
        return (DiagonalGaussianDistribution(moments.float()).sample() - self.shift) * self.scale

    def decode(self, latents: Tensor, text: Tensor | None = None) -> Tensor:
        """Latents [B, c, h, w] -> images [B, 3, H, W] in 0..1, float32; the decoder reads no text.

        Differentiable; the decoder runs again in the backward pass, so that memory holds the activations of
        `IMAGES_AT_ONCE` images, not of all.
        """
        parts = latents.split(IMAGES_AT_ONCE)
        if latents.requires_grad and torch.is_grad_enabled():
            return torch.cat([checkpoint(self._decode, part, use_reentrant=False) for part in parts])
        return torch.cat([self._decode(part) for part in parts])

    def _decode(self, latents: Tensor) -> Tensor:
        images = self.autoencoder.decode(latents / self.scale + self.shift).sample
        return ((images.float() + 1) / 2).clamp(0, 1)


def stride_of(autoencoder: AutoencoderKL) -> int:
    """Pixels along one side of a latent cell."""
    return 2 ** (len(autoencoder.config.block_out_channels) - 1)


def load_autoencoder(name_or_path: str | Path) -> AutoencoderKL:
    """diffusers' AutoencoderKL from a folder or hub id: safetensors only, strictly, in float32.

    Raises:
        CheckpointError: If it is missing, damaged, incomplete, of another class, or not finite.
    """
    path = Path(name_or_path)
    if path.exists() and not (path / "config.json").is_file():
        raise CheckpointError(
            f"{path} is not a VAE folder: it holds no config.json (`marval-rl convert kl16.ckpt OUT` makes one)"
        )
    if not looks_like_hub_id(name_or_path) and not path.exists():
        raise CheckpointError(f"no VAE at {path}: the path does not exist (--vae ...)")
    try:
        with _silent_diffusers():
            config = AutoencoderKL.load_config(str(name_or_path))
            _check_config(config, name_or_path)
            autoencoder, info = AutoencoderKL.from_pretrained(
                str(name_or_path), use_safetensors=True, output_loading_info=True, torch_dtype=torch.float32
            )
    except (OSError, ValueError, RuntimeError, TypeError) as error:
        raise CheckpointError(f"cannot load the VAE {name_or_path}: {first_line(error)}") from error
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[what]:
            shown = ", ".join(map(str, sorted(info[what], key=str)[:5]))
            raise CheckpointError(
                f"the VAE {name_or_path} is incomplete or another: {len(info[what])} {what.replace('_', ' ')}: {shown}"
            )
    check_finite(autoencoder.state_dict(), path)
    return autoencoder


def _check_config(config: object, name_or_path: str | Path) -> None:
    """Raises CheckpointError unless a config.json is an AutoencoderKL's, with a scale and shift that are numbers."""
    fields: dict = config if isinstance(config, dict) else {}
    class_name = fields.get("_class_name")
    if class_name != AutoencoderKL.__name__:
        raise CheckpointError(
            f"{name_or_path} is not an AutoencoderKL: its config.json says _class_name {class_name!r}"
        )
    scale, shift = fields.get("scaling_factor", 1.0), fields.get("shift_factor") or 0.0
    if not all(isinstance(value, int | float) and math.isfinite(value) for value in (scale, shift)) or scale == 0:
        raise CheckpointError(f"the VAE {name_or_path} has scaling_factor {scale!r} and shift_factor {shift!r}")


@contextmanager
def _silent_diffusers() -> Iterator[None]:
    """diffusers logs what it then raises or returns; one line is enough."""
    verbosity = diffusers_logging.get_verbosity()
    diffusers_logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        diffusers_logging.set_verbosity(verbosity)
