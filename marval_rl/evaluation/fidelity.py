"""FID, Inception Score, precision and recall of Inception features, by torch-fidelity's own functions."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from marval_rl.evaluation.inception import NUM_FEATURES, InceptionFeatures

SCORE_SPLITS = 10  # of the Inception Score, as published
NEIGHBOURS = 3  # of precision and recall, as published (ADM, arXiv 2105.05233, uses 3 as well)


def too_few_images(num_generated: int, num_reference: int | None, has_statistics: bool) -> list[str]:
    """What small numbers of images do to the figures, a note each; known before any work is done.

    Args:
        num_generated: Images that are evaluated.
        num_reference: Single real images; None where there are none.
        has_statistics: Whether the reference's mean and covariance are stored.

    Raises:
        ValueError: If the FID that was asked for cannot be had.
    """
    notes = []
    counts = [num_generated] if num_reference is None else [num_generated, num_reference]
    of_fid = [num_generated] if has_statistics else counts
    if has_statistics or num_reference is not None:
        if min(of_fid) < 2:
            raise ValueError(f"FID needs at least 2 images on each side, not {' and '.join(map(str, of_fid))}")
        if min(of_fid) < NUM_FEATURES:
            notes.append(
                f"FID of {' against '.join(map(str, of_fid))} images: below {NUM_FEATURES} the covariance is singular "
                "and FID is biased upwards; compare it only with figures of equally many images"
            )
    if num_generated < SCORE_SPLITS:
        notes.append(f"no Inception Score: it needs at least {SCORE_SPLITS} images, not {num_generated}")
    if num_reference is not None and min(counts) <= NEIGHBOURS:
        notes.append(
            f"no precision and recall: they need at least {NEIGHBOURS + 1} images on each side, not {num_generated} "
            f"and {num_reference}"
        )
    return notes


@dataclass(frozen=True)
class Gaussian:
    """Mean [F] and covariance [F, F] of features, float64."""

    mean: np.ndarray
    covariance: np.ndarray


def gaussian_of(features: Tensor) -> Gaussian:
    """Of features [N, F]. Raises ValueError for fewer than 2 rows."""
    if len(features) < 2:
        raise ValueError(f"FID needs at least 2 images, not {len(features)}")
    from torch_fidelity.metric_fid import fid_features_to_statistics

    statistics = fid_features_to_statistics(features.cpu().double())
    return Gaussian(statistics["mu"], statistics["sigma"])


def frechet_inception_distance(generated: Gaussian, reference: Gaussian) -> float:
    """FID (Heusel et al. 2017, arXiv 1706.08500, eq. 6): lower is better; compare only equal numbers of images."""
    from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_statistics_to_metric

    first, second = ({"mu": side.mean, "sigma": side.covariance} for side in (generated, reference))
    return fid_statistics_to_metric(first, second, verbose=False)[KEY_METRIC_FID]


def inception_score(logits: Tensor) -> tuple[float, float]:
    """Mean and standard deviation over 10 parts, in 1..1008 (Salimans et al. 2016, arXiv 1606.03498): higher is better.

    logits [N, 1008]; the images are shuffled by a fixed seed, as torch-fidelity does. Raises ValueError for N < 10.
    """
    if len(logits) < SCORE_SPLITS:
        raise ValueError(f"the Inception Score needs at least {SCORE_SPLITS} images, not {len(logits)}")
    from torch_fidelity.metric_isc import KEY_METRIC_ISC_MEAN, KEY_METRIC_ISC_STD, isc_features_to_metric

    score = isc_features_to_metric(logits.cpu(), splits=SCORE_SPLITS)
    return score[KEY_METRIC_ISC_MEAN], score[KEY_METRIC_ISC_STD]


def precision_and_recall(
    generated: Tensor, reference: Tensor, device: torch.device | str = "cpu"
) -> tuple[float, float]:
    """Shares of images inside the other set's manifold, in 0..1 (Kynkaanniemi et al. 2019, arXiv 1904.06991).

    Features [N, F] and [M, F]; the manifold is the balls that reach to the third nearest neighbour. Raises ValueError
    for fewer than 4 images on either side.
    """
    if min(len(generated), len(reference)) <= NEIGHBOURS:
        raise ValueError(
            f"precision and recall need at least {NEIGHBOURS + 1} images on each side, not {len(generated)} and "
            f"{len(reference)}"
        )
    from torch_fidelity.metric_prc import KEY_METRIC_PRECISION, KEY_METRIC_RECALL, prc_features_to_metric

    # save_cpu_ram: never the whole table of distances, which for 50,000 images would be 10 GB.
    result = prc_features_to_metric(
        generated.to(device), reference.to(device), prc_neighborhood=NEIGHBOURS, save_cpu_ram=True, verbose=False
    )
    return result[KEY_METRIC_PRECISION], result[KEY_METRIC_RECALL]


def fidelity_measures(
    generated: InceptionFeatures,
    reference: Gaussian | None,
    reference_features: Tensor | None,
    device: torch.device | str,
) -> dict[str, float | dict[str, float] | None]:
    """fid, inception_score {mean, std}, precision and recall; None for what the reference or the number of images does
    not allow, as `too_few_images` says.

    Args:
        reference: The real images' Gaussian, for FID.
        reference_features: Features of single real images [M, 2048], for precision and recall.
    """
    results: dict[str, float | dict[str, float] | None] = dict.fromkeys(
        ("fid", "inception_score", "precision", "recall")
    )
    if len(generated) >= SCORE_SPLITS:
        mean, std = inception_score(generated.logits)
        results["inception_score"] = {"mean": mean, "std": std}
    if reference is not None:
        results["fid"] = frechet_inception_distance(gaussian_of(generated.pool), reference)
    if reference_features is not None and min(len(generated), len(reference_features)) > NEIGHBOURS:
        results["precision"], results["recall"] = precision_and_recall(generated.pool, reference_features, device)
    return results
