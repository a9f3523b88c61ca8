"""The evaluator, against pictures whose answers are known: their grey level tells the mode; 4 modes, 2 classes."""

from __future__ import annotations

import hashlib
import math

import pytest
import torch
from torch import Tensor

from marval_rl.errors import DataError
from marval_rl.evaluation import ImageEvaluator, Reference, features, open_reference
from marval_rl.evaluation.features import Pixels, extractor_name, load_extractors
from marval_rl.evaluation.image_set import to_pixels
from marval_rl.evaluation.measures import gaussian_of
from marval_rl.evaluation.references import RealImages
from marval_rl.rewarding import RewardSet

CLASS_OF_MODE = torch.tensor([0, 0, 1, 1])


class GreyJudge:
    """Believes with probability `trust` in the mode whose grey level (.2, .4, .6, .8) is the nearest."""

    def __init__(self, trust: float) -> None:
        self.trust = trust

    def mode_log_probs(self, images: Tensor) -> Tensor:
        assert images.shape[1] == 3
        mode = (images.mean(dim=(1, 2, 3)) * 5 - 1).round().long().clamp(0, 3)
        rest = (1 - self.trust) / 3
        return torch.full((len(images), 4), rest).scatter(1, mode[:, None], self.trust).log()


class GreyFeatures:
    def features(self, images: Tensor) -> Tensor:
        return images[:, 0].flatten(1)[:, :4]


def pictures(modes: list[int], seed: int) -> Tensor:
    noise = 0.04 * torch.randn(len(modes), 1, 4, 4, generator=torch.Generator().manual_seed(seed))
    return (torch.tensor(modes)[:, None, None, None] * 0.2 + 0.2 + noise).clamp(0, 1)


def real_images(per_mode: int, seed: int, class_of_mode: Tensor | None = CLASS_OF_MODE) -> RealImages:
    modes = torch.tensor([0, 1, 2, 3] * per_mode)
    pixels = to_pixels(pictures(modes.tolist(), seed))
    identity = hashlib.sha256(pixels.numpy().tobytes()).hexdigest()
    labels = None if class_of_mode is None else class_of_mode[modes]
    return RealImages(
        lambda indices: pixels[list(indices)], len(pixels), identity, labels, None if labels is None else modes
    )


def make_evaluator(class_of_mode: Tensor = CLASS_OF_MODE, **changes) -> ImageEvaluator:
    parts = {
        "extractors": {"grey": GreyFeatures(), "pixels": Pixels()},
        "reference": Reference(images=real_images(25, 1, class_of_mode)),
        "train": real_images(40, 0, class_of_mode),
        "class_of_mode": class_of_mode,
        "judges": {"sure": GreyJudge(0.97), "timid": GreyJudge(0.7)},
    }
    return ImageEvaluator(**{**parts, **changes})


@pytest.fixture(scope="module")
def evaluator():
    return make_evaluator()


def test_images_like_the_real_ones_reach_the_floor(evaluator):
    modes = [0, 1, 2, 3] * 30
    results = evaluator.evaluate(pictures(modes, seed=2), CLASS_OF_MODE[modes])
    assert all(type(value) is float for name, value in results.items() if "vs_real" not in name)
    assert set(evaluator.names(120, 2)) == set(results)
    assert results["frechet_distance"] < 3 * results["frechet_floor"] < 0.05
    assert abs(results["kid"]) < 0.01 and min(results["precision"], results["recall"]) > 0.8
    assert results["diversity"] == pytest.approx(1, abs=0.05)
    assert results["mode_coverage"] == pytest.approx(1, abs=1e-6)
    assert results["mode_coverage/grey"] == pytest.approx(1, abs=0.05)
    assert results["sure/accuracy"] == results["timid/accuracy"] == 1
    assert results["sure/confidence"] == pytest.approx(0.97, abs=1e-5)
    assert results["timid/log_probability"] == pytest.approx(math.log(0.8), abs=1e-5)  # .7 and one other mode's .1
    assert results["image/edge_energy/vs_real"] == pytest.approx(1, abs=0.1)
    assert results["image/colourfulness"] == 0 and results["image/colourfulness/vs_real"] is None  # all are grey
    for figure in ("frechet_distance", "frechet_floor", "kid", "precision", "recall"):
        assert results[figure] == results[f"{figure}/grey"] != results[f"{figure}/pixels"], figure


def test_collapse_within_a_class_shows_in_coverage_and_distance_but_not_in_accuracy(evaluator):
    modes = [0, 0, 0, 0, 2, 3] * 20
    results = evaluator.evaluate(pictures(modes, seed=3), CLASS_OF_MODE[modes])
    assert results["sure/accuracy"] == 1
    assert results["mode_coverage"] == pytest.approx(0.5)  # one class covered, one collapsed
    assert results["mode_coverage/pixels"] < 0.9  # clusters of real features notice without knowing the modes
    assert results["diversity"] < 0.8 and results["recall"] < 0.8
    assert results["frechet_distance"] > 3 * results["frechet_floor"] and results["kid"] > 0.001


