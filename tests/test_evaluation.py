"""The measures against closed forms, and the evaluator against pictures whose answers are known."""

from __future__ import annotations

import math

import pytest
import torch

from marval_rl.data import ImageDataset
from marval_rl.evaluation import ImageEvaluator, frechet_distance, mode_entropy, within_class_diversity

# Frechet distance


def with_moments(mean: torch.Tensor, root: torch.Tensor, count: int, seed: int) -> torch.Tensor:
    """Features [count, F] whose sample mean and covariance are exactly `mean` and root root^T."""
    draws = torch.randn(count, len(mean), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    centred = draws - draws.mean(0)
    white = torch.linalg.solve_triangular(torch.linalg.cholesky(torch.cov(centred.T)), centred.T, upper=False).T
    return white @ root.T + mean


def test_frechet_distance_of_commuting_gaussians_is_the_closed_form():
    # For diagonal covariances: |mean difference|^2 + sum (sd_a - sd_b)^2.
    mean_a, mean_b = torch.tensor([0.0, 1.0, 2.0]).double(), torch.tensor([3.0, 1.0, 0.0]).double()
    sd_a, sd_b = torch.tensor([1.0, 2.0, 0.5]).double(), torch.tensor([2.0, 2.0, 1.5]).double()
    a = with_moments(mean_a, sd_a.diag(), 40, seed=0)
    b = with_moments(mean_b, sd_b.diag(), 50, seed=1)
    assert frechet_distance(a, b) == pytest.approx((9 + 0 + 4) + (1 + 0 + 1), abs=1e-8)


def test_frechet_distance_of_gaussians_that_do_not_commute():
    # In two dimensions tr sqrt(AB) = sqrt(tr(AB) + 2 sqrt(det(AB))).
    root_a = torch.tensor([[2.0, 0.0], [1.0, 1.0]]).double()
    root_b = torch.tensor([[1.0, 0.0], [-1.5, 1.5]]).double()
    cov_a, cov_b = root_a @ root_a.T, root_b @ root_b.T
    assert not torch.allclose(cov_a @ cov_b, cov_b @ cov_a)
    cross = ((cov_a @ cov_b).trace() + 2 * (cov_a @ cov_b).det().sqrt()).sqrt()
    expected = cov_a.trace() + cov_b.trace() - 2 * cross
    zero = torch.zeros(2).double()
    measured = frechet_distance(with_moments(zero, root_a, 30, seed=2), with_moments(zero, root_b, 30, seed=3))
    assert measured == pytest.approx(float(expected), abs=1e-8)


def test_frechet_distance_is_zero_for_equal_sets_and_symmetric():
    generator = torch.Generator().manual_seed(4)
    a, b = torch.rand(60, 8, generator=generator), torch.rand(50, 8, generator=generator) ** 2
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-9)
    assert frechet_distance(a, b) > 0.1


def test_frechet_distance_with_singular_covariances():
    # Constant features (dead units) and fewer rows than features must not break the root.
    few = torch.rand(5, 16, generator=torch.Generator().manual_seed(5))
    few[:, 3] = 0
    assert frechet_distance(few, few + 1) == pytest.approx(16, rel=1e-6)


def test_frechet_distance_of_a_single_feature():
    a, b = torch.tensor([[0.0], [2.0]]), torch.tensor([[1.0], [5.0]])
    assert frechet_distance(a, b) == pytest.approx(4 + (math.sqrt(8) - math.sqrt(2)) ** 2)


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        (torch.zeros(3, 4), torch.zeros(3, 5), r"not \[3, 4\] and \[3, 5\]"),
        (torch.zeros(3), torch.zeros(3), r"not \[3\] and \[3\]"),
        (torch.zeros(1, 4), torch.zeros(3, 4), "at least 2 rows of features, got 1 and 3"),
        (torch.full((3, 4), torch.nan), torch.zeros(3, 4), "must be finite"),
    ],
)
def test_frechet_distance_refuses_what_has_no_covariance(a, b, message):
    with pytest.raises(ValueError, match=message):
        frechet_distance(a, b)


# Diversity


