"""Where images with class labels come from: one small interface."""

from __future__ import annotations

from abc import ABC, abstractmethod

from PIL import Image

from marval_rl.data.decoding import decode_image


class LabelledImages(ABC):
    """Images of any size, each with a class.

    class_names:  the name of each class, in the order of the labels
    class_labels: the label of each image, in 0..len(class_names) - 1; known without decoding any image
    folder:       holds the class folders; None for other sources
    """

    folder: str | None = None

    class_names: list[str]
    class_labels: list[int]

    def __len__(self) -> int:
        return len(self.class_labels)

    @abstractmethod
    def name(self, index: int) -> str:
        """What an image is called in messages and caches: its path below the root, or its row."""

    @abstractmethod
    def where(self, index: int) -> str:
        """What an image is called where its data set is not known: its path, or its row of which data set."""

    @abstractmethod
    def stamp(self, index: int) -> str:
        """What changes, at no cost of reading it, when an image is replaced; it may change for other reasons, too.

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
        """The image, in RGB.

        Raises:
            CorruptImageError: If its bytes are not an image, or are damaged or cut off.
            DataError: If they cannot be read at all.
        """
        return decode_image(self.encoded(index), self.where(index))
