"""ImageNet's classes: all there, in the order of the labels, with the names that CLIP's authors gave them."""

from __future__ import annotations

from pathlib import Path

import pytest

import marval_rl.data.class_names
from marval_rl.data.class_names import IMAGENET_CLASS_NAMES, IMAGENET_WNIDS, imagenet_names


def test_there_are_1000_classes_whose_ids_are_sorted_and_unique():
    assert len(IMAGENET_CLASS_NAMES) == len(IMAGENET_WNIDS) == 1000
    assert sorted(set(IMAGENET_WNIDS)) == IMAGENET_WNIDS
    assert all(wnid[0] == "n" and wnid[1:].isdecimal() and len(wnid) == 9 for wnid in IMAGENET_WNIDS)


@pytest.mark.parametrize(
    ("label", "wnid", "name"),
    [
        (0, "n01440764", "tench"),
        (134, "n02012849", "crane bird"),
        (207, "n02099601", "Golden Retriever"),
        (281, "n02123045", "tabby cat"),
        (388, "n02510455", "giant panda"),
        (517, "n03126707", "construction crane"),
        (639, "n03710721", "one-piece bathing suit"),
        (999, "n15075141", "toilet paper"),
    ],
)
def test_labels_ids_and_names_belong_together(label, wnid, name):
    assert (IMAGENET_WNIDS[label], IMAGENET_CLASS_NAMES[label]) == (wnid, name)


def test_no_name_is_empty_or_padded_and_only_two_are_used_twice():
    assert all(name and name == name.strip() for name in IMAGENET_CLASS_NAMES)
    twice = {name for name in IMAGENET_CLASS_NAMES if IMAGENET_CLASS_NAMES.count(name) > 1}
    assert twice == {"missile", "sunglasses"}


def test_a_part_of_the_classes_is_named_by_id_and_anything_else_is_not():
    assert imagenet_names(["n02123045", "n01440764"]) == ["tabby cat", "tench"]
    assert imagenet_names(["n02123045", "cat"]) is None


def test_the_file_says_where_it_comes_from_and_under_which_licence():
    text = Path(marval_rl.data.class_names.__file__).with_name("imagenet_classes.tsv").read_text()
    assert all(
        words in text for words in ("https://github.com/openai/CLIP", "open_clip", "Permission is hereby granted")
    )