def test_images_of_the_wrong_class_lower_accuracy(evaluator):
    results = evaluator.evaluate(pictures([0, 1, 2, 3] * 10, seed=4), torch.zeros(40, dtype=torch.long))
    assert results["sure/accuracy"] == 0.5
    half_wrong = (math.log(0.97 + 0.01) + math.log(0.01 + 0.01)) / 2
    assert results["sure/log_probability"] == pytest.approx(half_wrong, abs=1e-5)


def test_colour_images_are_judged_as_grey_ones_are(evaluator):
    modes = [0, 1, 2, 3] * 5
    images, labels = pictures(modes, seed=5), CLASS_OF_MODE[modes]
    assert evaluator.evaluate(images.repeat(1, 3, 1, 1), labels) == pytest.approx(evaluator.evaluate(images, labels))


def test_how_images_are_batched_and_shared_changes_no_figure(evaluator):
    modes = [0, 1, 2, 3] * 10
    pixels, labels = to_pixels(pictures(modes, seed=6)), CLASS_OF_MODE[modes]
    parts = [evaluator.measure(*part) for part in zip(pixels.split(7), labels.split(7), strict=True)]
    rows = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    assert evaluator.figures(rows) == evaluator.figures(evaluator.measure(pixels, labels))


@pytest.mark.parametrize(
    ("changes", "count", "missing"),
    [
        ({"train": None}, 120, {"frechet_floor"}),
        ({"reference": None}, 120, {"frechet_distance", "kid", "recall", "diversity", "mode_coverage"}),
        ({"judges": {}, "class_of_mode": None}, 120, {"sure/accuracy"}),
        ({}, 3, {"precision", "recall", "diversity"}),
        ({}, 1, {"frechet_distance", "kid"}),
        ({"reference": Reference(images=real_images(5, 1))}, 120, {"mode_coverage/grey"}),
        ({"extractors": {}}, 120, {"frechet_distance"}),
    ],
)
def test_the_figures_that_cannot_be_measured_are_known_in_advance(changes, count, missing):
    evaluator = make_evaluator(**changes)
    modes = ([0, 1, 2, 3] * 30)[:count]
    found = evaluator.evaluate(pictures(modes, 2), evaluator_labels := torch.arange(count) * 2 // max(count, 2))
    assert len(evaluator_labels) == count and set(found) == set(evaluator.names(count, 2))
    assert not missing & set(found) and missing <= set(make_evaluator().names(120, 2))


def test_coverage_is_that_of_clusters_where_a_class_is_one_mode():
    evaluator = make_evaluator(torch.arange(4))
    modes = [0, 0, 0, 3] * 30
    results = evaluator.evaluate(pictures(modes, 2), torch.tensor(modes))
    assert results["mode_coverage"] == results["mode_coverage/grey"] < 0.9


def test_statistics_give_a_frechet_distance_alone():
    images = real_images(25, 1)
    stored = Reference(gaussian_of(GreyFeatures().features(images.read(range(100)).float() / 255)), path="real.npz")
    evaluator = make_evaluator(reference=stored, judges={}, class_of_mode=None)
    modes = [0, 1, 2, 3] * 10
    found = evaluator.evaluate(pictures(modes, 2))
    assert found["frechet_distance"] == make_evaluator().evaluate(pictures(modes, 2))["frechet_distance"]
    assert not {"kid", "recall", "frechet_distance/pixels"} & set(found)
    evaluator.check_statistics(4)
    with pytest.raises(DataError, match=r"real.npz holds the statistics of 4 features, but pixels, .* has 48"):
        make_evaluator(extractors={"pixels": Pixels()}, reference=stored).check_statistics(4)


def test_rewards_are_averaged_over_the_images_that_they_scored():
    def half(*, images, prompts, **columns):
        return [None if prompt == "a dark" else 2.0 for prompt in prompts]

    evaluator = ImageEvaluator()
    evaluator.add_rewards(RewardSet([half]), lambda names: [f"a {name}" for name in names], ["dark", "bright"])
    modes = [0, 2, 3]
    assert evaluator.evaluate(pictures(modes, 0), CLASS_OF_MODE[modes])["rewards/half/mean"] == 2
    assert evaluator.evaluate(pictures([0], 0), CLASS_OF_MODE[[0]])["rewards/half/mean"] is None


def test_real_images_are_measured_once_until_they_or_the_extractor_change(monkeypatch, tmp_path):
    monkeypatch.setenv("MARVAL_RL_CACHE", str(tmp_path))
    calls = []

    class Counted(GreyFeatures):
        scale = 1.0

        def features(self, images):
            calls.append(len(images))
            return super().features(images) * self.scale

    def measure(seed: int = 1, scale: float = 1.0) -> int:
        extractor = Counted()
        extractor.scale = scale
        evaluator = make_evaluator(extractors={"grey": extractor}, reference=Reference(images=real_images(25, seed)))
        calls.clear()
        assert torch.equal(evaluator.real["features/grey"][:, 0] > 0, torch.ones(100, dtype=torch.bool))
        return sum(calls) - 4  # without those that tell extractors from each other

    assert measure() == 100 and measure() == 0
    assert measure(seed=7) == 100 and measure(scale=2.0) == 100
    for file in (tmp_path / "references").iterdir():
        file.write_bytes(file.read_bytes()[:20])
    assert measure() == 100 and measure() == 0


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (torch.zeros(4, 8, 8), [0, 0, 1, 1], r"shape \[B, 1 or 3, H, W\], not \[4, 8, 8\]"),
        (torch.zeros(4, 1, 4, 4), [0, 0, 1], r"class_labels has the shape \[3\] for 4 images"),
        (torch.zeros(0, 1, 4, 4), [], r"not \[0, 1, 4, 4\]"),
        (torch.full((4, 1, 4, 4), 1.2), [0, 0, 1, 1], "pixels must lie in 0..1, but they lie in 1.2..1.2"),
        (torch.full((4, 1, 4, 4), torch.nan), [0, 0, 1, 1], "lie in nan..nan"),
        (torch.zeros(4, 1, 4, 4), [0, 0, 2, 2], "class labels must lie in 0..1, but they lie in 0..2"),
    ],
)
def test_inputs_that_cannot_be_judged_are_refused(evaluator, images, labels, message):
    with pytest.raises(ValueError, match=message):
        evaluator.evaluate(images, torch.tensor(labels, dtype=torch.long))


