"""The size of images: one number for squares, or height and width."""

from __future__ import annotations

from collections.abc import Sequence

ImageSize = int | Sequence[int]  # a square's side in pixels, or height and width


def height_and_width(size: ImageSize) -> tuple[int, int]:
    """Both, in pixels. Raises ValueError for another number of numbers, or one that is not whole and positive."""
    pair = (size, size) if isinstance(size, int) else tuple(size)
    if len(pair) != 2 or not all(type(length) is int and length >= 1 for length in pair):
        raise ValueError(f"image_size must be a whole number of at least 1, or [height, width], not {size!r}")
    return pair


def shortest(size: Sequence[int]) -> int | list[int]:
    """Height and width as they are written: one number for a square."""
    height, width = size
    return height if height == width else [height, width]
