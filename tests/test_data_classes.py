"""A name never lands on the images of another class: folders, parquet files, saved data sets, .npz files."""

from __future__ import annotations

from argparse import Namespace

import datasets
import numpy as np
import pytest
from tiny_images import noise_image, png_bytes, write_folder

from marval_rl.cli.evaluate import class_names
from marval_rl.data import load_labelled_images
from marval_rl.data.class_names import (
    IMAGENET_CLASS_NAMES,
    IMAGENET_WNIDS,
    describe_classes,
    label_classes,
    natural_key,
)
from marval_rl.data.hub_images import HubImages
from marval_rl.data.moments import NpzMoments
from marval_rl.errors import DataError
from marval_rl.models import MARConfig

NUMBERS = [str(k) for k in range(12)]
ANIMALS = [f"animal {k}" for k in range(12)]
THOUSAND = [str(k) for k in range(1000)]

# words of the data in their order, class_names, the name that each word gets
PAIRS = [
    (["ant", "bee"], None, ["ant", "bee"]),
    (["ant", "bee"], ["first", "second"], ["first", "second"]),
    (["ant", "bee"], ["Bee", "ANT"], ["ANT", "Bee"]),  # they are the names: the list says the order of the labels
    (["ant", "bee"], ["cow", "bee", "ant"], ["ant", "bee"]),  # a class may have no images
    (NUMBERS, None, NUMBERS),
    (NUMBERS, ANIMALS, ANIMALS),
    (NUMBERS[1:], ANIMALS, ANIMALS[1:]),
    (NUMBERS[1:], ANIMALS[1:], ANIMALS[1:]),  # counted from 1
    (["000", "001", "010"], ANIMALS, ["animal 0", "animal 1", "animal 10"]),
    (THOUSAND, "imagenet", IMAGENET_CLASS_NAMES),
    (IMAGENET_WNIDS, "imagenet", IMAGENET_CLASS_NAMES),
    (["n01440764", "n02123045"], "imagenet", ["tench", "tabby cat"]),
    (["n01440764", "n02123045"], None, ["tench", "tabby cat"]),
    (["goldfish", "tench"], "imagenet", ["goldfish", "tench"]),
    (["class 0", "class 2", "class 10"], ["a", "b", "c"], ["a", "b", "c"]),
]


@pytest.mark.parametrize(("words", "given", "expected"), PAIRS)
def test_every_word_gets_its_own_name(words, given, expected):
    assert sorted(words, key=natural_key) == words
    labels, names = label_classes(words, given, "the data")
    assert [names[label] for label in labels] == expected


@pytest.mark.parametrize(
    ("words", "given", "message"),
    [
        (["ant", "bee"], ["bee", "fly"], r"would call the images of 'bee' 'fly', and others 'bee': name every class"),
        (["ant", "bee"], ["x"], "1 class_names were given, but the data has 2 classes"),
        (NUMBERS[2:], ["a", "b"], "2 class_names were given, but the classes of the data are the numbers 2 to 11"),
        (["1", "01"], ANIMALS, "has a class number twice"),
        ([f"class {k}" for k in range(1000)], "imagenet", r"imagenet does not tell which .* belongs to 'class 0'"),
        (["Cat", "cat"], None, "has the classes 'Cat' and 'cat': rename or merge them"),
        (["e\u0301t\u00e9", "\u00e9t\u00e9"], None, "rename or merge them"),
    ],
)
def test_names_that_would_land_elsewhere_are_refused(words, given, message):
    with pytest.raises(DataError, match=message):
        label_classes(words, given, "the data")


def test_numbers_mean_the_same_in_every_source(tmp_path):
    """The image of class k is noise k, wherever it comes from."""
    (tmp_path / "names.txt").write_text("\n".join(ANIMALS))
    for k in reversed(range(12)):
        (tmp_path / "folder" / str(k)).mkdir(parents=True)
        noise_image(k).save(tmp_path / "folder" / str(k) / "a.png")
        (tmp_path / "npz" / str(k)).mkdir(parents=True)
        np.savez(tmp_path / "npz" / str(k) / "a.npz", moments=np.full((2, 1, 1), k, np.float32))
    order = sorted(range(12), key=str)  # as text, which is how `datasets` numbers such folders
    cells = [{"bytes": png_bytes(noise_image(k)), "path": None} for k in order]
    features = datasets.Features(image=datasets.Image(), label=datasets.Value("string"))
    texts = datasets.Dataset.from_dict({"image": cells, "label": [str(k) for k in order]}, features)
    numbered = texts.cast_column("label", datasets.ClassLabel(names=[str(k) for k in order]))
    for names in (str(tmp_path / "names.txt"), ANIMALS):
        sources = [load_labelled_images(tmp_path / "folder", class_names=names)]
        sources += [HubImages(rows, class_names=names) for rows in (texts, numbered)]
        for source in sources:
            assert source.class_names == ANIMALS
            for index, label in enumerate(source.class_labels):
                assert np.array_equal(np.array(source.read(index)), np.array(noise_image(label)))
    moments = NpzMoments(tmp_path / "npz", flip=False, class_names=ANIMALS)
    assert all(row["moments"][0, 0, 0] == row["class_labels"] for row in map(moments.__getitem__, range(12)))


