"""Rewards that the tests serve from another process: `tests/remote_rewards.py:NAME`. Needs torch only."""

from __future__ import annotations

import sys
import time
from typing import Any

import torch
from torch import Tensor

LEFT_OUT = 97  # every so many images
MISSING = {"transformers", "trl", "accelerate", "datasets", "diffusers", "torchvision", "urllib3", "scipy", "sklearn"}


def encode(index: Tensor) -> Tensor:
    """Numbers below 65,536, [B] -> images [B, 3, 8, 8] whose mean colour says which they are."""
    low, high = index % 256, index // 256
    colours = torch.stack([low, high, torch.zeros_like(low)], dim=1).float() / 255
    return colours[:, :, None, None].expand(-1, -1, 8, 8).contiguous()


def number(
    *,
    images: Tensor,
    prompts: list[str],
    class_labels: Tensor,
    numbers: list[int],
    seconds: list[float],
    **columns: object,
) -> list[int | None]:
    """The number that each image shows, None for every 97th; raises if its prompt, label or column is another's.

    seconds  what each image takes
    """
    time.sleep(sum(seconds))
    colours = (images.mean(dim=(2, 3)) * 255).round().long()
    shown = (colours[:, 0] + 256 * colours[:, 1]).tolist()
    for image, prompt, label, column in zip(shown, prompts, class_labels.tolist(), numbers, strict=True):
        if (prompt, label, column) != (f"number {image}", image % 10, image):
            raise ValueError(f"image {image} came with {prompt!r}, label {label} and column {column}")
    return expected(torch.tensor(shown))


def number_in_a_lean_process(*, images: Tensor, **arguments: Any) -> list[int | None]:
    """`number`; raises if a module is loaded that the environment of a served reward may not have."""
    loaded = sorted(MISSING & sys.modules.keys())
    assert not loaded, f"the server imported {', '.join(loaded)}"
    return number(images=images, **arguments)


def expected(numbers: Tensor) -> list[int | None]:
    return [None if n % LEFT_OUT == 0 else n for n in numbers.tolist()]


def arguments(numbers: Tensor, seconds: float = 0) -> dict[str, Any]:
    """What `number` is called with for these numbers, [B]."""
    return {
        "images": encode(numbers),
        "prompts": [f"number {n}" for n in numbers.tolist()],
        "class_labels": numbers % 10,
        "class_names": ["a name"] * len(numbers),
        "numbers": numbers.tolist(),
        "seconds": [seconds] * len(numbers),
    }


def brightness(*, images: Tensor, **columns: object) -> Tensor:
    return images.mean(dim=(1, 2, 3))
