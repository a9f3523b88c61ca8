"""The differentiable preprocessing of images for a network: resized as by PIL, cropped, normalised."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def _bicubic(distance: Tensor) -> Tensor:
    """Keys' cubic kernel with a = -0.5, PIL's choice; it reaches two pixels."""
    x = distance.abs()
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    return torch.where(x < 1, near, torch.where(x < 2, far, 0))


def _bilinear(distance: Tensor) -> Tensor:
    return (1 - distance.abs()).clamp(min=0)


FILTERS = {"bicubic": _bicubic, "bilinear": _bilinear}


@dataclass(frozen=True)
class Preprocessing:
    """Images [B, 3, H, W] in 0..1 of any size -> normalised pixels [B, 3, size, size].

    Args:
        size: Pixels along a side of the square that the network takes.
        mean, std: A channel each: pixels become (x - mean) / std.
        filter: "bicubic" or "bilinear".
        keep_ratio: True: the short side is resized and the middle cut out. False: both sides are resized.
        crop_start: (length - size) / 2 -> first row or column of the cut: `round` as torchvision does, `int` as
            transformers does. They differ by one pixel for some odd lengths.
        resized: Pixels of the short side (keep_ratio) or of both sides before the cut; None for `size`.
    """

    size: int
    mean: tuple[float, float, float] = CLIP_MEAN
    std: tuple[float, float, float] = CLIP_STD
    filter: str = "bicubic"
    keep_ratio: bool = True
    crop_start: Callable[[float], int] = round
    resized: int | None = None

    def __call__(self, images: Tensor) -> Tensor:
        pixels = resize(images, *self._resized_shape(*images.shape[-2:]), self.filter)
        top, left = (self.crop_start((length - self.size) / 2) for length in pixels.shape[-2:])
        pixels = pixels[..., top : top + self.size, left : left + self.size]
        mean, std = (pixels.new_tensor(values).view(3, 1, 1) for values in (self.mean, self.std))
        return (pixels - mean) / std

    def _resized_shape(self, height: int, width: int) -> tuple[int, int]:
        shorter = self.resized or self.size
        if not self.keep_ratio:
            return shorter, shorter
        short, long = sorted((height, width))
        longer = int(shorter * long / short)  # rounded down, as torchvision and transformers do
        return (shorter, longer) if height <= width else (longer, shorter)


def resize(images: Tensor, height: int, width: int, filter: str = "bicubic") -> Tensor:
    """Images [B, C, H, W] in 0..1 -> [B, C, height, width] in 0..1, within 2/255 of PIL's resize of the same bytes.

    As in PIL, the width comes first, the kernel widens where the image shrinks, and what overshoots is cut off after
    each direction; without the first cut, hard edges land up to 21/255 away. Only PIL's rounding to bytes is left
    out, since it has no gradient. A direction that keeps its length is not touched at all. (From version 13 on, Pillow
    begins with the height where that shrinks much more than the width. We stay with what the models were trained with.)

    A product with a matrix instead of `F.interpolate`, whose gradient is not deterministic on a GPU.
    """
    if images.shape[-1] != width:
        images = (images @ _weights(images, images.shape[-1], width, filter).T).clamp(0, 1)
    if images.shape[-2] != height:
        images = (_weights(images, images.shape[-2], height, filter) @ images).clamp(0, 1)
    return images


def _weights(images: Tensor, source: int, target: int, filter: str) -> Tensor:
    """How much each source pixel counts in each target pixel: [target, source], rows sum to 1."""
    scale = source / target
    centres = (torch.arange(target, dtype=torch.float64) + 0.5) * scale
    positions = torch.arange(source, dtype=torch.float64) + 0.5
    weights = FILTERS[filter]((positions - centres.unsqueeze(1)) / max(scale, 1))
    return (weights / weights.sum(dim=1, keepdim=True)).to(images)