@pytest.mark.parametrize(
    ("names", "line"),
    [
        (["ILSVRC"], "6 images of 1 class: ILSVRC"),
        (["a", "b", "c"], "6 images of 3 classes: a, b, c"),
        (NUMBERS, "6 images of 12 classes: 0, 1, ... 11"),
    ],
)
def test_the_line_that_runs_print(names, line):
    assert describe_classes(6, names) == line


def test_evaluation_does_not_call_the_classes_of_a_model_by_the_names_of_others():
    sizes = {"image_size": 8, "latent_stride": 1, "image_channels": 1, "latent_channels": 1}
    config = MARConfig(**sizes, num_classes=2, class_names=["ant", "bee"])

    def evaluated(names: list[str]) -> list[str]:
        return class_names(Namespace(class_names=names, model="student"), config)

    assert evaluated(["a small ant", "a small bee"]) == ["a small ant", "a small bee"]
    with pytest.raises(DataError, match="has the names of student in another order"):
        evaluated(["bee", "ant"])
    with pytest.raises(DataError, match="would call the images of 'bee' 'fly', and others 'bee'"):
        evaluated(["bee", "fly"])


# Layouts


LAYOUTS = [
    (
        ["training/cat", "training/dog", "testing/cat"],
        r"holds splits and not classes \(testing, training\): give the folder .*: \S*data/training$",
    ),
    (["train", "test"], r"splits and not classes \(test, train\): sort the images to train on into one folder per"),
    (["train2017", "val2017"], "splits and not classes"),
    (["Train"], "splits and not classes"),
    (["train", "val", "extra"], r"splits and not classes \(train, val\)"),
    (
        [f"ILSVRC/Data/CLS-LOC/{split}" for split in ("train/n01440764", "train/n01443537", "val", "test/n01440764")],
        r"ILSVRC in \S* would each be a class.*class folders: \S*data/ILSVRC/Data/CLS-LOC/train$",
    ),
    (["archive/cat", "archive/dog"], r"class folders: \S*data/archive$"),
    (["imagenet/n01440764", "other/n01443537"], r"class folders: \S*data/imagenet or \S*data/other$"),
    (["cat/train", "cat/test", "dog/train", "dog/test"], "their images lie in folders inside"),
    (["cat/a/b", "dog"], r"cat in \S* would each be a class"),
]


@pytest.mark.parametrize(("folders", "message"), LAYOUTS)
def test_folders_that_are_not_classes_are_refused_with_the_right_path(tmp_path, folders, message):
    write_folder(tmp_path / "data", dict.fromkeys(folders, 1))
    with pytest.raises(DataError, match=message):
        load_labelled_images(tmp_path / "data")


@pytest.mark.parametrize("folders", [["cat/day 1", "cat/day 2", "dog/day 1"], ["boat", "train"], ["test", "tube"]])
def test_other_folders_inside_classes_and_classes_with_such_names_are_fine(tmp_path, folders):
    write_folder(tmp_path / "data", dict.fromkeys(folders, 1))
    assert len(load_labelled_images(tmp_path / "data")) == len(folders)


def test_system_files_beside_images_are_ignored(tmp_path):
    write_folder(tmp_path / "data", dict.fromkeys(["cat", "cat/.thumbnails", "cat/@eaDir", "__MACOSX/cat", ".git"], 1))
    source = load_labelled_images(tmp_path / "data")
    assert source.class_names == ["cat"] and len(source) == 1


def test_parquet_is_found_where_the_hub_converts_it_to(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "hf"))
    cells = [{"bytes": png_bytes(noise_image(k)), "path": None} for k in range(2)]
    features = datasets.Features(image=datasets.Image(), label=datasets.Value("int64"))
    rows = datasets.Dataset.from_dict({"image": cells, "label": [0, 1]}, features)
    for place in ("hub/default/train", "hub/default/test", "deep/a/b/c", "two/one/train", "two/other/train"):
        (tmp_path / place).mkdir(parents=True)
        (rows.select([1]) if place.endswith("test") else rows).to_parquet(tmp_path / place / "0000.parquet")
    assert load_labelled_images(tmp_path / "hub").class_labels == [0, 1]
    assert load_labelled_images(tmp_path / "hub", split="test").class_labels == [1]
    with pytest.raises(DataError, match=r"Parquet files lie in \S*deep/a/b/c: give that path"):
        load_labelled_images(tmp_path / "deep")
    with pytest.raises(DataError, match="holds the configurations one, other: give the path of one"):
        load_labelled_images(tmp_path / "two")
