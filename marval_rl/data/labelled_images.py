"""Where images with class labels come from: one small interface, and the decoding that all sources share."""

from __future__ import annotations

import io
import struct
import zlib
from abc import ABC, abstractmethod
from pathlib import Path

from PIL import Image

from marval_rl.errors import DataError

# What Pillow's decoders raise on bytes that are no image, or are damaged.
DECODING_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    IndexError,
    EOFError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)


class CorruptImageError(DataError):
    """The bytes of an image were read, but they are no image or are damaged.

    reason: what is wrong with them, without the name of the image.
    """

    def __init__(self, message: str, reason: str = ""):
        super().__init__(message)
        self.reason = reason


class LabelledImages(ABC):
    """Images of any size, each with a class.

    class_names:  the name of each class, in the order of the labels
    class_labels: the label of each image, in 0..len(class_names) - 1; known without decoding any image
    """

    class_names: list[str]
    class_labels: list[int]

    def __len__(self) -> int:
        return len(self.class_labels)

    @abstractmethod
    def name(self, index: int) -> str:
        """What an image is called in messages and caches: its path below the root, or its row."""

    @abstractmethod
    def read(self, index: int) -> Image.Image:
        """The image, in RGB.

        Raises:
            CorruptImageError: If its bytes are no image, or are damaged or cut off.
            DataError: If they cannot be read at all.
        """


def read_bytes(path: Path) -> bytes:
    """The bytes of a file. Raises DataError: a file that cannot be read may be fine, so it is not called corrupt."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error


def decode_image(data: bytes, where: str) -> Image.Image:
    """An encoded image -> RGB. Raises CorruptImageError, which begins with `where`."""
    if not data:
        raise CorruptImageError(f"{where} is no image: it is empty", "it is empty")
    try:
        with Image.open(io.BytesIO(data)) as image:
            return image.convert("RGB")
    except DECODING_ERRORS as error:
        reason = "not an image format that Pillow knows" if "BytesIO" in str(error) else str(error)
        raise CorruptImageError(f"{where} is corrupt: {reason}", reason) from error
