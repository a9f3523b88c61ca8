"""Image classifiers of transformers and timm against those libraries' own pipelines."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
import timm
import torch
from marval_rl.rewards.image_classifier import ImageClassifier
from safetensors.torch import load_file, save_file
from tiny_rewards import (
    TIMM_NAME,
    golden_image,
    noise_images,
    to_pictures,
    to_tensor,
    write_classifier,
    write_timm_classifier,
)
from torch import Tensor
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    BitImageProcessor,
    ConvNextImageProcessor,
    DeiTImageProcessor,
    EfficientNetImageProcessor,
    ViTImageProcessor,
)

from marval_rl.errors import CheckpointError, RewardError
from marval_rl.rewarding import RewardSet

LABELS = torch.tensor([0, 2, 4])
NAMES = ["fish", "cat", "bird"]
SQUARE = {"height": 32, "width": 32}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_classifier(tmp_path_factory.mktemp("classifier"))


@pytest.fixture(scope="module")
def timm_weights(tmp_path_factory) -> Path:
    return write_timm_classifier(tmp_path_factory.mktemp("timm"))


@pytest.fixture(params=["transformers", "timm"])
def make(request, folder, timm_weights):
    """Makes a classifier of either library, with further arguments."""
    source = {"transformers": {"model": str(folder)}, "timm": {"model": f"timm:{TIMM_NAME}"}}[request.param]
    weights = {"weights": str(timm_weights)} if request.param == "timm" else {}
    return lambda **more: ImageClassifier(**source, **weights, **more)


def score(reward: ImageClassifier, images: Tensor, labels: Tensor = LABELS, names: list[str] = NAMES) -> Tensor:
    return reward(images=images, prompts=names, class_labels=labels, class_names=names)


def by_transformers(folder: Path, pictures: list) -> tuple[Tensor, Tensor]:
    """Pixels and log-probabilities by transformers itself."""
    pixels = AutoImageProcessor.from_pretrained(folder)(images=pictures, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        logits = AutoModelForImageClassification.from_pretrained(folder).eval()(pixel_values=pixels).logits
    return pixels, logits.log_softmax(dim=1)


def by_timm(weights: Path, pictures: list) -> tuple[Tensor, Tensor]:
    """Pixels and log-probabilities by timm itself."""
    network = timm.create_model(TIMM_NAME, num_classes=5)
    network.load_state_dict(load_file(weights))
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(network), is_training=False)
    pixels = torch.stack([transform(picture) for picture in pictures])
    with torch.no_grad():
        return pixels, network.eval()(pixels).log_softmax(dim=1)


def test_log_probabilities_are_those_of_transformers(folder):
    images = noise_images(3, 32, 32)
    _, expected = by_transformers(folder, to_pictures(images))
    found = score(ImageClassifier(str(folder)), images)
    torch.testing.assert_close(found, expected.gather(1, LABELS[:, None]).squeeze(1), rtol=0, atol=1e-5)
    assert found.dtype == torch.float32 and expected.std() > 0.3


def test_log_probabilities_are_those_of_timm(timm_weights):
    images = noise_images(3, 200, 220)
    pixels, expected = by_timm(timm_weights, to_pictures(images))
    reward = ImageClassifier(f"timm:{TIMM_NAME}", str(timm_weights))
    assert ((reward.pixels(images) - pixels) * 0.5).abs().max() < 2 / 255
    found = score(reward, images)
    torch.testing.assert_close(found, expected.gather(1, LABELS[:, None]).squeeze(1), rtol=0, atol=2e-3)
    assert expected.std() > 0.05


@pytest.mark.parametrize(
    "processor",
    [
        ViTImageProcessor(size=SQUARE),
        DeiTImageProcessor(size={"height": 37, "width": 37}, crop_size=SQUARE, image_mean=(0.4, 0.5, 0.6)),
        BitImageProcessor(size={"shortest_edge": 37}, crop_size=SQUARE),
        ConvNextImageProcessor(size={"shortest_edge": 32}, crop_pct=0.875, image_std=(0.2, 0.3, 0.4)),
        ConvNextImageProcessor(size={"shortest_edge": 384}),
    ],
    ids=["ViT", "DeiT", "BiT", "ConvNeXt", "large ConvNeXt"],
)
def test_images_are_prepared_as_by_transformers(tmp_path, processor):
    reward = ImageClassifier(str(write_classifier(tmp_path, processor)))
    mean, std = (torch.tensor(each).view(3, 1, 1) for each in (reward.preprocessing.mean, reward.preprocessing.std))
    for picture in (golden_image(1), *to_pictures(noise_images(1, 47, 33)), *to_pictures(noise_images(1, 20, 20))):
        expected = AutoImageProcessor.from_pretrained(tmp_path)(images=picture, return_tensors="pt")["pixel_values"]
        found = reward.pixels(to_tensor(picture))
        assert found.shape == expected.shape
        off = ((found * std + mean) - (expected * std + mean)).abs()
        assert float(off.max()) < 2 / 255


def test_a_model_of_timm_in_the_form_of_the_hub(tmp_path, timm_weights):
    shutil.copy(timm_weights, tmp_path / "model.safetensors")
    settings = timm.create_model(TIMM_NAME).pretrained_cfg | {"tag": "r160_in1k"}
    config = {"architecture": TIMM_NAME.partition(".")[0], "num_classes": 5, "pretrained_cfg": settings}
    (tmp_path / "config.json").write_text(json.dumps(config))
    images = noise_images(3, 200, 220)
    expected = score(ImageClassifier(f"timm:{TIMM_NAME}", str(timm_weights)), images)
    torch.testing.assert_close(score(ImageClassifier(str(tmp_path)), images), expected)


def test_the_three_scores(make, folder):
    images = noise_images(3, 32, 32)
    log_probs = torch.stack(
        [score(make(), images, torch.full((3,), label)) for label in range(5)], dim=1
    )  # [B, classes]
    torch.testing.assert_close(log_probs.exp().sum(dim=1), torch.ones(3))
    best = log_probs.argmax(dim=1)
    second = log_probs.topk(2).values[:, 1]
    torch.testing.assert_close(score(make(score="margin"), images, best), log_probs.amax(dim=1) - second)
    worst = log_probs.argmin(dim=1)
    torch.testing.assert_close(
        score(make(score="margin"), images, worst), log_probs.amin(dim=1) - log_probs.amax(dim=1)
    )
    labels = torch.stack([best[0], worst[1], best[2]])
    assert score(make(score="accuracy"), images, labels).tolist() == [1.0, 0.0, 1.0]


def test_a_class_may_be_several_of_the_models(make):
    images = noise_images(3, 40, 40)
    log_probs = torch.stack([score(make(), images, torch.full((3,), label)) for label in range(5)], dim=1)
    label_map = {"fish": 0, "cat": [2, 3], "bird": [1, 4]}
    found = {kind: score(make(score=kind, label_map=label_map), images) for kind in ("log_probability", "margin")}
    cats, birds = log_probs[1, 2:4].logsumexp(0), log_probs[2, [1, 4]].logsumexp(0)
    torch.testing.assert_close(found["log_probability"], torch.stack([log_probs[0, 0], cats, birds]))
    others = torch.stack([log_probs[0, 1:].max(), log_probs[1, [0, 1, 4]].max(), log_probs[2, [0, 2, 3]].max()])
    torch.testing.assert_close(found["margin"], found["log_probability"] - others)
    accuracy = score(make(score="accuracy", label_map=label_map), images)
    members = ([0], [2, 3], [1, 4])
    assert accuracy.tolist() == [float(int(row.argmax()) in own) for row, own in zip(log_probs, members, strict=True)]


def test_classes_are_found_by_name(folder):
    images = noise_images(3, 40, 40)
    names = ["Tench", "tinca tinca", "tabby cat"]
    expected = score(ImageClassifier(str(folder)), images, torch.tensor([0, 0, 2]))
    torch.testing.assert_close(score(ImageClassifier(str(folder), label_map="names"), images, names=names), expected)
    label_map = {"fish": "tench", "cat": ["tabby", "Tiger Cat"], "bird": 4}
    expected = score(ImageClassifier(str(folder), label_map={"fish": 0, "cat": [2, 3], "bird": 4}), images)
    torch.testing.assert_close(score(ImageClassifier(str(folder), label_map=label_map), images), expected)


def test_accuracy_is_not_differentiable(folder):
    kwargs = {"ImageClassifier": {"model": str(folder), "score": "accuracy"}}
    rewards = RewardSet(["marval_rl.rewards.image_classifier:ImageClassifier"], None, kwargs)
    with pytest.raises(ValueError, match="'ImageClassifier' is not differentiable"):
        rewards.score(noise_images(3, 40, 40).requires_grad_(), NAMES, LABELS, NAMES, with_grad=True)


def test_a_class_that_is_none_of_the_models_is_named(folder):
    images = noise_images(3, 32, 32)
    for label in (5, -1):
        with pytest.raises(
            ValueError, match=f"class label {label} is not one of the model's 5 classes; map your classes"
        ):
            score(ImageClassifier(str(folder)), images, torch.tensor([0, label, 1]))
    by_name = ImageClassifier(str(folder), label_map="names")
    with pytest.raises(ValueError, match=r"0 classes of the model are called 'tenhc'; did you mean tench\?"):
        score(by_name, images, names=["tench", "tenhc", "tabby"])
    with pytest.raises(
        ValueError, match=r"2 classes of the model are called 'crane' \(1, 4\); give its index by a mapping"
    ):
        score(by_name, images, names=["tench", "crane", "tabby"])
    with pytest.raises(ValueError, match=r"label_map does not contain the class 'cat'; did you mean cats\?"):
        score(ImageClassifier(str(folder), label_map={"fish": 0, "cats": 2}), images)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"score": "probability"}, "unknown score 'probability'; known: log_probability, margin, accuracy"),
        ({"label_map": "name"}, "label_map must be 'names', a mapping .*, not 'name'"),
        ({"label_map": {"fish": 5}}, "the class label 5 is not one of the model's 5 classes"),
        ({"label_map": {"fish": 0.5}}, "the class label 0.5 is not one of the model's 5 classes"),
        ({"label_map": {"fish": "crane"}}, r"2 classes of the model are called 'crane' \(1, 4\)"),
        ({"label_map": {"fish": []}}, "gives 'fish' 0 of the model's 5 classes"),
        ({"label_map": {"fish": [0, 1, 2, 3, 4]}}, "gives 'fish' 5 of the model's 5 classes: it must be one or more"),
        ({"weights": "file"}, "has weights of its own; leave weights .* out, or write timm:NAME"),
        ({"model": "./nowhere"}, "the classifier './nowhere' does not exist; give a folder, or a hub id"),
        ({"model": "timm:resnet5"}, "timm has no model 'resnet5'; did you mean resnet50"),
        ({"model": "timm:resnet18"}, "timm:resnet18 needs weights, the path of a file.* written timm/resnet18"),
        ({"model": "timm:resnet18", "weights": "none.pt"}, "the weights 'none.pt' of timm:resnet18 do not exist"),
        ({"dtype": "float8"}, "unknown dtype 'float8'"),
    ],
)
def test_wrong_arguments_name_the_remedy(folder, arguments, message):
    with pytest.raises((ValueError, CheckpointError), match=message):
        ImageClassifier(**{"model": str(folder), **arguments})


def test_timm_does_not_name_its_classes(timm_weights):
    with pytest.raises(ValueError, match="this model does not name its classes; give a mapping to indices"):
        ImageClassifier(f"timm:{TIMM_NAME}", str(timm_weights), label_map="names")


def test_files_that_cannot_be_used_are_refused_in_one_line(folder, timm_weights, tmp_path):
    tensors = load_file(folder / "model.safetensors")
    head = tensors["classifier.weight"]
    changes = {"missing": None, "mismatched": head[:, :8].contiguous(), "nan": head * torch.nan}
    messages = {
        "missing": "is not a complete image classifier: 1 missing_keys: classifier.weight",
        "mismatched": "cannot load the image classifier .*mismatched",
        "nan": "classifier.weight of .*nan holds NaN",
        "damaged": "cannot load the image classifier .*damaged",
        "pickled": "cannot load the image classifier .*pickled",
        "bare": "cannot load the image processor of .*bare",
    }
    for name in messages:
        shutil.copytree(folder, tmp_path / name)
    for name, value in changes.items():
        changed = {key: tensor for key, tensor in tensors.items() if key != "classifier.weight"}
        if value is not None:
            changed["classifier.weight"] = value
        save_file(changed, tmp_path / name / "model.safetensors", metadata={"format": "pt"})
    damaged = tmp_path / "damaged" / "model.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:3000])
    torch.save(tensors, tmp_path / "pickled" / "pytorch_model.bin")
    (tmp_path / "pickled" / "model.safetensors").unlink()
    (tmp_path / "bare" / "preprocessor_config.json").unlink()
    for name, message in messages.items():
        with pytest.raises(CheckpointError, match=message) as error:
            ImageClassifier(str(tmp_path / name))
        assert "\n" not in str(error.value)


def test_weights_of_timm_that_do_not_fit_are_refused_in_one_line(timm_weights, tmp_path):
    tensors = load_file(timm_weights)
    torch.save({"state_dict": tensors, "args": Path("somewhere")}, tmp_path / "hostile.pth")
    save_file({name: tensor for name, tensor in tensors.items() if name != "fc.weight"}, tmp_path / "a.safetensors")
    save_file({name: tensor for name, tensor in tensors.items() if name != "fc.bias"}, tmp_path / "b.safetensors")
    for name, message in (
        ("hostile.pth", "hostile.pth cannot be read as weights"),
        ("a.safetensors", f"a.safetensors is not a classifier {TIMM_NAME}: fc.weight is missing"),
        ("b.safetensors", r"b.safetensors do not fit ResNet: 1 missing \(fc.bias\)"),
    ):
        with pytest.raises(CheckpointError, match=message) as error:
            ImageClassifier(f"timm:{TIMM_NAME}", str(tmp_path / name))
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("processor", "message"),
    [
        (EfficientNetImageProcessor(), "prepares images by EfficientNetImageProcessor, which is not handled"),
        (ViTImageProcessor(resample=0), "resizes by .*; only bicubic and bilinear are handled"),
        (ViTImageProcessor(size={"height": 32, "width": 48}), "only squares are handled"),
        (ViTImageProcessor(do_normalize=False), "in a way that is not handled: .*'do_normalize': False"),
        (BitImageProcessor(do_center_crop=False), "of another shape than a square"),
    ],
)
def test_a_preprocessing_that_is_not_handled_is_refused(folder, tmp_path, processor, message):
    shutil.copytree(folder, tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match=message):
        ImageClassifier(str(tmp_path / "model"))


def test_without_timm_the_error_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(RewardError, match=r"pip install 'marval-rl\[rewards\]'"):
        ImageClassifier("timm:resnet18", "weights.pt")
