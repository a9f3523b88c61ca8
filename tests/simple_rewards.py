"""Simple rewards and a batch of images, for the tests of how rewards are found, called and held to their contract."""

from __future__ import annotations

from importlib.metadata import EntryPoint, EntryPoints

import pytest
import torch

from marval_rl.rewarding import loading

BATCH = 3


def brightness(*, images, **columns):
    """Mean grey level."""
    return images.mean(dim=(1, 2, 3))


brightness.differentiable = True


def constant(value):
    """A reward that returns `value`, whatever the images."""

    def reward(*, images, **columns):
        return value

    return reward


class Scaled:
    """Mean grey level, times a factor."""

    differentiable = True

    def __init__(self, factor: float = 1.0) -> None:
        if factor < 0:
            raise ValueError("factor must not be negative")
        self.factor = factor

    def __call__(self, *, images, **columns):
        return self.factor * images.mean(dim=(1, 2, 3))


def batch(channels: int = 3) -> dict:
    grey = torch.tensor([0.0, 0.25, 1.0])
    return {
        "images": grey[:, None, None, None].expand(BATCH, channels, 8, 8).clone(),
        "prompts": ["a", "b", "c"],
        "class_labels": torch.tensor([0, 1, 2]),
        "class_names": ["zero", "one", "two"],
    }


def register(monkeypatch: pytest.MonkeyPatch, **targets: str) -> None:
    """Put stand-ins in the place of the registered rewards: name=target."""
    group = loading.ENTRY_POINT_GROUP
    points = EntryPoints(EntryPoint(name, target, group) for name, target in targets.items())
    monkeypatch.setattr(loading, "entry_points", lambda *, group: points.select(group=group))
