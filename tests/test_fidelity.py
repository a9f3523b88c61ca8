"""FID, Inception Score, precision and recall: against torch-fidelity's own figures and closed forms."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torch_fidelity
from PIL import Image
from scipy import linalg
from tiny_evaluation import random_images

from marval_rl.errors import CheckpointError
from marval_rl.evaluation import frechet_distance
from marval_rl.evaluation.fidelity import (
    Gaussian,
    fidelity_measures,
    frechet_inception_distance,
    gaussian_of,
    inception_score,
    precision_and_recall,
    too_few_images,
)
from marval_rl.evaluation.inception import Inception
from marval_rl.evaluation.reference import list_images


@pytest.fixture(scope="module", autouse=True)
def weights(inception_weights) -> Path:
    return inception_weights


@pytest.fixture(scope="module")
def inception(weights):
    return Inception(weights, "cpu", batch_size=7)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    return random_images(folder / "a", 30, seed=0), random_images(folder / "b", 24, seed=1)


def test_all_figures_are_those_of_torch_fidelity(inception, weights, folders, monkeypatch):
    eigenvalues, known = np.linalg.eigvals, {}

    def remembered(matrix):  # of the same 2048 x 2048 products on both sides: seconds each
        key = matrix.tobytes()
        known[key] = eigenvalues(matrix) if key not in known else known[key]
        return known[key]

    monkeypatch.setattr(np.linalg, "eigvals", remembered)
    generated, real = (inception.of_many(list_images(folder)) for folder in folders)
    ours = fidelity_measures(generated, gaussian_of(real.pool), real.pool, "cpu")
    theirs = torch_fidelity.calculate_metrics(
        input1=str(folders[0]),
        input2=str(folders[1]),
        cuda=False,
        batch_size=10,
        isc=True,
        fid=True,
        prc=True,
        feature_extractor="inception-v3-compat",
        feature_extractor_weights_path=str(weights),
        cache=False,
        save_cpu_ram=True,
        verbose=False,
    )
    assert ours["fid"] == pytest.approx(theirs["frechet_inception_distance"], rel=1e-4)
    assert ours["inception_score"]["mean"] == pytest.approx(theirs["inception_score_mean"], rel=1e-5)
    assert ours["inception_score"]["std"] == pytest.approx(theirs["inception_score_std"], rel=1e-4)
    assert (ours["precision"], ours["recall"]) == (theirs["precision"], theirs["recall"])
    # None of them is at an end of its range, where anything would agree.
    assert ours["fid"] > 0.01 and ours["inception_score"]["mean"] > 1.05
    assert 0 < ours["precision"] < 1 and 0 < ours["recall"] < 1 and ours["precision"] != ours["recall"]


def test_features_do_not_depend_on_how_they_are_batched(inception, folders):
    files = list_images(folders[0])[:9]
    pixels = inception.of_many(files)
    array = np.stack([np.array(Image.open(file)) for file in files])
    again = inception.of_many(array)
    assert pixels.pool.shape == (9, 2048) and pixels.logits.shape == (9, 1008)
    torch.testing.assert_close(again.pool, pixels.pool)
    single = [inception(torch.from_numpy(image).permute(2, 0, 1).unsqueeze(0)).logits for image in array]
    torch.testing.assert_close(torch.cat(single), pixels.logits, rtol=1e-4, atol=1e-3)
    assert pixels.pool.std(dim=0).mean() > 1e-3


def random_gaussian(seed: int, size: int = 12) -> Gaussian:
    rng = np.random.default_rng(seed)
    root = rng.normal(size=(size, size))
    return Gaussian(rng.normal(size=size), root @ root.T)


def test_fid_of_gaussians_is_the_closed_form():
    a, b = random_gaussian(0), random_gaussian(1)
    root = linalg.sqrtm(a.covariance @ b.covariance).real
    expected = np.sum((a.mean - b.mean) ** 2) + np.trace(a.covariance + b.covariance - 2 * root)
    assert frechet_inception_distance(a, b) == pytest.approx(expected, rel=1e-9)
    assert frechet_inception_distance(a, a) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("count", [200, 8])
def test_fid_of_features_is_the_frechet_distance(count):
    """8 rows of 12 features: singular covariances."""
    a = torch.randn(count, 12, generator=torch.Generator().manual_seed(0))
    b = torch.randn(300, 12, generator=torch.Generator().manual_seed(1)) * 1.5 + 0.2
    assert frechet_inception_distance(gaussian_of(a), gaussian_of(b)) == pytest.approx(frechet_distance(a, b), rel=1e-6)


def test_inception_score_of_certain_classes_is_their_number():
    """Certain of one of 4 classes, equally often: exp of the mutual information is 4; always the same class: 1."""
    logits = torch.full((4000, 1008), -50.0).scatter(1, (torch.arange(4000) % 4).unsqueeze(1), 50.0)
    mean, std = inception_score(logits)
    assert mean == pytest.approx(4, rel=0.02) and 0 < std < 0.1
    assert inception_score(logits[:1].repeat(20, 1)) == (pytest.approx(1), pytest.approx(0))


def test_precision_counts_generated_images_and_recall_real_ones():
    real = torch.cat([torch.randn(40, 3), torch.randn(40, 3) + 100])
    generated = torch.cat([real[:40], torch.full((60, 3), -500.0) + torch.randn(60, 3)])
    precision, recall = precision_and_recall(generated, real)
    assert precision == pytest.approx(0.4)
    assert recall == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("measure", "message"),
    [
        (lambda: inception_score(torch.zeros(9, 1008)), "at least 10 images, not 9"),
        (lambda: gaussian_of(torch.zeros(1, 4)), "FID needs at least 2 images, not 1"),
        (lambda: precision_and_recall(torch.zeros(3, 4), torch.zeros(9, 4)), "at least 4 images on each side, not 3"),
    ],
)
def test_a_measure_of_too_few_images(measure, message):
    with pytest.raises(ValueError, match=message):
        measure()


@pytest.mark.parametrize(
    ("counts", "notes"),
    [
        ((2048, 2048, False), []),
        ((2047, None, True), ["FID of 2047 images: below 2048"]),
        ((50_000, 12, True), []),
        ((50_000, 12, False), ["FID of 50000 against 12 images"]),
        ((9, None, False), ["no Inception Score: it needs at least 10 images, not 9"]),
        ((3, 40, False), ["FID of 3 against 40", "no Inception Score", "no precision and recall: .* not 3 and 40"]),
    ],
)
def test_what_few_images_do_is_told(counts, notes):
    found = too_few_images(*counts)
    assert len(found) == len(notes) and all(map(re.search, notes, found))


@pytest.mark.parametrize("counts", [(1, None, True), (1, 20, False), (20, 1, False)])
def test_fid_of_one_image_is_refused(counts):
    with pytest.raises(ValueError, match="FID needs at least 2 images on each side, not "):
        too_few_images(*counts)


# The file of weights


def test_missing_weights_are_told_with_their_source(tmp_path):
    with pytest.raises(CheckpointError) as caught:
        Inception(tmp_path / "nowhere.pth", "cpu", 1)
    assert "no Inception weights at" in str(caught.value)
    assert "weights-inception-2015-12-05-6726825d.pth" in str(caught.value)
    assert "https://github.com/toshas/torch-fidelity/releases" in str(caught.value)


class Malicious:
    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return open, (str(self.file), "w")


def test_weights_that_are_none(tmp_path, weights):
    state = torch.load(weights, weights_only=True)
    del state["fc.bias"]
    cases = {
        "code": ({"a": Malicious(tmp_path / "executed")}, "which is no part of weights"),
        "list": ([1, 2], "holds a list, not a dict"),
        "other": ({"a": torch.zeros(2)}, "holds no weights of torch-fidelity's Inception"),
        "fewer": (state, "holds no weights of torch-fidelity's Inception"),
    }
    for name, (content, message) in cases.items():
        torch.save(content, tmp_path / f"{name}.pth")
        with pytest.raises(CheckpointError, match=message):
            Inception(tmp_path / f"{name}.pth", "cpu", 1)
    assert not (tmp_path / "executed").exists()
    whole = weights.read_bytes()
    for name, content in (("cut", whole[: len(whole) // 2]), ("text", b"not found"), ("empty", b"")):
        (tmp_path / f"{name}.pth").write_bytes(content)
        with pytest.raises(CheckpointError, match=r"is truncated or damaged|is no checkpoint|is empty"):
            Inception(tmp_path / f"{name}.pth", "cpu", 1)
