"""The classifiers of labelled images: accurate, deterministic, cached, differentiable, and clear about bad input."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from marval_rl.rewards import classifier_networks
from marval_rl.rewards.classifier import Classifier, HeldOutClassifier
from marval_rl.rewards.classifier_networks import PerceptronNetwork
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_models import tiny_model

from marval_rl.data import CroppedImages, load_cropped_images, load_image_dataset, load_labelled_images
from marval_rl.errors import CheckpointError
from marval_rl.evaluation import load_extractors
from marval_rl.recipes.data_arguments import DataArguments
from marval_rl.rewarding import RewardSet, load_reward


@pytest.fixture(scope="module")
def judges(tmp_path_factory):
    """Both classifiers, trained here and not taken from a cache that an older run may have left."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MARVAL_RL_CACHE", str(tmp_path_factory.mktemp("cache")))
        digits = {"training_images": "digits", "class_groups": "parity"}
        judges = {"classifier": Classifier(**digits), "held_out_classifier": HeldOutClassifier(**digits)}
        assert all(judge.network is not None for judge in judges.values())  # trained when first asked for
        return judges


@pytest.fixture
def quick_cache(tmp_path, monkeypatch):
    """An empty cache folder, and training that is short because its result does not matter."""
    monkeypatch.setenv("MARVAL_RL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(classifier_networks, "MIN_STEPS", 20)
    monkeypatch.setattr(classifier_networks, "MIN_EPOCHS", 1)
    return tmp_path / "cache"


def some_digits(count: int = 20) -> tuple[torch.Tensor, torch.Tensor]:
    """Real test images with three channels [count, 3, 8, 8], and their digits."""
    data = load_image_dataset("digits", "test")
    return data.images[:count].repeat(1, 3, 1, 1), data.modes[:count]


def held_out() -> HeldOutClassifier:
    return HeldOutClassifier(training_images="digits")


def names_of(digits: torch.Tensor, class_groups: str | None) -> list[str]:
    data = load_image_dataset("digits", "test", class_groups)
    return [data.class_names[int(digit) % len(data.class_names)] for digit in digits]


@pytest.mark.parametrize("name", ["classifier", "held_out_classifier"])
@pytest.mark.parametrize("class_groups", [None, "parity"])
def test_held_out_images_are_recognised(judges, name, class_groups):
    images, digits = some_digits(500)
    judge = judges[name]
    best = judge.mode_log_probs(images).argmax(dim=1)
    assert float((best == digits).float().mean()) >= 0.975
    log_probs = judge(images=images, class_names=names_of(digits, class_groups))
    assert log_probs.shape == (500,) and float(log_probs.exp().mean()) > 0.95


def test_the_frechet_space_has_the_expected_floor(judges):
    data = DataArguments(dataset="digits", class_groups="parity")
    evaluator = data.evaluator(tiny_model(image_size=8).config)
    train = load_image_dataset("digits", "train", "parity")
    real = evaluator.evaluate(train.images[:1000], train.class_labels[:1000])
    assert 0.6 < real["frechet_floor"] < 1.5
    assert real["frechet_distance"] == pytest.approx(real["frechet_floor"], abs=0.4)
    assert real["mode_coverage"] == pytest.approx(1, abs=0.02)
    assert real["mode_coverage/classifier"] == pytest.approx(1, abs=0.02)
    noise = torch.rand(1000, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    assert evaluator.evaluate(noise, train.class_labels[:1000])["frechet_distance"] > 50


def test_features_are_32_and_not_negative(judges):
    features = judges["classifier"].features(some_digits()[0])
    assert features.shape == (20, 32) and float(features.min()) >= 0


def test_a_group_has_the_sum_of_its_digits_probabilities(judges):
    images, _ = some_digits(6)
    probabilities = judges["classifier"].mode_log_probs(images).exp()
    even = judges["classifier"](images=images, class_names=["even digit"] * 6).exp()
    torch.testing.assert_close(even, probabilities[:, [0, 2, 4, 6, 8]].sum(dim=1))
    three = judges["classifier"](images=images, class_names=["three"] * 6).exp()
    torch.testing.assert_close(three, probabilities[:, 3])


def test_accuracy_and_confidence(judges, tmp_path):
    save_file(judges["classifier"].network.state_dict(), tmp_path / "weights.safetensors")
    checkpoint = tmp_path / "weights.safetensors"
    images, digits = some_digits()
    right = names_of(digits, None)
    wrong = names_of((digits + 1) % 10, None)

    accuracy = Classifier("accuracy", "digits", checkpoint=checkpoint)
    assert accuracy(images=images, class_names=right).mean() > 0.9
    assert accuracy(images=images, class_names=wrong).mean() < 0.1
    assert not accuracy.differentiable

    confidence = Classifier("confidence", "digits", checkpoint=checkpoint)
    assert confidence.differentiable
    largest = judges["classifier"].mode_log_probs(images).exp().amax(dim=1)
    torch.testing.assert_close(confidence(images=images, class_names=wrong), largest)


def test_gradients_agree_with_finite_differences_and_leave_the_network_alone(judges):
    images, digits = some_digits(4)
    images = (0.9 * images + 0.05).requires_grad_()  # away from the bounds of 0..1
    arguments = {"prompts": [""] * 4, "class_labels": digits, "class_names": names_of(digits + 1, "parity")}
    rewards = RewardSet([judges["classifier"]])
    rewards.score(images, **arguments, with_grad=True).total.sum().backward()
    direction = images.grad / images.grad.norm()
    with torch.no_grad():
        ahead, behind = (rewards.score(images + step * direction, **arguments).total.sum() for step in (0.01, -0.01))
    assert float(ahead - behind) / 0.02 == pytest.approx(float(images.grad.norm()), rel=0.1)
    assert all(parameter.grad is None for parameter in judges["classifier"].network.parameters())


def test_larger_images_are_averaged_down_to_8_by_8(judges):
    images, digits = some_digits(5)
    large = images.repeat_interleave(4, dim=2).repeat_interleave(4, dim=3)  # [5, 3, 32, 32]
    names = names_of(digits, None)
    small_scores = judges["classifier"](images=images, class_names=names)
    torch.testing.assert_close(judges["classifier"](images=large, class_names=names), small_scores)


def test_the_two_judges_differ(judges):
    images, _ = some_digits()
    first, second = (judge.mode_log_probs(images) for judge in judges.values())
    assert not torch.allclose(first, second, atol=0.1)


def test_training_is_deterministic_and_leaves_the_global_random_state_alone(quick_cache):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = Classifier(training_images="digits").network.state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    next(quick_cache.iterdir()).unlink()
    torch.manual_seed(6)
    with torch.no_grad():  # as a reward may be made anywhere
        second = Classifier(training_images="digits").network.state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_the_number_of_threads_does_not_change_the_weights(quick_cache):
    threads = torch.get_num_threads()
    weights = []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            weights.append(Classifier(training_images="digits").network.state_dict())
            assert torch.get_num_threads() == count
            next(quick_cache.iterdir()).unlink()
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_the_second_time_nothing_is_trained(quick_cache, monkeypatch):
    first = held_out().network.state_dict()
    monkeypatch.setattr(classifier_networks, "train_network", lambda *_: pytest.fail("trained again"))
    second = held_out().network.state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    (kept,) = quick_cache.iterdir()  # no drafts left
    assert kept.name.startswith("PerceptronNetwork-")


@pytest.mark.parametrize("damage", ["truncated", "other tensors"])
def test_a_damaged_cache_file_is_rebuilt_with_a_warning(quick_cache, damage):
    good = held_out().network.state_dict()
    (path,) = quick_cache.iterdir()
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:1000])
    else:
        save_file({"weight": torch.zeros(2)}, path)
    with pytest.warns(UserWarning, match="training the classifier again"):
        rebuilt = held_out().network.state_dict()
    assert all(torch.equal(good[name], rebuilt[name]) for name in good)
    assert load_file(path).keys() == good.keys()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert held_out().network is not None


