"""How unlike each other the images of one class are."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def check_num_images(num_images: int, num_classes: int, setting: str) -> None:
    """Raises ValueError if so many generated images, the classes equally often, are too few for diversity."""
    if num_images < 2 * num_classes:
        raise ValueError(
            f"{setting} must be at least {2 * num_classes}, not {num_images}: diversity compares at least 2 images a "
            f"class, and there are {num_classes} classes"
        )


def within_class_diversity(images: Tensor, class_labels: Tensor) -> float:
    """Mean L2 pixel distance over the pairs of images inside a class, averaged over the classes that occur.

    images [N, C, H, W], class_labels int64 [N]. 0 where each class shows one picture; alone it says little:
    divide by the figure of real images.

    Raises ValueError for mismatched lengths or a class with fewer than 2 images.
    """
    if len(images) != len(class_labels):
        raise ValueError(f"{len(images)} images but {len(class_labels)} class labels")
    pixels = images.flatten(1).float()
    distances = []
    for label in class_labels.unique().tolist():
        members = pixels[class_labels == label]
        if len(members) < 2:
            raise ValueError(f"class {label} has only 1 image; diversity needs at least 2 images a class")
        distances.append(float(F.pdist(members).double().mean()))
    if not distances:
        raise ValueError("diversity needs at least 2 images a class, but there are no images")
    return sum(distances) / len(distances)
