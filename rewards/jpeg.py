"""Reward: how small, or how large, an image becomes as a JPEG; a target that anyone can check by eye."""

from __future__ import annotations

import io

import torch
from PIL import Image
from torch import Tensor

# What is encouraged -> the sign of the size.
SIGNS = {"compressible": -1, "incompressible": 1}


class Jpeg:
    """Kilobytes (of 1000 bytes) of the image as a JPEG, negative where small files are wanted (arXiv 2305.13301).

    Args:
        encourage: "compressible" (default) for smooth images, "incompressible" for busy ones.
        quality: Of the JPEG, 1 to 95.

    The bytes are Pillow's for the image rounded to 8 bits. Not differentiable.

    Raises:
        ValueError: For another word or quality.
    """

    differentiable = False

    def __init__(self, encourage: str = "compressible", quality: int = 95) -> None:
        if encourage not in SIGNS:
            raise ValueError(f"encourage must be one of {', '.join(SIGNS)}, not {encourage!r}")
        if quality not in range(1, 96):
            raise ValueError(f"quality must be a whole number from 1 to 95, not {quality!r}")
        self.sign = SIGNS[encourage]
        self.quality = int(quality)

    def __call__(self, *, images: Tensor, **columns: object) -> Tensor:
        """Score images [B, 3, H, W] in 0..1 -> float32 [B]."""
        pixels = (images.detach().float() * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
        kilobytes = [self._num_bytes(Image.fromarray(picture)) / 1000 for picture in pixels]
        return self.sign * torch.tensor(kilobytes, dtype=torch.float32, device=images.device)

    def _num_bytes(self, picture: Image.Image) -> int:
        buffer = io.BytesIO()
        picture.save(buffer, format="JPEG", quality=self.quality)
        return buffer.tell()
