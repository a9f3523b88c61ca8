"""The digits: a fixed split, two labellings, and clear refusals."""

from __future__ import annotations

import pytest
import torch

from marval_rl.data import ImageDataset, load_image_dataset
from marval_rl.data.digits import DIGIT_GROUPS, DIGIT_LABELLINGS

FIRST_TEST_DIGITS = [4, 8, 8, 3, 9, 0, 6, 3, 9, 8, 4, 5]
TEST_PIXEL_SUM = 9771.1875


def test_the_split_is_stratified_disjoint_and_complete():
    train, test = load_image_dataset("digits", "train"), load_image_dataset("digits", "test")
    assert (len(train), len(test)) == (1297, 500)
    assert torch.bincount(test.modes, minlength=10).tolist() == [50, 51, 49, 51, 50, 51, 50, 50, 48, 50]
    train_images = {image.numpy().tobytes() for image in train.images}
    test_images = {image.numpy().tobytes() for image in test.images}
    assert not train_images & test_images
    assert len(train_images | test_images) == 1797  # scikit-learn's digits hold no image twice


def test_the_split_never_moves():
    test = load_image_dataset("digits", "test")
    assert test.modes[:12].tolist() == FIRST_TEST_DIGITS
    assert float(test.images.sum()) == pytest.approx(TEST_PIXEL_SUM, abs=0.1)


def test_images_are_grey_and_span_0_to_1():
    images = load_image_dataset("digits", "train").images
    assert images.shape[1:] == (1, 8, 8) and images.dtype == torch.float32
    assert (float(images.min()), float(images.max())) == (0.0, 1.0)


@pytest.mark.parametrize("labelling", ["digit", "parity"])
def test_class_labels_name_the_group_of_the_digit(labelling):
    data = load_image_dataset("digits", "train", labelling)
    assert data.class_names == DIGIT_LABELLINGS[labelling] and data.num_modes == 10
    for label, digit in zip(data.class_labels.tolist(), data.modes.tolist(), strict=True):
        assert digit in DIGIT_GROUPS[data.class_names[label]]


def test_each_labelling_covers_each_digit_once():
    for names in DIGIT_LABELLINGS.values():
        assert sorted(digit for name in names for digit in DIGIT_GROUPS[name]) == list(range(10))


def test_digit_is_the_default_labelling():
    assert load_image_dataset("digits", "test").class_names[3] == "three"


def test_items_batch_in_a_data_loader():
    data = load_image_dataset("digits", "test", "parity")
    batch = next(iter(torch.utils.data.DataLoader(data, batch_size=4)))
    assert batch["images"].shape == (4, 1, 8, 8)
    assert torch.equal(batch["class_labels"], data.modes[:4] % 2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("faces", "train"), "unknown data set 'faces'; known: digits"),
        (("digits", "validation"), "unknown split 'validation'; known: train, test"),
        (("digits", "train", "colour"), "unknown labelling 'colour' for the data set 'digits'; known: digit, parity"),
    ],
)
def test_unknown_names_are_answered_with_the_known_ones(arguments, message):
    with pytest.raises(ValueError, match=message):
        load_image_dataset(*arguments)


@pytest.mark.parametrize(
    ("images", "labels", "modes", "message"),
    [
        (torch.zeros(2, 8, 8), [0, 1], [0, 1], r"shape \[N, C, H, W\], not \[2, 8, 8\]"),
        (torch.zeros(2, 1, 8, 8), [0], [0, 1], r"class_labels has the shape \[1\], but there are 2 images"),
        (torch.zeros(2, 1, 8, 8), [0, 2], [0, 1], r"class_labels must lie in 0..1, but they lie in 0..2"),
        (torch.zeros(2, 1, 8, 8), [0, 1], [-1, 1], r"modes must lie in 0..2, but they lie in -1..1"),
    ],
)
def test_parts_that_do_not_fit_are_refused(images, labels, modes, message):
    with pytest.raises(ValueError, match=message):
        ImageDataset(images, torch.tensor(labels), ["a", "b"], torch.tensor(modes), num_modes=3)
