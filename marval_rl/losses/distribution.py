"""Maximum mean discrepancy: how far the generated images of a class are, as a set, from the real ones.

    MMD^2 = E k(x, x') + E k(r, r') - 2 E k(x, r),   x, x' generated, r, r' real   (Gretton et al. 2012, lemma 6)

A reward for each image ends in its favourite mode. This one has its maximum where the two sets agree in the features,
and its gradient moves images that lie too close together apart (E k(x, x')) and all of them towards the real ones.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

KERNELS = ("rbf", "energy", "polynomial")
RBF_SCALES = (0.35, 0.7, 1.4)  # bandwidths, in units of the median distance between real images


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


def median_distance(features: Tensor, class_labels: Tensor, max_rows: int = 500) -> float:
    """The median distance between features of the same class, over the classes that occur.

    Args:
        features: [N, F].
        class_labels: [N].
        max_rows: Rows of a class that are looked at, the first ones.

    Raises:
        ValueError: If no class has two different rows.
    """
    distances = [
        torch.nn.functional.pdist(features[class_labels == label][:max_rows].float())
        for label in class_labels.unique().tolist()
    ]
    median = float(torch.cat(distances).median()) if distances else float("nan")
    if not median > 0:
        raise ValueError("no class of the real images has two images whose features differ")
    return median


def mmd(generated: Tensor, real: Tensor, kernel: Kernel) -> Tensor:
    """The unbiased estimate of MMD^2 between two sets of features, a scalar; it may be negative.

    Args:
        generated: [N, F], N at least 2.
        real: [M, F], M at least 2.
    """
    return (
        _mean_of_pairs(kernel(generated, generated))
        + _mean_of_pairs(kernel(real, real))
        - 2 * kernel(generated, real).mean()
    )


def _mean_of_pairs(k: Tensor) -> Tensor:
    """The mean of a square matrix [N, N] without its diagonal."""
    return (k.sum() - k.diagonal().sum()) / (len(k) * (len(k) - 1))


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
        k = Kernel(kernel, 1.0 if kernel == "polynomial" else median_distance(features, class_labels))
        return cls(by_class, k, {label: _mean_of_pairs(k(rows, rows)) for label, rows in by_class.items()})


def distribution_loss(
    generated: Tensor,
    class_labels: Tensor,
    real: RealFeatures,
    recent: Tensor | None = None,
    recent_labels: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """MMD^2 between the generated and the real images of each class, averaged over the generated images.

    The gradient flows through both arguments of k(x, x'). With recent features, which are constants, an image is
    compared with more of its class than one batch holds: their pairs count twice in the gradient, since the other
    argument moves the same way in expectation.

    Args:
        generated: Features [N, F] of the batch, with gradient.
        class_labels: [N].
        real: Of the real images; it must know each class of the batch.
        recent: Features [Q, F] of images generated a short while ago, detached; None for none.
        recent_labels: [Q].

    Returns:
        The loss, and metrics: `mmd`, the estimate of MMD^2 over the classes with two images or more; NaN without any.
        An image that is alone of its class is drawn to the real ones and repelled by nothing.
    """
    losses, values = [], []
    for label in class_labels.unique().tolist():
        own = generated[class_labels == label]
        attraction = real.kernel(own, real.by_class[label]).mean(dim=1)  # [n]
        pairs = real.kernel(own, own)
        repulsion = pairs.sum(dim=1) - pairs.diagonal()  # [n], over the n - 1 others
        others = len(own) - 1
        if recent is not None and bool((same := recent_labels == label).any()):
            k = real.kernel(own, recent[same].detach()).sum(dim=1)
            repulsion = repulsion + 2 * k - k.detach()
            others += int(same.sum())
        repulsion = repulsion / max(others, 1)
        losses.append(repulsion - 2 * attraction)
        if others > 0:
            values.append((repulsion - 2 * attraction).detach().mean() + real.self_similarity[label])
    metric = torch.stack(values).mean() if values else generated.new_tensor(float("nan"))
    return torch.cat(losses).mean(), {"mmd": metric}


def witness(generated: Tensor, class_labels: Tensor, real: RealFeatures) -> Tensor:
    """What an image adds to -MMD^2 of its class, as a reward of its own: 2 E_r k(x, r) - 2 E_x' k(x, x').  [N]

    The expected score-function gradient of it is that of -MMD^2. With one E_x' k(x, x') in place of two, the value
    that averages to -MMD^2 itself, the repulsion would be half of what it must be.

    Args:
        generated: Features [N, F].
        class_labels: [N], each class at least twice.
    """
    rewards = torch.empty(len(generated), device=generated.device)
    for label in class_labels.unique().tolist():
        members = class_labels == label
        own = generated[members]
        pairs = real.kernel(own, own)
        others = (pairs.sum(dim=1) - pairs.diagonal()) / (len(own) - 1)
        rewards[members] = 2 * real.kernel(own, real.by_class[label]).mean(dim=1) - 2 * others
    return rewards
