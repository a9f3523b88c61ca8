"""The names of the classes, as the user gives them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from marval_rl.data.imagenet import IMAGENET_CLASS_NAMES
from marval_rl.errors import DataError

IMAGENET = "imagenet"


def read_class_names(given: Sequence[str] | str) -> list[str]:
    """Class names in the order of the labels: a list, "imagenet", or the path of a text file with one name a line.

    Raises DataError for a file that cannot be read or that has an empty line between names.
    """
    if not isinstance(given, str):
        return list(given)
    if given == IMAGENET:
        return list(IMAGENET_CLASS_NAMES)
    try:
        names = [line.strip() for line in Path(given).read_text(encoding="utf-8").rstrip().splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"cannot read the class names {given}: {error}; give a list, {IMAGENET!r}, "
            "or a text file with one name a line"
        ) from error
    if not all(names):
        raise DataError(f"line {names.index('') + 1} of the class names {given} is empty: each line names one class")
    return names


def check_number(names: Sequence[str], num_classes: int, where: str) -> None:
    """Raises DataError unless there is one name a class."""
    if len(names) != num_classes:
        raise DataError(f"{len(names)} class_names were given, but {where} has {num_classes} classes")
