"""The distribution anchor in both trainers: what it moves, what it compares with, and what it refuses."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import tiny_trainers
import torch
from datasets import Dataset
from tiny_images import tiny_codec
from tiny_models import tiny_model
from tiny_trainers import backprop_trainer, constant, grey_student, grpo_trainer, logged, tiny_images
from torch import Tensor

from marval_rl.evaluation import ImageEvaluator
from marval_rl.evaluation.features import Pixels, load_extractor
from marval_rl.rewarding import RewardSet
from marval_rl.trainers.base import MARTrainer
from marval_rl.trainers.distribution_matching import NOT_COMPARED, DistributionMatching, sets_of
from marval_rl.trainers.reward_trainer import check_other_features

MATCHED = {"distribution_weight": 10.0, "max_steps": 16, "learning_rate": 3e-3}


@pytest.mark.parametrize("method", ["grpo", "reward_backprop"])
def test_generated_images_come_nearer_to_the_data(tmp_path, monkeypatch, method):
    """GRPO's reward says nothing here, and back-propagation has none: what moves the student is the anchor alone."""
    dark = [{**row, "images": 0.3 * row["images"]} for row in tiny_images()]
    monkeypatch.setattr(tiny_trainers, "tiny_images", lambda: dark)
    if method == "grpo":
        trainer = grpo_trainer(tmp_path, grey_student(), constant, **MATCHED, distribution_batch_size=24)
    else:
        trainer = backprop_trainer(tmp_path, grey_student(), None, **MATCHED, per_device_train_batch_size=24)
    assert trainer.model.auxiliary is None
    trainer.train()
    distances = logged(trainer, "mmd")
    assert len(distances) == 16
    assert sum(distances[-4:]) < 0.7 * sum(distances[:4])
    if method == "reward_backprop":
        assert logged(trainer, "loss") == pytest.approx([10 * distance for distance in distances], rel=1e-4)


def test_the_anchor_and_the_reward_share_one_decoded_image(tmp_path, monkeypatch):
    trainer = backprop_trainer(tmp_path, grey_student(), **{**MATCHED, "max_steps": 2})
    decoded = []
    decode = trainer.codec.decode

    def counting(latents: Tensor, text: None) -> Tensor:
        decoded.append(len(latents))
        return decode(latents, text)

    monkeypatch.setattr(trainer.codec, "decode", counting)
    trainer.train()
    assert decoded == [8, 8]


def arguments(**changes: Any) -> SimpleNamespace:
    settings = {
        **{"distribution_features": "pixels", "distribution_kernel": "rbf", "distribution_real_images": 20_000},
        **{
            "distribution_queue": 0,
            "distribution_column": None,
            "distribution_weight": 1.0,
            "distribution_at_once": lambda classes: (8, classes),
        },
        **{"process_index": 0, "world_size": 1, "device": torch.device("cpu")},
    }
    return SimpleNamespace(**{**settings, **changes})


def images_of(rows: dict[str, Tensor]) -> Tensor:
    return rows["images"]


def test_it_compares_with_a_fixed_choice_of_the_real_images():
    few = [
        DistributionMatching(arguments(distribution_real_images=12), tiny_images(), images_of, torch.arange(3))
        for _ in range(2)
    ]
    counts = [sum(map(len, matching.real.by_class.values())) for matching in few]
    assert counts == [12, 12]
    for label, rows in few[0].real.by_class.items():
        assert torch.equal(rows, few[1].real.by_class[label])
        known = torch.stack([row["images"].expand(3, -1, -1).flatten() for row in tiny_images()])
        assert torch.equal(torch.cdist(rows, known).argmin(dim=1) % 3, torch.full((len(rows),), label))


