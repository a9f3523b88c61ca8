"""The measures against closed forms, scipy's and torch-fidelity's own figures."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import linalg
from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_isc import KEY_METRIC_ISC_MEAN, isc_features_to_metric
from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, kid_features_to_metric
from torch_fidelity.metric_prc import KEY_METRIC_PRECISION, KEY_METRIC_RECALL, prc_features_to_metric

from marval_rl.evaluation import measures
from marval_rl.evaluation.image_statistics import STATISTICS, colourfulness_entropy, image_statistics
from marval_rl.evaluation.measures import (
    Gaussian,
    cluster_centres,
    cluster_entropy,
    frechet_distance,
    gaussian_of,
    inception_score,
    kernel_distance,
    mode_entropy,
    precision_and_recall,
    within_class_diversity,
)


def normal(count: int, width: int, seed: int, scale: float = 1.0, shift: float = 0.0) -> torch.Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed)) * scale + shift


def test_the_frechet_distance_of_gaussians_is_the_closed_form():
    roots = [normal(12, 12, seed).double() for seed in (0, 1)]
    a, b = (Gaussian(normal(12, 1, 2 + i)[:, 0].double(), root @ root.T) for i, root in enumerate(roots))
    root = linalg.sqrtm((a.covariance @ b.covariance).numpy()).real
    expected = (a.mean - b.mean).square().sum() + (a.covariance + b.covariance).trace() - 2 * np.trace(root)
    assert frechet_distance(a, b) == pytest.approx(float(expected), rel=1e-9)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("count", [200, 8])  # 8 rows of 12 features: singular covariances
def test_measures_of_features_are_torch_fidelitys(count, monkeypatch):
    generated, real = normal(count, 12, 0), normal(300, 12, 1, 1.5, 0.2)
    statistics = [fid_features_to_statistics(side.double()) for side in (generated, real)]
    fid = fid_statistics_to_metric(*statistics, verbose=False)[KEY_METRIC_FID]
    assert frechet_distance(generated, real) == pytest.approx(fid, rel=1e-6)

    theirs = prc_features_to_metric(generated, real, verbose=False)
    found = precision_and_recall(generated, real)
    assert found == pytest.approx((theirs[KEY_METRIC_PRECISION], theirs[KEY_METRIC_RECALL]))
    assert count == 8 or (0 < found[0] < 1 and 0 < found[1] < 1)

    size = min(count, 50)
    kid = kid_features_to_metric(generated, real, kid_subset_size=size, verbose=False)[KEY_METRIC_KID_MEAN]
    assert kernel_distance(generated, real, size) == pytest.approx(kid, rel=1e-4)
    monkeypatch.setattr(measures, "MAX_KERNEL_ROWS", 10)  # as of sets too large for one kernel
    assert kernel_distance(generated, real, size) == pytest.approx(kid, rel=1e-4)


def test_the_kernel_distance_is_unbiased_where_the_frechet_distance_is_not():
    draws = [(normal(40, 16, 2 * seed), normal(40, 16, 2 * seed + 1)) for seed in range(40)]
    kid = [kernel_distance(*draw) for draw in draws]
    assert abs(np.mean(kid)) < 3 * np.std(kid) / math.sqrt(len(kid)) and min(kid) < 0
    assert min(frechet_distance(*draw) for draw in draws) > 1


def test_the_inception_score_is_torch_fidelitys_and_counts_certain_classes():
    logits = normal(57, 20, 0, 3.0)
    assert inception_score(logits) == pytest.approx(isc_features_to_metric(logits)[KEY_METRIC_ISC_MEAN])
    certain = torch.full((4000, 1008), -50.0).scatter(1, (torch.arange(4000) % 4).unsqueeze(1), 50.0)
    assert inception_score(certain) == pytest.approx(4, rel=0.02)
    assert inception_score(certain[:1].repeat(20, 1)) == pytest.approx(1)


def test_precision_counts_generated_images_and_recall_real_ones():
    real = torch.cat([normal(40, 3, 0), normal(40, 3, 1, shift=100)])
    generated = torch.cat([real[:40], normal(60, 3, 2, shift=-500)])
    assert precision_and_recall(generated, real) == (pytest.approx(0.4), pytest.approx(0.5))


def test_diversity_is_the_mean_distance_inside_a_class():
    images = torch.tensor([0.0, 3, 0, 2, 2]).view(5, 1, 1, 1)
    labels = torch.tensor([0, 0, 1, 1, 1])
    assert within_class_diversity(images, labels) == pytest.approx((3 + 4 / 3) / 2)
    assert within_class_diversity(torch.full((4, 3, 2, 2), 7, dtype=torch.uint8), torch.tensor([0, 0, 1, 1])) == 0


def test_modes_are_counted_inside_their_class():
    modes, labels = torch.tensor([0, 1, 2, 3, 4, 4]), torch.tensor([0, 0, 0, 0, 1, 1])
    assert mode_entropy(modes, labels, num_modes=10) == pytest.approx((math.log(4) + 0) / 2)
    class_modes = torch.tensor([[True, True, False], [False, False, True]])
    found = mode_entropy(torch.tensor([0, 1, 2, 0, 1]), torch.tensor([0, 0, 0, 1, 1]), 3, class_modes)
    assert found == pytest.approx(math.log(2) / 2)  # class 1: all wrong, 0


def test_clusters_of_real_features_stand_for_modes():
    corners = torch.tensor([[0.0, 0], [0, 10], [10, 0], [10, 10]])
    real = corners.repeat(30, 1) + normal(120, 2, 0, 0.1)
    centres = cluster_centres(real, 4)
    assert sorted(map(tuple, (centres / 10).round().int().tolist())) == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert cluster_entropy(real, centres) == pytest.approx(math.log(4), abs=1e-6)
    assert cluster_entropy(corners[:2].repeat(9, 1), centres) == pytest.approx(math.log(2))
    assert cluster_entropy(corners[:1].repeat(9, 1), centres) == 0


LONG = {"dtype": torch.long}


@pytest.mark.parametrize(
    ("measure", "message"),
    [
        (lambda: gaussian_of(torch.zeros(1, 4)), r"features \[N, F\] with N at least 2, not \[1, 4\]"),
        (lambda: gaussian_of(torch.zeros(4)), r"not \[4\]"),
        (lambda: gaussian_of(torch.full((3, 2), torch.nan)), "must be finite"),
        (lambda: frechet_distance(torch.zeros(3, 2), torch.zeros(3, 4)), "of 2 and of 4 dimensions"),
        (lambda: kernel_distance(torch.zeros(1, 4), torch.zeros(9, 4)), "at least 2 images on each side, not 1 and 9"),
        (lambda: precision_and_recall(torch.zeros(3, 4), torch.zeros(9, 4)), "at least 4 images on each side, not 3"),
        (lambda: inception_score(torch.zeros(9, 1008)), "at least 10 images, not 9"),
        (lambda: within_class_diversity(torch.zeros(3, 1), torch.tensor([0, 0, 1])), "class 1 has only 1 image"),
        (lambda: within_class_diversity(torch.zeros(3, 1), torch.tensor([0, 0])), "3 images but 2 class labels"),
        (lambda: within_class_diversity(torch.zeros(0, 1), torch.zeros(0, **LONG)), "there are no images"),
        (lambda: mode_entropy(torch.zeros(2, **LONG), torch.zeros(3, **LONG), 3), "2 modes but 3 class labels"),
        (lambda: mode_entropy(torch.zeros(0, **LONG), torch.zeros(0, **LONG), 3), "at least one image"),
        (lambda: mode_entropy(torch.tensor([0, 3]), torch.zeros(2, **LONG), 3), r"must lie in 0\.\.2, not 0\.\.3"),
    ],
)
def test_figures_that_cannot_be_measured(measure, message):
    with pytest.raises(ValueError, match=message):
        measure()


def test_image_statistics_of_pictures_whose_answers_are_known():
    grey = torch.full((1, 3, 8, 8), 0.5)
    stripes = torch.zeros(1, 3, 8, 8)
    stripes[..., ::2] = 1  # neighbours across differ by 1, down by 0; the Laplacian is 2 or -2 inside
    red = torch.zeros(1, 3, 8, 8)
    red[:, 0] = 1
    found = image_statistics(torch.cat([grey, stripes, red])).tolist()
    figures = [dict(zip(STATISTICS, row, strict=True)) for row in found]
    zeros = dict.fromkeys(STATISTICS, 0.0)
    assert figures[0] == pytest.approx(zeros)
    assert figures[1] == pytest.approx(
        zeros | {"edge_energy": 0.5, "sharpness": 4, "black_share": 0.5, "white_share": 0.5}, abs=1e-5
    )
    # Red against green 255, yellow against blue 127.5, no spread (Hasler & Suesstrunk 2003, eq. in section 6).
    assert figures[2] == pytest.approx(zeros | {"saturation": 1, "colourfulness": 0.3 * math.hypot(255, 127.5)})


def test_the_entropy_of_colourfulness_falls_where_all_images_are_equally_colourful():
    rows = torch.zeros(64, len(STATISTICS))
    assert colourfulness_entropy(rows) == 0
    rows[:, STATISTICS.index("colourfulness")] = torch.arange(64) % 4 * 20.0
    assert colourfulness_entropy(rows) == pytest.approx(math.log(4))