def test_a_cache_that_cannot_be_written_is_no_reason_to_stop(quick_cache):
    quick_cache.write_text("a file stands where the folder should be")
    with pytest.warns(UserWarning, match="cannot keep the classifier in .*set MARVAL_RL_CACHE"):
        assert held_out().network is not None


def test_a_checkpoint_is_used_in_place_of_the_cache(judges, tmp_path):
    path = tmp_path / "mine.safetensors"
    weights = {name: tensor.clone() for name, tensor in judges["classifier"].network.state_dict().items()}
    weights["classify.bias"] += 1.0
    save_file(weights, path)
    loaded = load_reward("classifier", checkpoint=str(path), training_images="digits").network.state_dict()
    assert torch.equal(loaded["classify.bias"], weights["classify.bias"])


def test_checkpoints_that_do_not_fit_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"checkpoint '.*nothing.safetensors' does not exist"):
        Classifier(checkpoint=tmp_path / "nothing.safetensors", training_images="digits")
    (tmp_path / "broken.safetensors").write_bytes(b"not safetensors at all")
    with pytest.raises(CheckpointError, match=r"broken.safetensors cannot be loaded as ConvolutionalNetwork"):
        Classifier(checkpoint=tmp_path / "broken.safetensors", training_images="digits")
    save_file(PerceptronNetwork(1, 8, 10).state_dict(), tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match=r"other.safetensors cannot be loaded as ConvolutionalNetwork"):
        Classifier(checkpoint=tmp_path / "other.safetensors", training_images="digits")