def test_cached_moments_are_decoded():
    """Their images are what the VAE makes of them: that is the nearest to the data that latents can come."""
    codec = tiny_codec()
    images = torch.rand(6, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    rows = [{"moments": codec.moments(image[None])[0], "class_labels": 0} for image in images]

    trainer = SimpleNamespace(codec=codec, mar=tiny_model(), args=SimpleNamespace(device=torch.device("cpu")))
    matching = DistributionMatching(
        arguments(distribution_features="pixels:16"),
        rows,
        lambda batch: MARTrainer.images_of(trainer, batch),
        torch.arange(1),
    )
    own = matching.real.by_class[0]
    assert own.shape == (6, 3 * 16 * 16) and 0 <= float(own.min()) <= float(own.max()) <= 1


def test_a_column_joins_prompts_and_those_never_generated_have_no_images():
    """Classes 0 and 1 are one set, class 3 is held out: its lack of images is no error, and 2 stays by itself."""
    rows = Dataset.from_dict({"class_labels": [0, 1, 2, 0], "asks": ["bold", "bold", "thin", "bold"]})
    assert sets_of(rows, 4, None).tolist() == [0, 1, 2, NOT_COMPARED]
    set_of = sets_of(rows, 4, "asks")
    assert set_of.tolist() == [0, 0, 1, NOT_COMPARED]
    column = {"distribution_column": "asks", "distribution_at_once": lambda sets: (2 * sets, sets)}
    matching = DistributionMatching(arguments(**column), tiny_images(), images_of, set_of)
    by_class = DistributionMatching(arguments(), tiny_images(), images_of, torch.arange(3)).real.by_class
    joined = matching.real.by_class
    assert {number: len(rows) for number, rows in joined.items()} == {0: len(by_class[0]) * 2, 1: len(by_class[2])}
    # One image of each class: alone in its class it would not count, in the set of both it does.
    images = torch.rand(2, 1, 4, 4, requires_grad=True)
    matching.loss(images, torch.tensor([0, 1]), {}).backward()
    assert images.grad is not None and images.grad.flatten(1).norm(dim=1).min() > 0


@pytest.mark.parametrize(
    ("column", "values", "message"),
    [
        ("asked", ["a", "b"], "distribution_column asked is not a column of the prompts, which have asks"),
        ("asks", ["a", "b"], "asks of the prompts has several values for one prompt, such as 'b'"),
    ],
)
def test_a_column_that_joins_nothing_is_refused(column, values, message):
    with pytest.raises(ValueError, match=message):
        sets_of(Dataset.from_dict({"class_labels": [0, 0], "asks": values}), 1, column)


class NoGradient:
    def __call__(self, images: Tensor, **_: Any) -> Tensor:
        return images.mean(dim=(1, 2, 3))

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        return images.flatten(1)


def test_invalid_combinations_are_refused_with_a_remedy(tmp_path):
    data = tiny_images()
    one_of_a_class = [row for row in data if int(row["class_labels"]) < 2] + data[2:3]
    for changes, rows, message in (
        ({"distribution_features": f"{__file__}:NoGradient"}, data, r"has no gradient: take pixels"),
        ({}, one_of_a_class, "class 2 has fewer than 2 images among the 17"),
        ({"distribution_at_once": lambda classes: (5, classes)}, data, r"5 images at once of 3 classes are too few"),
    ):
        with pytest.raises(ValueError, match=message):
            DistributionMatching(arguments(**changes), rows, images_of, torch.arange(3))
    with pytest.raises(ValueError, match="distribution_weight 1 needs a data set of images"):
        trainer = backprop_trainer(tmp_path, grey_student())
        type(trainer)(
            grey_student(),
            trainer.rewards,
            type(trainer.args)(str(tmp_path), distribution_weight=1, per_device_train_batch_size=8),
            train_dataset=trainer.train_dataset,
        )
    with pytest.raises(ValueError, match="reward_funcs is empty, but grpo compares rewards"):
        grpo_trainer(tmp_path, grey_student(), [], distribution_weight=1.0)


def test_a_queue_lets_a_batch_be_small(tmp_path):
    settings = {"distribution_weight": 1.0, "per_device_train_batch_size": 2, "max_steps": 5}
    with pytest.raises(ValueError, match="set distribution_queue to at least 4"):
        backprop_trainer(tmp_path, grey_student(), **settings)
    trainer = backprop_trainer(tmp_path, grey_student(), **settings, distribution_queue=6)
    trainer.train()
    assert trainer.buffer["distribution_features"].shape == (6, 48)  # the latest three batches of two images
    assert all(value != 0 for value in logged(trainer, "mmd")[2:])


def test_evaluation_must_look_at_other_features_than_those_of_the_anchor():
    pixels = {"pixels": Pixels("8")}
    for trained in ("pixels", "pixels:4"):
        with pytest.raises(ValueError, match="evaluation would look at nothing else: add other features"):
            check_other_features(trained, ImageEvaluator(pixels))
    check_other_features("hf:some/model", ImageEvaluator(pixels))
    check_other_features("pixels", ImageEvaluator({**pixels, "other": Pixels("4")}))
    check_other_features("pixels", ImageEvaluator(pixels, class_of_mode=torch.tensor([0]), judges={"judge": None}))
    judged = ImageEvaluator(pixels)
    judged.add_rewards(RewardSet([constant]), list, ["a"])
    check_other_features("pixels", judged)


def test_features_of_a_vision_model_have_a_gradient(tmp_path):
    """Through the image processor, too: the gradient is the slope of a function of the features."""
    from transformers import BitImageProcessor, Dinov2Config, Dinov2Model

    size = {"height": 28, "width": 28}
    config = Dinov2Config(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14)
    Dinov2Model(config).save_pretrained(tmp_path)
    BitImageProcessor(size={"shortest_edge": 28}, crop_size=size).save_pretrained(tmp_path)
    extractor = load_extractor(f"hf:{tmp_path}")
    images = torch.rand(2, 3, 32, 32, requires_grad=True)
    direction = torch.randn_like(images)
    gradient = torch.autograd.grad(extractor.features(images).square().sum(), images)[0]
    with torch.no_grad():
        values = [extractor.features(images + step * direction).square().sum() for step in (-1e-2, 1e-2)]
    assert float((gradient * direction).sum()) == pytest.approx(float(values[1] - values[0]) / 2e-2, rel=0.1)
