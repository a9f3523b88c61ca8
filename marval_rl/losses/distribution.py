"""Maximum mean discrepancy: how far the generated images of a class are, as a set, from the real ones.

    MMD^2 = E k(x, x') + E k(r, r') - 2 E k(x, r),   x, x' generated, r, r' real   (Gretton et al. 2012, lemma 6)

A reward for each image ends in its favourite mode. This one has its maximum where the two sets agree in the features,
and its gradient moves images that lie too close together apart (E k(x, x')) and all of them towards the real ones.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

KERNELS = ("rbf", "energy", "polynomial")
RBF_SCALES = (0.35, 0.7, 1.4)  # bandwidths, in units of the median distance between real images
MEDIAN_DISTANCES = 1_000_000  # that the median is taken of, about
MAX_CONSTANT_ROWS = 2000  # real images of a class whose pairs give the constant


@dataclass(frozen=True)
class Kernel:
    """k(x, y) of features.

    "rbf": the mean of exp(-|x - y|^2 / (2 s^2 m^2)) over the bandwidths s of RBF_SCALES. "energy": -|x - y| / m, with
    which MMD^2 is the energy distance (Sejdinovic et al. 2013). "polynomial": (x . y / F + 1)^3, as in KID (Binkowski
    et al. 2018).

    Args:
        name: One of KERNELS.
        median: m, the median distance between real features; the polynomial kernel does without.

    Raises:
        ValueError: For an unknown name, or a median that is not positive.
    """

    name: str = "rbf"
    median: float = 1.0

    def __post_init__(self):
        if self.name not in KERNELS:
            raise ValueError(f'kernel must be one of {", ".join(KERNELS)}, not "{self.name}"')
        if not self.median > 0:
            raise ValueError(f"the median distance between real features must be positive, not {self.median}")

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        """x [N, F], y [M, F] -> k [N, M], float32."""
        x, y = x.float(), y.float()
        if self.name == "polynomial":
            return (x @ y.T / x.shape[1] + 1) ** 3
        squares = (x.square().sum(1)[:, None] + y.square().sum(1)[None] - 2 * x @ y.T).clamp(min=0) / self.median**2
        if self.name == "energy":
            # The root has no gradient at 0, where an image meets itself; the small number gives it one, of 0.
            return -(squares + 1e-12).sqrt()
        return torch.stack([(-squares / (2 * scale**2)).exp() for scale in RBF_SCALES]).mean(dim=0)


def median_distance(by_class: Mapping[int, Tensor]) -> float:
    """The median distance between features of the same class; of each class the first rows are looked at.

    Args:
        by_class: label -> [M_c, F].

    Raises:
        ValueError: If no class has two different rows.
    """
    count = math.ceil(math.sqrt(2 * MEDIAN_DISTANCES / len(by_class)))
    median = float(torch.cat([F.pdist(rows[:count]) for rows in by_class.values()]).median())
    if not median > 0:
        raise ValueError("no class of the real images has two images whose features differ")
    return median


@dataclass
class RealFeatures:
    """Features of the real images, by class.

    by_class: label -> [M_c, F]. self_similarity: label -> E k(r, r') within the class, the constant of MMD^2.
    """

    by_class: dict[int, Tensor]
    kernel: Kernel
    self_similarity: dict[int, Tensor]

    @classmethod
    def of(cls, features: Tensor, class_labels: Tensor, kernel: str = "rbf") -> RealFeatures:
        """From features [M, F] and their class labels [M]; the bandwidths follow from them.

        Raises:
            ValueError: For an unknown kernel, or a class with fewer than two images.
        """
        by_class = {label: features[class_labels == label].float() for label in class_labels.unique().tolist()}
        for label, rows in by_class.items():
            if len(rows) < 2:
                raise ValueError(f"class {label} has {len(rows)} real image, and its distribution needs at least 2")
        k = Kernel(kernel, 1.0 if kernel == "polynomial" else median_distance(by_class))
        constants = {}
        for label, rows in by_class.items():
            pairs = k(rows[:MAX_CONSTANT_ROWS], rows[:MAX_CONSTANT_ROWS])
            constants[label] = (pairs.sum() - pairs.diagonal().sum()) / (len(pairs) * (len(pairs) - 1))
        return cls(by_class, k, constants)


def rows_by_label(class_labels: Tensor) -> dict[int, Tensor]:
    """label -> the indices of its rows, ascending; waits for the device once, where masks would for each class."""
    rows: dict[int, list[int]] = {}
    for row, label in enumerate(class_labels.tolist()):
        rows.setdefault(label, []).append(row)
    return {label: torch.tensor(found, device=class_labels.device) for label, found in rows.items()}


def distribution_loss(
    generated: Tensor,
    class_labels: Tensor,
    real: RealFeatures,
    recent: Tensor | None = None,
    recent_labels: Tensor | None = None,
) -> Tensor:
    """MMD^2 between the generated and the real images of each class, averaged over the generated images; unbiased.

    The gradient flows through both arguments of k(x, x'). With recent features, which are constants, an image is
    compared with more of its class than one batch holds: their pairs count twice in the gradient, since the other
    argument moves the same way in expectation.

    An image that has no other of its class is left out: nothing would repel it, and the real images would draw it to
    their mean. The loss is 0 where that leaves none.

    Args:
        generated: Features [N, F] of the batch, with gradient.
        class_labels: [N].
        real: Of the real images; it must know each class of the batch.
        recent: Features [Q, F] of images generated a short while ago, detached; None for none.
        recent_labels: [Q].
    """
    losses = [0 * generated.sum(dim=1)[:0]]
    rows_of = rows_by_label(class_labels)
    recent_rows_of = {} if recent_labels is None else rows_by_label(recent_labels)
    for label, rows in sorted(rows_of.items()):
        images = generated[rows]
        others = recent[recent_rows_of[label]] if recent is not None and label in recent_rows_of else images[:0]
        count = len(images) - 1 + len(others)
        if count == 0:
            continue
        attraction = real.kernel(images, real.by_class[label]).mean(dim=1)  # [n]
        pairs = real.kernel(images, images)
        to_recent = real.kernel(images, others.detach()).sum(dim=1)
        repulsion = (pairs.sum(dim=1) - pairs.diagonal() + 2 * to_recent - to_recent.detach()) / count
        losses.append(repulsion - 2 * attraction + real.self_similarity[label])
    counted = torch.cat(losses)
    return counted.sum() / max(len(counted), 1)
