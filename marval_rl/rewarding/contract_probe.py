"""What the checks of the contract share: a reward, and the images and captions that it is tried on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import cycle, islice
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from marval_rl.rewarding.reward_set import RewardSet

OK, WARNING, FAILS = "ok", "warning", "fails"
Verdict = tuple[str, str]  # one of them, and why

NUM_IMAGES = 8


@dataclass(frozen=True)
class Captions:
    """What the images are supposed to show; lists of equal length, repeated as often as needed."""

    prompts: Sequence[str]
    class_labels: Sequence[int]
    class_names: Sequence[str]
    columns: Mapping[str, Sequence[Any]]


class Probe:
    """A reward with images to try it on: smooth and noisy ones in colour, [8, 3, image_size, image_size] in .1...9."""

    def __init__(self, rewards: RewardSet, captions: Captions, image_size: int, device: str) -> None:
        [self.reward], [self.name] = rewards.rewards, rewards.names
        self.rewards = rewards
        self.captions = captions
        self.image_size = image_size
        self.device = device

    @property
    def images(self) -> Tensor:
        """The same ones every time, but never the same memory: a reward may have changed what it was given."""
        return self.make_images(NUM_IMAGES, self.image_size, self.image_size)

    def make_images(self, count: int, height: int, width: int) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        coarse = torch.rand(count, 3, 4, 4, generator=generator)
        smooth = F.interpolate(coarse, size=(height, width), mode="bilinear")
        noise = torch.rand(count, 3, height, width, generator=generator)
        return (0.1 + 0.6 * smooth + 0.2 * noise).to(self.device)

    def score(self, images: Tensor, first: int = 0, with_grad: bool = False) -> Tensor:
        """Scores [B], NaN for None; the images get the captions from number `first` on."""
        count = len(images)
        scores = self.rewards.score(
            images,
            prompts=_take(self.captions.prompts, first, count),
            class_labels=torch.tensor(_take(self.captions.class_labels, first, count), device=self.device),
            class_names=_take(self.captions.class_names, first, count),
            columns={name: _take(values, first, count) for name, values in self.captions.columns.items()},
            with_grad=with_grad,
        )
        return scores.components[self.name]

    @cached_property
    def scores(self) -> Tensor:
        return self.score(self.images)

    def compare(self, found: Tensor, expected: Tensor) -> tuple[float, float]:
        """The largest difference, and its share of the spread of the scores; infinite where only one of two is None."""
        if not torch.equal(found.isnan(), expected.isnan()):
            return float("inf"), float("inf")
        difference = float((found - expected).abs().nan_to_num(0).max())
        kept = self.scores[~self.scores.isnan()]
        if difference == 0 or not len(kept):
            return difference, 0.0
        spread = float(kept.max() - kept.min()) + 1e-3 * float(kept.abs().max())  # a constant has no spread
        return difference, difference / spread


def _take(values: Sequence[Any], first: int, count: int) -> list[Any]:
    return list(islice(cycle(values), first, first + count))
