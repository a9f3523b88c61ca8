"""Tiny image sets, and a random Inception in torch-fidelity's file format, for tests."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from tiny_models import tiny_student
from torch import nn
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from marval_rl.models import MARModel

NAMES = ["cat", "dog", "owl"]
INPUT_SIZE = 75  # the least that Inception's layers leave anything of; its own 299 are 16 times as slow


def colour_student(seed: int = 0) -> MARModel:
    """Generates 3 x 4 x 4 pixels of three classes with names."""
    return tiny_student(seed, image_channels=3, latent_channels=3, class_names=NAMES)


def save_student(folder: Path, seed: int = 0) -> Path:
    colour_student(seed).save_pretrained(folder)
    return folder


def random_images(folder: Path, count: int, seed: int, size: int = 16) -> Path:
    """A folder of PNG files of smooth random colours."""
    folder.mkdir(parents=True)
    coarse = torch.rand(count, 3, 4, 4, generator=torch.Generator().manual_seed(seed))
    images = F.interpolate(coarse, size=(size, size), mode="bilinear")
    for index, image in enumerate((images * 255).to(torch.uint8).permute(0, 2, 3, 1)):
        Image.fromarray(np.ascontiguousarray(image)).save(folder / f"{index:02d}.png")
    return folder


def brightness(*, images: torch.Tensor, prompts: list[str], class_names: list[str], **columns) -> torch.Tensor:
    """A reward that checks its arguments."""
    assert prompts == [f"a {name}" for name in class_names]
    assert class_names == [NAMES[label] for label in columns["class_labels"].tolist()]
    return images.mean(dim=(1, 2, 3))


def every_other(*, images: torch.Tensor, **columns) -> list[float | None]:
    """A reward that leaves images out."""
    return [None if index % 2 else 3.0 for index in range(len(images))]


class _WithoutWeights(FeatureExtractorInceptionV3):
    """torch-fidelity's network with the weights that PyTorch starts it with."""

    def load_state_dict(self, state_dict: dict, *args, **kwargs) -> None:
        pass


def random_inception(file: Path) -> Path:
    """Random weights of a scale at which features and classes differ between images."""
    nothing = io.BytesIO()
    torch.save({}, nothing)
    nothing.seek(0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = _WithoutWeights("random", ["2048"], feature_extractor_weights_path=nothing)
        for module in network.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)
        network.fc.weight *= 100
    torch.save(network.state_dict(), file)
    return file
