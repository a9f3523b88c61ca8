"""Which label a class has, what it is called, and which classes a recipe merges.

ImageNet's names (ILSVRC 2012) are in imagenet_classes.tsv, with their sources and licence.
"""

from __future__ import annotations

import difflib
import re
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path

from marval_rl.errors import DataError
from marval_rl.text import read_text

IMAGENET = "imagenet"


_LINES = Path(__file__).with_name("imagenet_classes.tsv").read_text(encoding="utf-8").splitlines()
_NAME_OF_WNID = dict(line.split("\t") for line in _LINES if not line.startswith("#"))  # sorted: labels are positions
IMAGENET_WNIDS = list(_NAME_OF_WNID)
IMAGENET_CLASS_NAMES = list(_NAME_OF_WNID.values())  # "missile" and "sunglasses" name two classes each


def imagenet_names(words: Sequence[str]) -> list[str] | None:
    """The names of classes that are given by their WordNet ids; None unless all words are ids of the 1000 classes."""
    if not all(word in _NAME_OF_WNID for word in words):
        return None
    return [_NAME_OF_WNID[word] for word in words]


def read_class_names(given: Sequence[str] | str) -> list[str]:
    """Class names in the order of the labels: a list, "imagenet", or the path of a text file with one name per line.

    Raises DataError for a file that cannot be read or that has an empty line between names.
    """
    if not isinstance(given, str):
        return list(given)
    if given == IMAGENET:
        return list(IMAGENET_CLASS_NAMES)
    try:
        names = [line.strip() for line in read_text(given).rstrip().splitlines()]
    except (OSError, UnicodeError) as error:
        raise DataError(
            f"cannot read the class names {given}: {error}; give a list, {IMAGENET!r}, "
            "or a text file with one name per line"
        ) from error
    if not all(names):
        raise DataError(f"line {names.index('') + 1} of the class names {given} is empty: each line names one class")
    return names


def check_number(names: Sequence[str], num_classes: int, where: str) -> None:
    """Raises DataError unless there is one name per class."""
    if len(names) != num_classes:
        raise DataError(f"{len(names)} class_names were given, but {where} has {num_classes} classes")


def natural_key(word: str) -> tuple[str, str]:
    """Sorts "class 2" before "class 10", as timm does; torchvision's order where numbers are equally long."""
    return re.sub("[0-9]+", lambda number: number[0].zfill(20), word), word


def label_classes(
    words: Sequence[str], given: Sequence[str] | str | None, where: str, are_numbered: bool = False
) -> tuple[list[int], list[str]]:
    """The label of each class that the data name, and the names of all classes in the order of the labels.

    Without `given` the labels are 0, 1, ... in the order of `words`, and the names are ImageNet's where all words are
    its WordNet ids, else the words. Given names go
      - to the words that they repeat (but for case), whatever their order: then they say the order of the labels;
      - to WordNet ids, if they are "imagenet";
      - to the labels that the words spell, if all are whole numbers from 0, or from 1 to the number of names;
      - to the words in their order otherwise.

    Args:
        words: The different class folders or text labels, in the order of `natural_key`; or the names of a ClassLabel.
        given: Class names as `read_class_names` takes them, or None.
        where: What holds the words, for messages.
        are_numbered: The data themselves number their classes in the order of `words`.

    Raises:
        DataError: If two words differ in case only, or names do not fit or would land on another class.
    """
    folded = [_fold(word) for word in words]
    for position, word in enumerate(folded):
        twin = words[folded.index(word)]
        if not are_numbered and twin != words[position]:
            raise DataError(f"{where} has the classes {twin!r} and {words[position]!r}: rename or merge them")
    positions = list(range(len(words)))
    if given is None:
        return positions, imagenet_names(words) or list(words)
    names = read_class_names(given)
    known = {_fold(name): label for label, name in enumerate(names)}
    is_imagenet = given == IMAGENET
    if is_imagenet and imagenet_names(words) is not None:
        return [IMAGENET_WNIDS.index(word) for word in words], names
    if all(word in known for word in folded):
        return [known[word] for word in folded], names
    if all(re.fullmatch("[0-9]+", word) for word in words):
        return _labels_of_numbers(words, names, where), names
    check_number(names, len(words), where)
    for position, word in enumerate(folded):
        if known.get(word, position) != position:
            raise DataError(
                f"class_names would call the images of {words[position]!r} {names[position]!r}, and others "
                f"{names[known[word]]!r}: name every class of {where} as it is, or in the order {shorten(words)}"
            )
    if is_imagenet and not are_numbered:
        raise DataError(
            f"class_names imagenet does not tell which of its 1000 names belongs to {words[0]!r} of {where}: call the "
            "classes by their WordNet ids (n01440764), their labels (0 to 999) or these names, or give a list"
        )
    return positions, names


