"""Where the randomness of `generate` comes from: a torch generator, or each image's own index."""

from __future__ import annotations

import math
from typing import Protocol

import torch
from torch import Tensor

from marval_rl.models.unmasking import random_order


class Noise(Protocol):
    """The draws that generating a batch of B images takes, in their order."""

    def order(self, batch_size: int, num_tokens: int) -> Tensor:
        """A uniformly random unmasking order for each image, int64 [B, L]."""

    def normal(self, num_rows: int, num_channels: int, num_unused_rows: int = 0) -> Tensor:
        """Standard normal noise, float32 [num_rows, num_channels].

        Args:
            num_rows: A multiple of B: equally many rows per image, image by image.
            num_unused_rows: Rows that MAR draws after these and never uses; only a shared stream moves on by them.
        """


class GeneratorNoise:
    """Draws from one stream that all images share, in the order in which MAR draws.

    Args:
        generator: On `device`; None is the device's global one.
    """

    def __init__(self, generator: torch.Generator | None, device: torch.device | str):
        self.generator = generator
        self.device = device

    def order(self, batch_size: int, num_tokens: int) -> Tensor:
        return random_order(batch_size, num_tokens, self.device, self.generator)

    def normal(self, num_rows: int, num_channels: int, num_unused_rows: int = 0) -> Tensor:
        rows = num_rows + num_unused_rows
        return torch.randn(rows, num_channels, device=self.device, generator=self.generator)[:num_rows]


class IndexedNoise:
    """Draws that depend on nothing but the seed, the image's index, the number of the draw and the element.

    An image is then the same (up to the rounding of the networks) in whatever batch, on whichever process and beside
    whichever other images it is generated. Element e of a draw is output e of SplitMix64 (Steele, Lea & Flood 2014,
    doi 10.1145/2660193.2660195) started from a key of seed, index and draw; two halves of it make a normal number
    (Box-Muller in float64). Equal on a CPU and a GPU: orders exactly, normal numbers to float32 rounding.

    Use a new one for each call of `generate`: it counts the draws.

    Args:
        seed: Any integer.
        indices: int64 [B], the image of each row of the batch, on the device to draw on.
    """

    def __init__(self, seed: int, indices: Tensor):
        self._image_keys = _mix(_mix(_signed(seed)) ^ indices)  # [B]
        self._num_draws = 0

    def order(self, batch_size: int, num_tokens: int) -> Tensor:
        # Sorting random integers permutes all rows at once; a tie (2^-64) must be broken alike everywhere.
        return self._bits(batch_size, num_tokens).argsort(dim=1, stable=True)

    def normal(self, num_rows: int, num_channels: int, num_unused_rows: int = 0) -> Tensor:
        bits = self._bits(num_rows, num_channels)
        # Both lie strictly inside 0..1, so that the logarithm is finite: |noise| < 6.8.
        radius_share = (_shift_right(bits, 32).double() + 0.5) / 2**32
        angle_share = ((bits & 0xFFFFFFFF).double() + 0.5) / 2**32
        return ((-2 * radius_share.log()).sqrt() * (2 * math.pi * angle_share).cos()).float()

    def _bits(self, num_rows: int, num_columns: int) -> Tensor:
        """The next draw: 64 random bits per element, int64 [num_rows, num_columns]."""
        batch_size = len(self._image_keys)
        if batch_size == 0 or num_rows % batch_size:
            raise ValueError(f"{num_rows} rows of noise cannot be shared by the {batch_size} images that have indices")
        keys = _mix(self._image_keys ^ self._num_draws)
        self._num_draws += 1
        elements = torch.arange(1, num_rows // batch_size * num_columns + 1, device=keys.device)
        return _finalize(keys.unsqueeze(1) + elements * _GOLDEN_GAMMA).view(num_rows, num_columns)


def as_noise(generator: torch.Generator | Noise | None, device: torch.device | str) -> Noise:
    """The source of noise for a caller's generator, or for None."""
    if generator is None or isinstance(generator, torch.Generator):
        return GeneratorNoise(generator, device)
    return generator


def _signed(value: int) -> Tensor:
    """The lowest 64 bits of an integer as int64, in two's complement; a scalar tensor on the CPU."""
    return torch.tensor((value + 2**63) % 2**64 - 2**63)


# The constants of SplitMix64, as the int64 that torch multiplies by: its products wrap, as they must here.
_GOLDEN_GAMMA = int(_signed(0x9E3779B97F4A7C15))
_FIRST_FACTOR = int(_signed(0xBF58476D1CE4E5B9))
_SECOND_FACTOR = int(_signed(0x94D049BB133111EB))


def _shift_right(bits: Tensor, count: int) -> Tensor:
    """A shift that fills up with zeros; torch's own repeats the sign."""
    return (bits >> count) & ((1 << (64 - count)) - 1)


def _finalize(bits: Tensor) -> Tensor:
    """SplitMix64's bijection of 64 bits."""
    bits = (bits ^ _shift_right(bits, 30)) * _FIRST_FACTOR
    bits = (bits ^ _shift_right(bits, 27)) * _SECOND_FACTOR
    return bits ^ _shift_right(bits, 31)


def _mix(bits: Tensor) -> Tensor:
    """The first output of SplitMix64 started from `bits`."""
    return _finalize(bits + _GOLDEN_GAMMA)
