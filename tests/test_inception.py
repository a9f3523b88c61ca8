"""torch-fidelity's Inception: its features and figures on real files, and files of weights that are none."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch_fidelity
from tiny_evaluation import random_images

from marval_rl.errors import CheckpointError
from marval_rl.evaluation import ImageEvaluator, open_reference
from marval_rl.evaluation.features import Inception
from marval_rl.evaluation.references import images_of_files, list_images


@pytest.fixture(scope="module", autouse=True)
def weights(inception_weights) -> Path:
    return inception_weights


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    return random_images(folder / "a", 30, seed=0), random_images(folder / "b", 24, seed=1)


def test_all_figures_are_those_of_torch_fidelity(weights, folders):
    files = [images_of_files(list_images(folder)) for folder in folders]
    evaluator = ImageEvaluator({"inception": Inception(weights)}, open_reference(folders[1]))
    generated = files[0].read(range(30))
    parts = [evaluator.measure(part) for part in generated.split(7)]
    ours = evaluator.figures({name: torch.cat([part[name] for part in parts]) for name in parts[0]})
    theirs = torch_fidelity.calculate_metrics(
        input1=str(folders[0]),
        input2=str(folders[1]),
        cuda=False,
        batch_size=10,
        isc=True,
        fid=True,
        kid=True,
        prc=True,
        kid_subset_size=24,
        feature_extractor="inception-v3-compat",
        feature_extractor_weights_path=str(weights),
        cache=False,
        save_cpu_ram=True,
        verbose=False,
    )
    assert ours["frechet_distance"] == pytest.approx(theirs["frechet_inception_distance"], rel=1e-4)
    assert ours["kid"] == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-3, abs=2e-6)
    assert ours["inception_score"] == pytest.approx(theirs["inception_score_mean"], rel=1e-4)
    assert (ours["precision"], ours["recall"]) == (theirs["precision"], theirs["recall"])
    # None of them is at an end of its range, where anything would agree.
    assert ours["frechet_distance"] > 0.01 and ours["inception_score"] > 1.05 and abs(ours["kid"]) > 1e-5
    assert 0 < ours["precision"] < 1 and 0 < ours["recall"] < 1 and ours["precision"] != ours["recall"]


# The file of weights


def test_missing_weights_are_named_with_their_source(tmp_path):
    with pytest.raises(CheckpointError) as caught:
        Inception(tmp_path / "nowhere.pth")
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
        "code": ({"a": Malicious(tmp_path / "executed")}, "which does not belong to weights"),
        "list": ([1, 2], "holds a list, not a dict"),
        "other": ({"a": torch.zeros(2)}, "holds no weights of torch-fidelity's Inception"),
        "fewer": (state, "holds no weights of torch-fidelity's Inception"),
    }
    for name, (content, message) in cases.items():
        torch.save(content, tmp_path / f"{name}.pth")
        with pytest.raises(CheckpointError, match=message):
            Inception(tmp_path / f"{name}.pth")
    assert not (tmp_path / "executed").exists()
    whole = weights.read_bytes()
    for name, content in (("cut", whole[: len(whole) // 2]), ("text", b"not found"), ("empty", b"")):
        (tmp_path / f"{name}.pth").write_bytes(content)
        with pytest.raises(CheckpointError, match=r"is truncated or damaged|is not a checkpoint|is empty"):
            Inception(tmp_path / f"{name}.pth")
