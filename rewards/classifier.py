"""Reward: does the image show its class? Judged by a small classifier; a second, different one is held out."""

from __future__ import annotations

import os
from functools import cached_property

import torch
from torch import Tensor

from marval_rl.data import CroppedImages, load_cropped_images

from .classifier_networks import ClassifierNetwork, ConvolutionalNetwork, PerceptronNetwork, fit_images, load_network

SCORES = ("log_probability", "accuracy", "confidence")


class Classifier:
    """How well the image shows its class, by a small convolutional network trained on labelled images.

    score            "log_probability": log of the probability of the sample's class, <= 0. A class that merges
                     several ("even digit") has the sum of their probabilities.
                     "accuracy": 1 where the most probable class belongs to it, else 0; not differentiable.
                     "confidence": the largest probability of any class, whatever the sample's own.
    training_images  what the network is trained on, once: it is cached. In a recipe the images that are trained on;
                     else a bundled set or a folder of class folders.
    class_groups     for a name: classes that are merged, as in a recipe.
    checkpoint       a safetensors file with this network's weights, in place of training.

    Raises ValueError for an unknown score, no images, a checkpoint that does not exist or an unknown class name, and
    CheckpointError for a checkpoint that does not fit; when it is first used, DataError for images that cannot be read.
    """

    differentiable = True
    architecture: type[ClassifierNetwork] = ConvolutionalNetwork

    def __init__(
        self,
        score: str = "log_probability",
        training_images: CroppedImages | str | None = None,
        class_groups: dict[str, list[str]] | str | None = None,
        checkpoint: str | os.PathLike | None = None,
    ) -> None:
        if score not in SCORES:
            raise ValueError(f"unknown score {score!r}; known: {', '.join(SCORES)}")
        if training_images is None:
            raise ValueError("it learns from labelled images: set dataset, or training_images in its reward_kwargs")
        self.score = score
        self.differentiable = score != "accuracy"
        if not isinstance(training_images, CroppedImages):
            training_images = load_cropped_images(training_images, class_groups=class_groups)
        self._training_images = training_images
        self._checkpoint = checkpoint
        if checkpoint is not None:
            self.network  # noqa: B018  # its errors belong here
        self.num_modes = len(training_images.mode_names)
        self._modes_of = {name: [mode] for mode, name in enumerate(training_images.mode_names)}
        for label, name in enumerate(training_images.class_names):
            self._modes_of[name] = [mode for mode, of in enumerate(training_images.class_of_mode) if of == label]

    def __call__(self, *, images: Tensor, class_names: list[str], **columns: object) -> Tensor:
        """Score images [B, 3, H, W] in 0..1 against class_names (length B) -> float32 [B]."""
        log_probs = self.mode_log_probs(images)  # [B, num_modes]
        if self.score == "confidence":
            return log_probs.amax(dim=1).exp()
        members = self._members(class_names).to(log_probs.device)  # [B, num_modes]
        if self.score == "accuracy":
            best = log_probs.argmax(dim=1, keepdim=True)
            return members.gather(1, best).squeeze(1).float()
        return log_probs.masked_fill(~members, -torch.inf).logsumexp(dim=1)

    @cached_property
    def network(self) -> ClassifierNetwork:
        """Trained when it is first asked for, unless it is in the cache: a dry run asks for nothing."""
        return load_network(self.architecture, self._training_images, self._checkpoint)

    def features(self, images: Tensor) -> Tensor:
        """The penultimate layer, after its ReLU: images [B, 3, H, W] in 0..1 -> [B, F], not negative."""
        return self._network_on(images.device).features(fit_images(images, self.network))

    def mode_log_probs(self, images: Tensor) -> Tensor:
        """Log-probabilities of the classes as the data have them: images [B, 3, H, W] in 0..1 -> [B, num_modes]."""
        return self._network_on(images.device)(fit_images(images, self.network)).log_softmax(dim=1)

    def _network_on(self, device: torch.device) -> ClassifierNetwork:
        self.network = self.network.to(device)  # a no-op except at the first call on another device
        return self.network

    def _members(self, class_names: list[str]) -> Tensor:
        """Which modes belong to each sample's class: bool [B, num_modes]."""
        members = torch.zeros(len(class_names), self.num_modes, dtype=torch.bool)
        for row, name in enumerate(class_names):
            if name not in self._modes_of:
                known = ", ".join(list(self._modes_of)[:20])
                raise ValueError(f"unknown class name {name!r}; this classifier knows {known}")
            members[row, self._modes_of[name]] = True
        return members


class HeldOutClassifier(Classifier):
    """The same question to a network of another kind and seed: a judge to evaluate with, never to train on."""

    architecture = PerceptronNetwork