def test_diversity_is_the_mean_pair_distance_averaged_over_classes():
    images = torch.zeros(5, 1, 2, 2)
    images[1, 0, 0, 0] = 3  # class 0: images 0, 1 at distance 3
    images[3] = 1  # class 1: pair distances 2, 0, 2
    labels = torch.tensor([0, 0, 1, 1, 1])
    assert within_class_diversity(images, labels) == pytest.approx((3 + 4 / 3) / 2)


def test_diversity_ignores_distances_between_classes():
    images = torch.zeros(4, 1, 2, 2)
    images[2:] = 1
    assert within_class_diversity(images, torch.tensor([0, 0, 1, 1])) == 0


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0, 0, 1], "class 1 has only 1 image"),
        ([0, 0], "3 images but 2 class labels"),
    ],
)
def test_diversity_refuses_what_has_no_pairs(labels, message):
    with pytest.raises(ValueError, match=message):
        within_class_diversity(torch.zeros(3, 1, 2, 2), torch.tensor(labels))


# Mode coverage


def test_mode_entropy_is_averaged_over_classes():
    modes = torch.tensor([0, 2, 4, 6, 1, 1, 1, 1])
    labels = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1])
    assert mode_entropy(modes, labels, num_modes=10) == pytest.approx((math.log(4) + 0) / 2)


def test_modes_of_another_class_are_no_coverage():
    class_modes = torch.tensor([[True, True, False], [False, False, True]])
    modes, labels = torch.tensor([0, 0, 1, 1, 2, 0]), torch.tensor([0, 0, 0, 0, 0, 1])
    assert mode_entropy(modes, labels, 3, class_modes) == pytest.approx(math.log(2) / 2)  # class 1: all wrong, 0


@pytest.mark.parametrize(
    ("modes", "labels", "message"),
    [
        ([0, 1], [0], "2 modes but 1 class labels"),
        ([], [], "at least one image"),
        ([0, 3], [0, 0], r"modes must lie in 0..2, not 0..3"),
    ],
)
def test_mode_entropy_refuses_what_does_not_fit(modes, labels, message):
    with pytest.raises(ValueError, match=message):
        mode_entropy(torch.tensor(modes, dtype=torch.long), torch.tensor(labels, dtype=torch.long), num_modes=3)


# The evaluator, on pictures whose grey level tells the mode: 4 modes, 2 classes


class GreyJudge:
    """Believes with probability `trust` in the mode whose grey level (.2, .4, .6, .8) is the nearest."""

    def __init__(self, trust: float) -> None:
        self.trust = trust

    def mode_log_probs(self, images):
        assert images.shape[1] == 3
        mode = (images.mean(dim=(1, 2, 3)) * 5 - 1).round().long().clamp(0, 3)
        rest = (1 - self.trust) / 3
        return torch.full((len(images), 4), rest).scatter(1, mode[:, None], self.trust).log()


def grey_features(images):
    return images[:, 0].flatten(1)[:, :4]


def pictures(modes: list[int], seed: int) -> torch.Tensor:
    noise = 0.04 * torch.randn(len(modes), 1, 4, 4, generator=torch.Generator().manual_seed(seed))
    return (torch.tensor(modes)[:, None, None, None] * 0.2 + 0.2 + noise).clamp(0, 1)


def grey_dataset(per_mode: int, seed: int, class_of_mode: list[int], class_names: list[str]) -> ImageDataset:
    modes = [0, 1, 2, 3] * per_mode
    labels = torch.tensor(class_of_mode)[modes]
    return ImageDataset(pictures(modes, seed), labels, class_names, torch.tensor(modes), num_modes=4)


@pytest.fixture(scope="module")
def evaluator():
    parts = {"class_of_mode": [0, 0, 1, 1], "class_names": ["dark", "bright"]}
    train, test = grey_dataset(40, seed=0, **parts), grey_dataset(25, seed=1, **parts)
    return ImageEvaluator(train, test, grey_features, {"sure": GreyJudge(0.97), "timid": GreyJudge(0.7)})


