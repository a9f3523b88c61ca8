"""Labelled images from folders, parquet files and saved data sets: labels, names, and clear refusals."""

from __future__ import annotations

import os

import datasets
import numpy as np
import pytest
from PIL import Image
from tiny_images import noise_image, png_bytes, write_folder

from marval_rl.data import load_labelled_images
from marval_rl.data.decoding import CorruptImageError
from marval_rl.data.hub_images import HubImages
from marval_rl.data.image_folder import ImageFolder
from marval_rl.errors import DataError


@pytest.fixture(autouse=True)
def own_datasets_cache(tmp_path, monkeypatch):
    """`datasets` converts parquet files into its cache: not the user's."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "hf"))


def pixels(image: Image.Image) -> np.ndarray:
    assert image.mode == "RGB"
    return np.array(image)


FEATURES = datasets.Features(image=datasets.Image(), label=datasets.Value("int64"))


def rows(labels: list, images: list[bytes] | None = None) -> datasets.Dataset:
    images = images or [png_bytes(noise_image(i)) for i in range(len(labels))]
    columns = {"image": [{"bytes": data, "path": None} for data in images], "label": labels}
    return datasets.Dataset.from_dict(columns, None if isinstance(labels[0], str) else FEATURES)


# Image folders


def test_labels_are_the_class_folders_in_order_of_their_names(tmp_path):
    source = ImageFolder(write_folder(tmp_path / "data", {"zebra": 1, "ant": 2}))
    assert source.class_names == ["ant", "zebra"] and source.class_labels == [0, 0, 1] and len(source) == 3
    assert [source.name(i) for i in range(3)] == ["ant/0000.png", "ant/0001.png", "zebra/0000.png"]
    assert np.array_equal(pixels(source.read(1)), pixels(noise_image(1001)))


@pytest.mark.parametrize("place", ["", "train"])
def test_the_root_may_be_the_folder_or_hold_train(tmp_path, place):
    write_folder(tmp_path / "data" / place, {"ant": 2, "bee": 1})
    assert load_labelled_images(tmp_path / "data").class_labels == [0, 0, 1]


def test_a_class_may_be_called_train(tmp_path):
    source = load_labelled_images(write_folder(tmp_path / "data", {"boat": 1, "train": 1}))
    assert source.class_names == ["boat", "train"]


def test_a_split_that_is_not_there_is_not_replaced_by_another(tmp_path):
    write_folder(tmp_path / "data" / "train", {"ant": 1})
    with pytest.raises(DataError, match=r"data has no folder 'val' of class folders; its folders: train"):
        load_labelled_images(tmp_path / "data", split="val")


def test_folders_named_by_imagenet_ids_get_imagenet_names(tmp_path):
    source = ImageFolder(write_folder(tmp_path / "data", {"n02123045": 1, "n01440764": 1}))
    assert source.class_names == ["tench", "tabby cat"]


def test_nested_files_count_and_hidden_or_other_ones_do_not(tmp_path):
    root = write_folder(tmp_path / "data", {"ant": 1})
    (root / "ant" / "more").mkdir()
    noise_image(5).save(root / "ant" / "more" / "x.JPEG")
    (root / "ant" / "notes.txt").write_text("no image")
    (root / "ant" / "._0000.png").write_bytes(b"left by a Mac")
    (root / ".cache").mkdir()
    (root / "LICENSE").write_text("no class")
    source = ImageFolder(root)
    assert [source.name(i) for i in range(len(source))] == ["ant/0000.png", "ant/more/x.JPEG"]


def test_names_that_are_no_text_and_links_are_followed(tmp_path):
    root = write_folder(tmp_path / "data", {"ant": 1})
    noise_image(7).save(root / "ant" / "été.png")
    os.rename(root / "ant" / "0000.png", os.fsencode(root / "ant") + b"/\xff.png")
    (root / "bee").symlink_to(root / "ant")
    source = ImageFolder(root)
    assert source.class_labels == [0, 0, 1, 1]
    assert all(source.read(i).size == (20, 18) for i in range(4))


@pytest.mark.parametrize(
    ("classes", "file", "message"),
    [
        (None, None, r"no folder at .*data: it does not exist"),
        ({}, None, r"data holds no class folders"),
        ({"ant": 1, "bee": 0, "cow": 0}, None, r"2 of the 3 class folders in .*data hold no files .*: bee, cow; fill"),
    ],
)
def test_a_folder_of_the_wrong_shape_is_refused(tmp_path, classes, file, message):
    if classes is not None:
        (tmp_path / "data").mkdir()
        write_folder(tmp_path / "data", classes)
    with pytest.raises(DataError, match=message):
        ImageFolder(tmp_path / "data")


def test_class_names_may_be_given_and_must_be_as_many_as_the_classes(tmp_path):
    root = write_folder(tmp_path / "data", {"a": 1, "b": 1})
    (tmp_path / "names.txt").write_text("first\nsecond\n")
    assert ImageFolder(root, class_names=["x", "y"]).class_names == ["x", "y"]
    assert ImageFolder(root, class_names=str(tmp_path / "names.txt")).class_names == ["first", "second"]
    with pytest.raises(DataError, match=r"1000 class_names were given, but .* has 2 classes"):
        ImageFolder(root, class_names="imagenet")
    (tmp_path / "names.txt").write_text("first\n\nsecond\n")
    with pytest.raises(DataError, match=r"line 2 of the class names .* is empty"):
        ImageFolder(root, class_names=str(tmp_path / "names.txt"))
    with pytest.raises(DataError, match=r"cannot read the class names .*imagnet"):
        ImageFolder(root, class_names="imagnet")


# Images that cannot be read


@pytest.mark.parametrize("damage", ["truncated", "text", "empty", "zeros", "header"])
@pytest.mark.parametrize("ending", ["png", "jpg", "webp", "tif"])
def test_a_corrupt_image_is_named(tmp_path, ending, damage):
    root = write_folder(tmp_path / "data", {"ant": 1})
    path = root / "ant" / f"a.{ending}"
    noise_image(3, 64, 64).save(path)
    whole = path.read_bytes()
    half = len(whole) // 2
    damaged = {"truncated": whole[:half], "text": b"<html>", "empty": b"", "zeros": bytes(half), "header": whole[:20]}
    path.write_bytes(damaged[damage])
    source = ImageFolder(root)
    with pytest.raises(CorruptImageError, match=str(path)) as caught:
        source.read(1)
    assert caught.value.reason and str(path) not in caught.value.reason and "BytesIO" not in str(caught.value)


def test_a_file_that_cannot_be_read_is_not_called_corrupt(tmp_path):
    source = ImageFolder(write_folder(tmp_path / "data", {"ant": 1}))
    (tmp_path / "data" / "ant" / "0000.png").unlink()
    with pytest.raises(DataError, match=r"cannot read .*0000.png: No such file") as caught:
        source.read(0)
    assert not isinstance(caught.value, CorruptImageError)


@pytest.mark.parametrize("mode", ["L", "CMYK", "P", "RGBA", "LA"])
def test_every_colour_mode_becomes_rgb(tmp_path, mode):
    (tmp_path / "ant").mkdir()
    image = noise_image(1).convert(mode)
    image.save(tmp_path / "ant" / ("a.jpg" if mode == "CMYK" else "a.png"))
    assert pixels(ImageFolder(tmp_path).read(0)).shape == (18, 20, 3)


# Data sets


def test_rows_of_a_data_set_are_images_with_labels():
    source = HubImages(rows([2, 0, 2]))
    assert source.class_labels == [2, 0, 2] and source.class_names == ["class 0", "class 1", "class 2"]
    assert source.name(1) == "row 1" and np.array_equal(pixels(source.read(1)), pixels(noise_image(1)))


def test_labels_are_read_without_decoding_images():
    source = HubImages(rows([0, 1], [b"no image", b"neither"]))
    assert source.class_labels == [0, 1]
    with pytest.raises(CorruptImageError, match="row 1 of the data set is corrupt: not an image format"):
        source.read(1)


def test_a_class_label_knows_its_names_and_text_is_sorted():
    named = rows([1, 0]).cast_column("label", datasets.ClassLabel(names=["cat", "dog"]))
    assert HubImages(named).class_names == ["cat", "dog"]
    source = HubImages(rows(["dog", "ant", "dog"]))
    assert source.class_names == ["ant", "dog"] and source.class_labels == [1, 0, 1]


def test_integer_labels_take_given_names_even_if_the_last_classes_have_no_images():
    source = HubImages(rows([0, 3]), class_names="imagenet")
    assert len(source.class_names) == 1000 and source.class_names[3] == "tiger shark"
    with pytest.raises(DataError, match=r"2 class_names were given, but .* has 4 classes"):
        HubImages(rows([0, 3]), class_names=["a", "b"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"label_column": "lable"}, r"no column 'lable', only image, label \(--label_.*; did you mean label\?"),
        ({"image_column": "jpg"}, r"no column 'jpg', only image, label \(--image_column"),
        ({"image_column": "label"}, r"the column 'label' of the data set holds no images"),
    ],
)
def test_a_wrong_column_is_answered_with_those_that_there_are(changes, message):
    with pytest.raises(DataError, match=message):
        HubImages(rows([0, 1]), **changes)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0, None], "has no label in 1 of 2 rows"),
        ([0, -1], "is -1 in row 1: labels count from 0"),
    ],
)
def test_rows_without_a_valid_label_are_refused(labels, message):
    with pytest.raises(DataError, match=message):
        HubImages(rows(labels))


def test_labels_that_are_fractions_are_refused():
    data = datasets.Dataset.from_dict({"image": [png_bytes(noise_image(0))], "label": [0.5]})
    with pytest.raises(DataError, match="holds double: labels are whole numbers or text"):
        HubImages(data)


def test_an_empty_data_set_and_a_row_without_an_image_are_refused():
    with pytest.raises(DataError, match="has no rows"):
        HubImages(rows([0]).select([]))
    with pytest.raises(CorruptImageError, match="row 0 of the data set holds no image"):
        HubImages(datasets.Dataset.from_dict({"image": [None], "label": [0]}, FEATURES)).read(0)


# By name or path


def test_parquet_files_and_folders_of_them(tmp_path):
    folder = tmp_path / "parquet" / "data"
    folder.mkdir(parents=True)
    rows([0, 1]).to_parquet(folder / "train-00000-of-00002.parquet")
    rows([2]).to_parquet(folder / "train-00001-of-00002.parquet")
    rows([1]).to_parquet(folder / "validation-00000-of-00001.parquet")
    assert load_labelled_images(folder / "train-00000-of-00002.parquet").class_labels == [0, 1]
    assert load_labelled_images(str(folder / "train-*.parquet")).class_labels == [0, 1, 2]
    assert load_labelled_images(tmp_path / "parquet").class_labels == [0, 1, 2]
    assert load_labelled_images(tmp_path / "parquet", split="validation").class_labels == [1]
    with pytest.raises(DataError, match=r"cannot load the split 'test' of .*parquet: Unknown split"):
        load_labelled_images(tmp_path / "parquet", split="test")


def test_parquet_written_by_others_may_hold_plain_bytes(tmp_path):
    data = datasets.Dataset.from_dict({"jpg": [png_bytes(noise_image(4))], "cls": ["cat"]})
    data.to_parquet(tmp_path / "a.parquet")
    source = load_labelled_images(tmp_path / "a.parquet", image_column="jpg", label_column="cls")
    assert source.class_names == ["cat"] and np.array_equal(pixels(source.read(0)), pixels(noise_image(4)))


def test_a_parquet_file_that_is_cut_off_is_refused(tmp_path):
    rows([0, 1]).to_parquet(tmp_path / "a.parquet")
    (tmp_path / "a.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:-20])
    with pytest.raises(DataError, match=r"a.parquet is not a parquet file, or it is cut off"):
        load_labelled_images(tmp_path / "a.parquet")


def test_saved_data_sets(tmp_path):
    rows([0, 1]).save_to_disk(tmp_path / "one")
    datasets.DatasetDict(train=rows([1]), test=rows([0, 0])).save_to_disk(tmp_path / "two")
    assert load_labelled_images(tmp_path / "one").class_labels == [0, 1]
    assert load_labelled_images(tmp_path / "two", split="test").class_labels == [0, 0]
    with pytest.raises(DataError, match="has no split 'val': it has train, test"):
        load_labelled_images(tmp_path / "two", split="val")


@pytest.mark.parametrize(
    "name", ["imagenet", "/no/such/folder", "./owner/name", "a/b/c", "missing/*.parquet", "data/imagenet"]
)
def test_a_missing_path_asks_nobody(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: pytest.fail("the network was asked"))
    with pytest.raises(DataError, match=f"no images at {name.replace('*', '.')}: the path does not exist"):
        load_labelled_images(name)


def test_a_hub_id_is_looked_up_and_errors_name_it(monkeypatch):
    asked = []

    def load_dataset(name, split):
        asked.append((name, split))
        if name == "owner/gone":
            raise datasets.exceptions.DatasetNotFoundError("Dataset 'owner/gone' doesn't exist on the Hub")
        return rows([0, 1])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert load_labelled_images("owner/name", split="train").class_labels == [0, 1]
    with pytest.raises(
        DataError,
        match=r"of owner/gone \(no such local path, so it was taken for a hub id; ./owner/gone is a path\): D",
    ):
        load_labelled_images("owner/gone")
    assert asked == [("owner/name", "train"), ("owner/gone", "train")]
