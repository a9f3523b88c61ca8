"""Reward: does the image show its class? Judged by a small digit classifier; a second, different one holds out."""

from __future__ import annotations

import os

import torch
import torch.nn.functional as F
from torch import Tensor

from marval_rl.data.bundled import DIGIT_NAMES, PARITY

from .digit_networks import ConvolutionalNetwork, DigitNetwork, PerceptronNetwork, load_digit_network

SCORES = ("log_probability", "accuracy", "confidence")
IMAGE_SIZE = 8
DIGITS_OF = {  # class name -> the digits that belong to it
    **{name: [digit] for digit, name in enumerate(DIGIT_NAMES)},
    **{group: [DIGIT_NAMES.index(name) for name in names] for group, names in PARITY.items()},
}


class Classifier:
    """How well the image shows its class, by a small convolutional network trained on the digits' train split.

    score       "log_probability": log of the probability of the sample's class, <= 0. A class of several digits
                ("even digit") has the sum of their probabilities.
                "accuracy": 1 where the most probable digit belongs to the class, else 0; not differentiable.
                "confidence": the largest probability of any digit, whatever the class, in .1..1.
    checkpoint  a safetensors file with this network's weights; None trains them once and caches them.

    Raises ValueError for an unknown score, a checkpoint that does not exist or an unknown class name, and
    CheckpointError for a checkpoint that does not fit.
    """

    differentiable = True
    architecture: type[DigitNetwork] = ConvolutionalNetwork
    num_modes = 10

    def __init__(self, score: str = "log_probability", checkpoint: str | os.PathLike | None = None) -> None:
        if score not in SCORES:
            raise ValueError(f"unknown score {score!r}; known: {', '.join(SCORES)}")
        self.score = score
        self.differentiable = score != "accuracy"
        self.network = load_digit_network(self.architecture, checkpoint)

    def __call__(self, *, images: Tensor, class_names: list[str], **columns: object) -> Tensor:
        """Score images [B, 3, H, W] in 0..1 against class_names (length B) -> float32 [B]."""
        log_probs = self.mode_log_probs(images)  # [B, 10]
        if self.score == "confidence":
            return log_probs.amax(dim=1).exp()
        members = _class_members(class_names).to(log_probs.device)  # [B, 10]
        if self.score == "accuracy":
            best = log_probs.argmax(dim=1, keepdim=True)
            return members.gather(1, best).squeeze(1).float()
        return log_probs.masked_fill(~members, -torch.inf).logsumexp(dim=1)

    def features(self, images: Tensor) -> Tensor:
        """The penultimate layer, after its ReLU: images [B, 3, H, W] in 0..1 -> [B, 32], not negative."""
        return self._network_on(images.device).features(_to_digits(images))

    def mode_log_probs(self, images: Tensor) -> Tensor:
        """Log-probabilities of the ten digits: images [B, 3, H, W] in 0..1 -> [B, 10]."""
        return self._network_on(images.device)(_to_digits(images)).log_softmax(dim=1)

    def _network_on(self, device: torch.device) -> DigitNetwork:
        self.network = self.network.to(device)  # a no-op except at the first call on another device
        return self.network


class HeldOutClassifier(Classifier):
    """The same question to a network of another kind and seed: a judge to evaluate with, never to train on."""

    architecture = PerceptronNetwork


def _to_digits(images: Tensor) -> Tensor:
    """Colour images [B, 3, H, W] (or grey ones) of any size -> grey [B, 1, 8, 8]."""
    grey = images.float().mean(dim=1, keepdim=True)
    if grey.shape[-2:] == (IMAGE_SIZE, IMAGE_SIZE):
        return grey
    return F.interpolate(grey, size=(IMAGE_SIZE, IMAGE_SIZE), mode="area")


def _class_members(class_names: list[str]) -> Tensor:
    """Which digits belong to each sample's class: bool [B, 10]."""
    members = torch.zeros(len(class_names), 10, dtype=torch.bool)
    for row, class_name in enumerate(class_names):
        if class_name not in DIGITS_OF:
            raise ValueError(f"unknown class name {class_name!r}; this classifier knows {', '.join(DIGITS_OF)}")
        members[row, DIGITS_OF[class_name]] = True
    return members