def test_judges_need_classes():
    with pytest.raises(ValueError, match="which class each mode belongs to"):
        make_evaluator(class_of_mode=None)


# Feature extractors by name


@pytest.mark.parametrize(
    ("spec", "name"),
    [
        ("inception", "inception"),
        ("inception:a/w.pth", "inception"),
        ("clip:ViT-B-32:openai", "clip"),
        ("hf:facebook/dinov2-base", "dinov2-base"),
        ("timm:resnet18.a1_in1k", "resnet18.a1_in1k"),
        ("pixels:8", "pixels"),
        ("classifier", "classifier"),
        ("mine.py:Extractor", "Extractor"),
    ],
)
def test_names_in_metrics(spec, name):
    assert extractor_name(spec) == name


def test_extractors_of_transformers_and_timm_preprocess_as_their_library_does(tmp_path):
    import timm
    from transformers import BitImageProcessor, Dinov2Config, Dinov2Model

    torch.manual_seed(0)
    config = Dinov2Config(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14)
    Dinov2Model(config).save_pretrained(tmp_path / "dino")
    size = {"crop_size": {"height": 28, "width": 28}, "size": {"shortest_edge": 28}}
    BitImageProcessor(**size).save_pretrained(tmp_path / "dino")
    images = torch.rand(3, 3, 40, 40, generator=torch.Generator().manual_seed(0))
    (extractor,) = load_extractors([f"hf:{tmp_path / 'dino'}"]).values()
    found = features.features_of(extractor, images)
    pixels = BitImageProcessor.from_pretrained(tmp_path / "dino")((images * 255).byte(), return_tensors="pt")
    with torch.no_grad():
        expected = Dinov2Model.from_pretrained(tmp_path / "dino").eval()(pixels["pixel_values"]).pooler_output
    torch.testing.assert_close(found, expected, rtol=0, atol=0.02)  # other rounding in resizing
    assert found.shape == (3, 16) and found.std(dim=0).mean() > 0.05

    folder = tmp_path / "resnet"
    timm.models.save_for_hf(timm.create_model("resnet10t"), folder, safe_serialization=True)
    (extractor,) = load_extractors([f"timm:local-dir:{folder}"]).values()
    assert features.features_of(extractor, images).shape == (3, 512)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("jpeg", "the reward 'jpeg' has no method `features`"),
        ("no_such", "unknown reward 'no_such'"),
        ("pixels:big", "pixels:big: give a number of pixels"),
        ("inception:nowhere.pth", "no Inception weights at nowhere.pth: torch-fidelity publishes them as"),
        ("hf:./nowhere", "cannot load the feature extractor hf:./nowhere"),
        ("timm:no_such_model", "cannot load the feature extractor timm:no_such_model"),
    ],
)
def test_names_that_are_not_extractors(spec, message):
    with pytest.raises(Exception, match=message) as caught:
        load_extractors([spec])
    assert isinstance(caught.value, (ValueError, features.MarvalError))


def test_two_extractors_of_one_name_are_refused():
    with pytest.raises(ValueError, match="names pixels twice"):
        load_extractors(["pixels:8", "pixels:4"])


def test_an_extractor_must_return_rows():
    class Flat:
        def features(self, images):
            return images.mean()

    with pytest.raises(ValueError, match=r"must have the shape \[N, F\]"):
        make_evaluator(extractors={"flat": Flat()}).evaluate(torch.rand(8, 3, 4, 4))


def test_a_folder_is_a_reference(tmp_path):
    from tiny_evaluation import random_images

    folder = random_images(tmp_path / "real", 30, seed=3)
    evaluator = ImageEvaluator({"pixels": Pixels()}, open_reference(folder))
    pixels = evaluator.reference.images.read(range(30))
    found = evaluator.evaluate(pixels.float() / 255)
    assert found["frechet_distance"] == pytest.approx(0, abs=1e-9) and found["precision"] == 1
