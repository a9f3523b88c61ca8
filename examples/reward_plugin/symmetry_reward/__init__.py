"""A reward in a package of its own."""

from __future__ import annotations

from torch import Tensor


class Symmetry:
    """How alike an image is to its mirror image: 0 at best, down to -sharpness.

    sharpness   what the mean difference of the pixels is multiplied with
    """

    differentiable = True

    def __init__(self, sharpness: float = 1.0) -> None:
        if sharpness <= 0:
            raise ValueError(f"sharpness must be positive, not {sharpness}")
        self.sharpness = sharpness

    def __call__(self, *, images: Tensor, **columns: object) -> Tensor:
        """Score images [B, 3, H, W] in 0..1 -> [B]."""
        return -self.sharpness * (images - images.flip(3)).abs().mean(dim=(1, 2, 3))
