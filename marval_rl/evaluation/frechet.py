"""The Frechet distance between two sets of features (Heusel et al. 2017, arXiv 1706.08500, eq. 6)."""

from __future__ import annotations

import torch
from torch import Tensor


def frechet_distance(features_a: Tensor, features_b: Tensor) -> float:
    """Squared Wasserstein-2 distance between the Gaussians with the two sets' means and covariances.

        |mean_a - mean_b|^2 + tr(A + B - 2 (A^1/2 B A^1/2)^1/2)

    features_a [N, F] and features_b [M, F], N and M at least 2; float64 throughout, and fit for singular
    covariances. It is biased upwards for small N and M: compare only figures from the same counts.

    Raises ValueError for other shapes, too few rows or values that are not finite.
    """
    if features_a.ndim != 2 or features_b.ndim != 2 or features_a.shape[1] != features_b.shape[1]:
        shapes = f"{list(features_a.shape)} and {list(features_b.shape)}"
        raise ValueError(f"features must have the shapes [N, F] and [M, F], not {shapes}")
    if len(features_a) < 2 or len(features_b) < 2:
        raise ValueError(f"a covariance needs at least 2 rows of features, got {len(features_a)} and {len(features_b)}")
    if not (features_a.isfinite().all() and features_b.isfinite().all()):
        raise ValueError("features must be finite, but some are NaN or infinite")

    a, b = features_a.detach().cpu().double(), features_b.detach().cpu().double()
    # F x F, whatever F is: torch.cov of a single feature is a scalar.
    cov_a, cov_b = (torch.atleast_2d(torch.cov(features.T)) for features in (a, b))
    root_a = _symmetric_root(cov_a)
    # The eigenvalues of A^1/2 B A^1/2 are not negative but for rounding.
    cross = torch.linalg.eigvalsh(root_a @ cov_b @ root_a).clamp(min=0).sqrt().sum()
    distance = (a.mean(0) - b.mean(0)).square().sum() + cov_a.trace() + cov_b.trace() - 2 * cross
    return max(float(distance), 0.0)  # rounding can leave equal sets a hair below zero


def _symmetric_root(matrix: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T