def test_unknown_scores_and_classes_are_refused(judges):
    with pytest.raises(ValueError, match="unknown score 'f1'; known: log_probability, accuracy, confidence"):
        Classifier(score="f1")
    with pytest.raises(ValueError, match=r"'classifier' cannot be made .* learns from labelled images: set dataset"):
        load_reward("classifier")
    with pytest.raises(ValueError, match="unknown class name 'cat'; this classifier knows zero, one"):
        judges["classifier"](images=some_digits(1)[0], class_names=["cat"])


@pytest.fixture
def pictures(tmp_path):
    """A folder of 40 RGB images of 20 x 20 in two classes of different colour, and its images cropped to 18."""
    generator = np.random.default_rng(0)
    for channel, name in enumerate(("red", "green")):
        (tmp_path / "data" / name).mkdir(parents=True)
        for number in range(20):
            pixels = generator.integers(0, 100, (20, 20, 3))
            pixels[..., channel] += 100
            Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / "data" / name / f"{number}.png")
    return CroppedImages(load_labelled_images(tmp_path / "data"), 18, flip=False)


@pytest.mark.parametrize("judge", ["classifier", "held_out_classifier"])
def test_a_folder_of_any_classes_and_colours_has_judges(quick_cache, pictures, judge):
    """As a recipe hands the images that it trains on to rewards, judges and feature extractors."""
    offers = {"training_images": lambda: pictures}
    rewards = RewardSet([judge, "jpeg"], offers=offers)  # which learns nothing, so it is offered none
    images = torch.stack([pictures[index]["images"] for index in range(40)])
    names = ["green"] * 20 + ["red"] * 20
    right = rewards.score(images, names, torch.tensor(pictures.class_labels), names).components[judge]
    assert float(right.exp().mean()) > 0.9  # labels are in the order of the names
    (extractor,) = load_extractors([judge], offers).values()
    assert extractor.features(images).shape == (40, 32)
    assert rewards.rewards[0].mode_log_probs(images).shape == (40, 2)


def test_a_judge_is_trained_again_for_other_images(quick_cache, pictures, tmp_path, capsys):
    def train() -> str:
        images = CroppedImages(load_labelled_images(tmp_path / "data"), 18, flip=False)
        assert Classifier(training_images=images).network is not None
        return capsys.readouterr().out

    assert "trained a ConvolutionalNetwork on 40 images of 2 classes" in train()
    assert train() == ""
    (tmp_path / "data" / "red" / "0.png").unlink()
    assert "on 39 images of 2 classes" in train()


def test_images_larger_than_32_pixels_and_many_are_bounded(quick_cache, monkeypatch):
    monkeypatch.setattr(classifier_networks, "MAX_IMAGES", 30)
    monkeypatch.setattr(classifier_networks, "MAX_SIZE", 4)
    judge = Classifier(training_images=load_cropped_images("digits"))
    assert judge.network.size == 4
    assert len(classifier_networks._images_of(load_cropped_images("digits"), judge.network)[0]) == 30


def test_evaluation_measures_a_judge_on_real_images(judges):
    data = DataArguments(dataset="digits", class_groups="parity")
    train = load_image_dataset("digits", "train", "parity")
    figures = data.evaluator(tiny_model(image_size=8).config).evaluate(train.images[:100], train.class_labels[:100])
    assert 0.975 <= figures["held_out_classifier/real_accuracy"] < 1
    assert figures["classifier/accuracy"] == 1 > figures["classifier/real_accuracy"]  # of the test images
    assert -0.2 < figures["classifier/real_log_probability"] < 0 and figures["classifier/real_confidence"] > 0.9
