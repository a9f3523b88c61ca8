"""Where images with class labels come from: one small interface."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

import torch
from PIL import Image

from marval_rl.data.class_names import merge_classes
from marval_rl.data.decoding import decode_image
from marval_rl.errors import DataError


class Classes:
    """The classes of a data set, and the finer ones inside them.

    A model is conditioned on classes. A *mode* is a class as the data have it: modes and classes are the same unless
    `merge_classes` has merged some, and then tell how evenly the images of a class cover what it holds.

    class_names:   the name of each class, in the order of the labels
    mode_names:    the name of each mode
    class_of_mode: the class that each mode belongs to
    """

    class_names: list[str]
    mode_names: list[str]
    class_of_mode: list[int]

    def set_modes(self, names: Sequence[str]) -> None:
        """Every mode is a class of its own."""
        self.mode_names = list(names)
        self.class_names, self.class_of_mode = list(names), list(range(len(names)))

    def merge_classes(self, groups: Mapping[str, Sequence[str]]) -> None:
        """Merges modes into classes: new class name -> the names of its modes. Raises DataError."""
        self.class_names, self.class_of_mode = merge_classes(self.mode_names, groups)


class LabelledImages(Classes, ABC):
    """Images of any size, each with a mode and so with a class.

    modes:        the mode of each image, in 0..len(mode_names) - 1; known without decoding any image
    class_labels: the class of each image, in 0..len(class_names) - 1
    folder:       holds the class folders; None for other sources
    holdout:      the share of the images that is held out; 0 where all are here
    image_size:   the side of the images, where all are squares of one size; else None

    Args:
        modes: Of each image.
        mode_names: The name of each mode.
    """

    folder: str | None = None
    holdout: float = 0.0
    image_size: int | None = None

    def __init__(self, modes: list[int], mode_names: Sequence[str]):
        self.set_modes(mode_names)
        self.modes = self.class_labels = modes

    def __len__(self) -> int:
        return len(self.modes)

    def merge_classes(self, groups: Mapping[str, Sequence[str]]) -> None:
        super().merge_classes(groups)
        self.class_labels = [self.class_of_mode[mode] for mode in self.modes]

    @abstractmethod
    def name(self, index: int) -> str:
        """What an image is called in messages and caches: its path below the root, or its row."""

    @abstractmethod
    def where(self, index: int) -> str:
        """What an image is called where its data set is not known: its path, or its row of which data set."""

    @abstractmethod
    def stamp(self, index: int) -> str:
        """What changes, without reading the image, when it is replaced; it may change for other reasons, too.

        Raises:
            DataError: If there is no such file any more.
        """

    @abstractmethod
    def encoded(self, index: int) -> bytes:
        """The bytes of an image as they are stored.

        Raises:
            CorruptImageError: If there are none.
            DataError: If they cannot be read at all.
        """

    def read(self, index: int) -> Image.Image:
        """The image, in RGB; or grey of mode F, in 0..1.

        Raises:
            CorruptImageError: If its bytes are not an image, or are damaged or cut off.
            DataError: If they cannot be read at all.
        """
        return decode_image(self.encoded(index), self.where(index))


class SomeImages(LabelledImages):
    """Some images of another source, with the classes that it has at this moment."""

    def __init__(self, source: LabelledImages, indices: Sequence[int], holdout: float = 0.0):
        super().__init__([source.modes[index] for index in indices], source.mode_names)
        self.class_names, self.class_of_mode = source.class_names, source.class_of_mode
        self.class_labels = [source.class_labels[index] for index in indices]
        self.source, self.indices = source, list(indices)
        self.folder, self.holdout, self.image_size = source.folder, holdout, source.image_size

    def name(self, index: int) -> str:
        return self.source.name(self.indices[index])

    def where(self, index: int) -> str:
        return self.source.where(self.indices[index])

    def stamp(self, index: int) -> str:
        return self.source.stamp(self.indices[index])

    def encoded(self, index: int) -> bytes:
        return self.source.encoded(self.indices[index])

    def read(self, index: int) -> Image.Image:
        return self.source.read(self.indices[index])


def fixed_choice(count: int, at_most: int) -> list[int]:
    """Ascending indices of `count` images: all, or a random choice of `at_most` of more that is always the same."""
    if count <= at_most:
        return list(range(count))
    return torch.randperm(count, generator=torch.Generator().manual_seed(0))[:at_most].sort().values.tolist()


def hold_out(source: LabelledImages, share: float) -> tuple[SomeImages, SomeImages]:
    """Splits the images into those to train on and those that are held out, by nothing but their names.

    Of each mode the same share is held out, rounded, but at most all images but one.

    Raises:
        DataError: If no image would be held out.
    """
    ranked: dict[int, list[tuple[bytes, int]]] = {}
    for index, mode in enumerate(source.modes):
        rank = hashlib.sha256(source.name(index).encode("utf-8", "surrogateescape")).digest()
        ranked.setdefault(mode, []).append((rank, index))
    held_out = []
    for images in ranked.values():
        count = min(round(share * len(images)), len(images) - 1)
        held_out += [index for _, index in sorted(images)[:count]]
    if not held_out:
        most = max(len(images) for images in ranked.values())
        raise DataError(f"eval_holdout {share} of the images of each class, at most {most}, holds out none: raise it")
    chosen = set(held_out)
    rest = [index for index in range(len(source)) if index not in chosen]
    return SomeImages(source, rest, share), SomeImages(source, sorted(chosen))
