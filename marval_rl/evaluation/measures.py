"""How near generated images are to real ones: pure functions of features [N, F], of logits, and of labels."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

NEIGHBOURS = 3  # of precision and recall, as published (ADM, arXiv 2105.05233, uses 3 as well)
SCORE_SPLITS = 10  # of the Inception Score, as published
KID_SUBSETS, KID_SUBSET_SIZE, KID_SEED = 100, 1000, 2020  # torch-fidelity's
MAX_KERNEL_ROWS = 4096  # up to so many rows the kernel is computed once for all subsets: 3 x 128 MiB
CHUNK = 1000  # rows of a table of distances that are in memory at once
MAX_OF_CLASS = 500  # images of a class whose pairs are compared: 124,750 pairs


@dataclass(frozen=True)
class Gaussian:
    """Mean [F] and covariance [F, F] of features, float64 on the CPU."""

    mean: Tensor
    covariance: Tensor


def gaussian_of(features: Tensor) -> Gaussian:
    """Of features [N, F]. Raises ValueError for fewer than 2 rows, another shape, or values that are not finite."""
    if features.ndim != 2 or len(features) < 2:
        raise ValueError(f"a covariance needs features [N, F] with N at least 2, not {list(features.shape)}")
    if not features.isfinite().all():
        raise ValueError("features must be finite, but some are NaN or infinite")
    rows = features.detach().cpu().double()
    # F x F, whatever F is: torch.cov of a single feature is a scalar.
    return Gaussian(rows.mean(0), torch.atleast_2d(torch.cov(rows.T)))


def frechet_distance(generated: Gaussian | Tensor, reference: Gaussian | Tensor) -> float:
    """Squared Wasserstein-2 distance of two Gaussians (Heusel et al. 2017, arXiv 1706.08500, eq. 6): lower is better.

        |mean_a - mean_b|^2 + tr(A + B - 2 (A^1/2 B A^1/2)^1/2)

    In Inception's features it is FID. Biased upwards for few images: compare only equal numbers of them. Singular
    covariances are fine.

    Args:
        generated, reference: Gaussians, or the features [N, F] that they are fitted to.
    """
    a, b = (side if isinstance(side, Gaussian) else gaussian_of(side) for side in (generated, reference))
    if a.mean.shape != b.mean.shape:
        raise ValueError(f"features of {len(a.mean)} and of {len(b.mean)} dimensions cannot be compared")
    values, vectors = torch.linalg.eigh(a.covariance)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    # The eigenvalues of A^1/2 B A^1/2 are not negative but for rounding.
    cross = torch.linalg.eigvalsh(root @ b.covariance @ root).clamp(min=0).sqrt().sum()
    distance = (a.mean - b.mean).square().sum() + a.covariance.trace() + b.covariance.trace() - 2 * cross
    return max(float(distance), 0.0)  # rounding can leave equal sets a hair below zero


def kernel_distance(generated: Tensor, reference: Tensor, subset_size: int = KID_SUBSET_SIZE) -> float:
    """Unbiased squared MMD with the kernel (x . y / F + 1)^3 (Binkowski et al. 2018, arXiv 1801.01401): KID.

    Its expectation is 0 where the two distributions agree, however few the images, so it can be negative. The mean
    over torch-fidelity's 100 random subsets, of at most `subset_size` rows.

    Args:
        generated, reference: Features [N, F] and [M, F], N and M at least 2.
    """
    size = min(subset_size, len(generated), len(reference))
    if size < 2:
        raise ValueError(f"KID needs at least 2 images on each side, not {len(generated)} and {len(reference)}")
    x, y = generated.detach().cpu().double(), reference.detach().cpu().double()
    keeps_kernel = max(len(x), len(y)) <= MAX_KERNEL_ROWS
    kernels = [_kernel(*pair) for pair in ((x, x), (y, y), (x, y))] if keeps_kernel else None
    random = np.random.RandomState(KID_SEED)
    distances = []
    for _ in range(KID_SUBSETS):
        i, j = (torch.from_numpy(random.choice(len(rows), size, replace=False)) for rows in (x, y))
        if kernels is None:
            xx, yy, xy = _kernel(x[i], x[i]), _kernel(y[j], y[j]), _kernel(x[i], y[j])
        else:
            xx, yy, xy = kernels[0][i][:, i], kernels[1][j][:, j], kernels[2][i][:, j]
        within = xx.sum() - xx.trace() + yy.sum() - yy.trace()
        distances.append(float(within / (size * (size - 1)) - 2 * xy.mean()))
    return float(np.mean(distances))


def _kernel(x: Tensor, y: Tensor) -> Tensor:
    return (x @ y.T / x.shape[1] + 1) ** 3


def precision_and_recall(generated: Tensor, reference: Tensor) -> tuple[float, float]:
    """Shares of images inside the other set's manifold, in 0..1 (Kynkaanniemi et al. 2019, arXiv 1904.06991).

    The manifold of a set is the balls around its features that reach to the third nearest neighbour. Precision is
    the share of generated images inside that of the real ones, recall the opposite.

    Args:
        generated, reference: Features [N, F] and [M, F], N and M at least 4.
    """
    if min(len(generated), len(reference)) <= NEIGHBOURS:
        raise ValueError(
            f"precision and recall need at least {NEIGHBOURS + 1} images on each side, not {len(generated)} and "
            f"{len(reference)}"
        )
    return _share_inside(generated, reference), _share_inside(reference, generated)


def _share_inside(points: Tensor, centres: Tensor) -> float:
    # Itself is a row's nearest neighbour, hence + 1.
    radii = [torch.cdist(part, centres).kthvalue(NEIGHBOURS + 1).values for part in centres.split(CHUNK)]
    radius = torch.cat(radii)
    inside = [(torch.cdist(part, centres) <= radius).any(dim=1) for part in points.split(CHUNK)]
    return torch.cat(inside).float().mean().item()


def inception_score(logits: Tensor) -> float:
    """exp of the mutual information of image and class (Salimans et al. 2016, arXiv 1606.03498): higher is better.

    A mean over 10 parts of the images, shuffled as torch-fidelity does. logits [N, classes], N at least 10.
    """
    if len(logits) < SCORE_SPLITS:
        raise ValueError(f"the Inception Score needs at least {SCORE_SPLITS} images, not {len(logits)}")
    order = np.random.RandomState(KID_SEED).permutation(len(logits))
    log_p = logits.detach().cpu().double()[torch.from_numpy(order)].log_softmax(dim=1)
    bounds = [part * len(log_p) // SCORE_SPLITS for part in range(SCORE_SPLITS + 1)]
    scores = []
    for start, end in pairwise(bounds):
        part = log_p[start:end]
        marginal = part.exp().mean(0, keepdim=True).log()
        scores.append(float((part.exp() * (part - marginal)).sum(1).mean().exp()))
    return float(np.mean(scores))


def within_class_diversity(images: Tensor, class_labels: Tensor) -> float:
    """Mean L2 distance over the pairs of images inside a class, averaged over the classes that occur.

    0 where each class shows one picture; alone it says little: divide by the figure of real images. Of a class at
    most its first 500 images are compared.

    Args:
        images: [N, ...], numbers of any kind.
        class_labels: int64 [N].

    Raises:
        ValueError: For mismatched lengths, or a class with fewer than 2 images.
    """
    if len(images) != len(class_labels):
        raise ValueError(f"{len(images)} images but {len(class_labels)} class labels")
    pixels = images.flatten(1).float()
    distances = []
    for label in class_labels.unique().tolist():
        members = pixels[class_labels == label][:MAX_OF_CLASS]
        if len(members) < 2:
            raise ValueError(f"class {label} has only 1 image; diversity needs at least 2 images per class")
        distances.append(float(F.pdist(members).double().mean()))
    if not distances:
        raise ValueError("diversity needs at least 2 images per class, but there are no images")
    return sum(distances) / len(distances)


def mode_entropy(modes: Tensor, class_labels: Tensor, num_modes: int, class_modes: Tensor | None = None) -> float:
    """Entropy, in nats, of the modes within a class, averaged over the classes that occur: 0..log(num_modes).

    Args:
        modes, class_labels: int64 [N].
        num_modes: Modes lie in 0..num_modes - 1.
        class_modes: bool [classes, num_modes], which modes belong to a class. Others are not counted, because a wrong
            image does not count as coverage (a class with wrong images only has 0). None counts all.

    Raises:
        ValueError: For mismatched lengths, no images, or modes out of range.
    """
    if len(modes) != len(class_labels):
        raise ValueError(f"{len(modes)} modes but {len(class_labels)} class labels")
    if len(modes) == 0:
        raise ValueError("mode coverage needs at least one image")
    if not 0 <= int(modes.min()) <= int(modes.max()) < num_modes:
        raise ValueError(f"modes must lie in 0..{num_modes - 1}, not {int(modes.min())}..{int(modes.max())}")
    entropies = []
    for label in class_labels.unique().tolist():
        counts = torch.bincount(modes[class_labels == label], minlength=num_modes).double()
        if class_modes is not None:
            counts = counts * class_modes[label].to(counts.device)
        shares = counts / counts.sum().clamp(min=1)
        entropies.append(float(torch.special.entr(shares).sum()))  # entr(p) = -p log p, and 0 at 0
    return sum(entropies) / len(entropies)


def cluster_centres(features: Tensor, num_clusters: int) -> Tensor:
    """k-means of real features [N, F] by scikit-learn with a fixed seed -> centres [num_clusters, F], float32."""
    from sklearn.cluster import KMeans  # slow to import

    fitted = KMeans(num_clusters, n_init=1, random_state=0).fit(features.float().numpy())
    return torch.from_numpy(fitted.cluster_centers_).float()


def cluster_entropy(features: Tensor, centres: Tensor) -> float:
    """Entropy, in nats, of how many features [N, F] are nearest to each centre [K, F]: 0..log(K)."""
    nearest = torch.cat([torch.cdist(part, centres).argmin(dim=1) for part in features.float().split(CHUNK)])
    return mode_entropy(nearest, torch.zeros_like(nearest), len(centres))
