"""Latents of a VAE: diffusers' `AutoencoderKL`, such as the KL-16 of the official MAR models."""

from __future__ import annotations

from pathlib import Path
from typing import Self

import torch
from diffusers import AutoencoderKL
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch import Tensor

from marval_rl.errors import CheckpointError
from marval_rl.models.config import MARConfig


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
            config: A model's configuration, to check that the latents are those it paints.

        Raises:
            CheckpointError: If it is missing, damaged, incomplete, or has other latents than the model's.
        """
        autoencoder = load_autoencoder(name_or_path)
        found = (stride_of(autoencoder), autoencoder.config.latent_channels)
        if config is not None and found != (config.latent_stride, config.latent_channels):
            raise CheckpointError(
                f"the VAE {name_or_path} has latents of stride {found[0]} with {found[1]} channels; the model paints "
                f"latents of stride {config.latent_stride} with {config.latent_channels}: choose its own (--vae ...)"
            )
        return cls(autoencoder)

    def to(self, device: torch.device | str) -> Self:
        self.autoencoder.to(device)
        return self

    def encode(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] in 0..1 -> latents [B, c, H/stride, W/stride], a fresh posterior sample each time."""
        return self.from_moments(self.moments(images))

    @torch.no_grad()
    def moments(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] in 0..1 -> mean and log-variance of the posterior, [B, 2c, h, w], unscaled."""
        return self.autoencoder.encode(images * 2 - 1).latent_dist.parameters

    def from_moments(self, moments: Tensor) -> Tensor:
        """A scaled posterior sample from mean and log-variance [B, 2c, h, w]; float32."""
        return (DiagonalGaussianDistribution(moments.float()).sample() - self.shift) * self.scale

    def decode(self, latents: Tensor) -> Tensor:
        images = self.autoencoder.decode(latents / self.scale + self.shift).sample
        return ((images.float() + 1) / 2).clamp(0, 1)


def stride_of(autoencoder: AutoencoderKL) -> int:
    """Pixels along one side of a latent cell."""
    return 2 ** (len(autoencoder.config.block_out_channels) - 1)


def load_autoencoder(name_or_path: str | Path) -> AutoencoderKL:
    """diffusers' AutoencoderKL from a folder or hub id, safetensors only. Raises CheckpointError."""
    path = Path(name_or_path)
    if path.exists() and not (path / "config.json").is_file():
        raise CheckpointError(
            f"{path} is no VAE folder: it holds no config.json (`marval-rl convert kl16.ckpt OUT` makes one)"
        )
    looks_local = str(name_or_path).startswith((".", "/", "~")) or str(name_or_path).count("/") != 1
    if looks_local and not path.exists():
        raise CheckpointError(f"no VAE at {path}: the path does not exist (--vae ...)")
    try:
        autoencoder, info = AutoencoderKL.from_pretrained(
            str(name_or_path), use_safetensors=True, output_loading_info=True, torch_dtype=torch.float32
        )
    except (OSError, ValueError, RuntimeError) as error:
        first = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise CheckpointError(f"cannot load the VAE {name_or_path}: {first}") from error
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[what]:
            shown = ", ".join(map(str, sorted(info[what], key=str)[:5]))
            raise CheckpointError(
                f"the VAE {name_or_path} is incomplete or another: {len(info[what])} {what.replace('_', ' ')}: {shown}"
            )
    return autoencoder