def merge_classes(class_names: Sequence[str], groups: Mapping[str, Sequence[str]]) -> tuple[list[str], list[int]]:
    """Merges classes under new names: the setting `class_groups`.

    The new classes come first, in the order of `groups`; classes that no group names follow, each as it is.

    Args:
        class_names: The classes of the data.
        groups: New class name -> the names of its old classes, upper and lower case alike.

    Returns:
        The new class names, and the new label of each old class.

    Raises:
        DataError: For an empty group, a name that the data do not have or have twice, a class in two groups, and a new
            name that a class outside the group has already.
    """
    known: dict[str, list[int]] = {}
    for label, name in enumerate(class_names):
        known.setdefault(_fold(name), []).append(label)
    group_of: dict[int, str] = {}
    for group, members in groups.items():
        if not members:
            raise DataError(f"class_groups: {group!r} is empty: list the classes that it merges")
        for member in members:
            labels = known.get(_fold(str(member)), [])
            if not labels:
                alike = difflib.get_close_matches(str(member), class_names, n=1)
                hint = f"did you mean {alike[0]!r}?" if alike else f"it has {shorten(class_names)}"
                raise DataError(f"class_groups: {group!r} names {member!r}, a class that the data do not have; {hint}")
            if len(labels) > 1:
                raise DataError(f"class_groups: {len(labels)} classes are called {member!r}: name them apart")
            other = group_of.setdefault(labels[0], group)
            if other != group:
                raise DataError(f"class_groups: {member!r} is in {other!r} and in {group!r}")
    labels, names = [], list(groups)
    for label, name in enumerate(class_names):
        if label in group_of:
            labels.append(names.index(group_of[label]))
            continue
        if _fold(name) in map(_fold, groups):
            raise DataError(f"class_groups: {name!r} is the name of a group and of a class outside it")
        labels.append(len(names))
        names.append(name)
    return names, labels


def describe_classes(num_images: int, class_names: Sequence[str]) -> str:
    """ "60 images of 10 classes: zero, one, ... nine"."""
    plural = "class" if len(class_names) == 1 else "classes"
    return f"{num_images} images of {len(class_names)} {plural}: {shorten(class_names)}"


def _labels_of_numbers(words: Sequence[str], names: Sequence[str], where: str) -> list[int]:
    numbers = [int(word) for word in words]
    if len(set(numbers)) < len(numbers):
        raise DataError(f"{where} has a class number twice, with other zeros in front: {shorten(words)}")
    if max(numbers) < len(names):
        return numbers
    if sorted(numbers) == list(range(1, len(names) + 1)):
        return [number - 1 for number in numbers]
    raise DataError(
        f"{len(names)} class_names were given, but the classes of {where} are the numbers {min(numbers)} to "
        f"{max(numbers)}: give a name for each number from 0 to {max(numbers)}"
    )


def _fold(word: str) -> str:
    return unicodedata.normalize("NFC", word).casefold().strip()


def shorten(names: Sequence[str]) -> str:
    """ "first, second, ... last"."""
    return ", ".join(names) if len(names) < 4 else f"{names[0]}, {names[1]}, ... {names[-1]}"