def test_images_like_the_real_ones_reach_the_floor(evaluator):
    modes = [0, 1, 2, 3] * 30
    labels = torch.tensor([0, 0, 1, 1])[modes]
    results = evaluator.evaluate(pictures(modes, seed=2), labels)
    assert all(type(value) is float for value in results.values())
    assert set(evaluator.names) == set(results)
    assert results["frechet_distance"] < 3 * results["frechet_floor"] < 0.05
    assert results["diversity"] == pytest.approx(1, abs=0.05)
    assert results["mode_coverage"] == pytest.approx(1, abs=1e-6)
    assert results["sure/accuracy"] == results["timid/accuracy"] == 1
    assert results["sure/confidence"] == pytest.approx(0.97, abs=1e-5)
    assert results["timid/log_probability"] == pytest.approx(math.log(0.8), abs=1e-5)  # .7 and one other mode's .1


def test_collapse_within_a_class_shows_in_coverage_and_distance_but_not_in_accuracy(evaluator):
    modes = [0, 0, 0, 0, 2, 3] * 20
    labels = torch.tensor([0, 0, 1, 1])[modes]
    results = evaluator.evaluate(pictures(modes, seed=3), labels)
    assert results["sure/accuracy"] == 1
    assert results["mode_coverage"] == pytest.approx(0.5)  # one class covered, one collapsed
    assert results["diversity"] < 0.8
    assert results["frechet_distance"] > 3 * results["frechet_floor"]


def test_images_of_the_wrong_class_lower_accuracy(evaluator):
    modes = [0, 1, 2, 3] * 10
    labels = torch.zeros(40, dtype=torch.long)
    results = evaluator.evaluate(pictures(modes, seed=4), labels)
    assert results["sure/accuracy"] == 0.5
    half_wrong = (math.log(0.97 + 0.01) + math.log(0.01 + 0.01)) / 2
    assert results["sure/log_probability"] == pytest.approx(half_wrong, abs=1e-5)


def test_colour_images_are_judged_as_grey_ones_are(evaluator):
    modes = [0, 1, 2, 3] * 5
    images, labels = pictures(modes, seed=5), torch.tensor([0, 0, 1, 1])[modes]
    assert evaluator.evaluate(images.repeat(1, 3, 1, 1), labels) == pytest.approx(evaluator.evaluate(images, labels))


def test_coverage_is_none_where_a_class_is_one_mode():
    parts = {"class_of_mode": [0, 1, 2, 3], "class_names": ["a", "b", "c", "d"]}
    train = grey_dataset(10, seed=0, **parts)
    evaluator = ImageEvaluator(train, train, grey_features, {"sure": GreyJudge(0.97)})
    assert evaluator.evaluate(train.images, train.class_labels)["mode_coverage"] is None
    assert "mode_coverage" not in evaluator.names


def test_the_floor_is_higher_for_fewer_images(evaluator):
    assert evaluator.frechet_floor(10) > evaluator.frechet_floor(80) > 0
    assert evaluator.frechet_floor(10_000) == evaluator.frechet_floor(160)  # all there are


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (torch.zeros(4, 8, 8), [0, 0, 1, 1], r"shape \[N, 1 or 3, H, W\], not \[4, 8, 8\]"),
        (torch.zeros(4, 1, 4, 4), [0, 0, 1], r"class_labels has the shape \[3\] for 4 images"),
        (torch.zeros(0, 1, 4, 4), [], "there are no images"),
        (torch.full((4, 1, 4, 4), 1.2), [0, 0, 1, 1], "pixels must lie in 0..1, but they lie in 1.2..1.2"),
        (torch.full((4, 1, 4, 4), torch.nan), [0, 0, 1, 1], "lie in nan..nan"),
        (torch.zeros(4, 1, 4, 4), [0, 0, 2, 2], "class labels must lie in 0..1, but they lie in 0..2"),
        (torch.zeros(3, 1, 4, 4), [0, 0, 1], "class 1 has only 1 image"),
    ],
)
def test_what_cannot_be_judged_is_refused(evaluator, images, labels, message):
    with pytest.raises(ValueError, match=message):
        evaluator.evaluate(images, torch.tensor(labels, dtype=torch.long))


def test_an_evaluator_needs_a_judge():
    data = grey_dataset(5, 0, [0, 0, 1, 1], ["dark", "bright"])
    with pytest.raises(ValueError, match="at least one judge"):
        ImageEvaluator(data, data, grey_features, {})
