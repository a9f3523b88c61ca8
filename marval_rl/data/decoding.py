"""The one meaning of an image file, for training, caches, evaluation and `rewards score` alike."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image
from PIL.TiffImagePlugin import TiffImageFile

from marval_rl.errors import DataError

# torchvision's, and GIF.
IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp", ".gif")

# EXIF orientation -> what turns the image upright. ImageOps.exif_transpose writes the metadata again as well, and fails
# where they are damaged.
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class CorruptImageError(DataError):
    """The bytes of an image were read, but they are not an image, are damaged, or cannot be shown in 8 bits.

    reason: what is wrong with them, without the name of the image.
    """

    def __init__(self, message: str, reason: str = ""):
        super().__init__(message)
        self.reason = reason


def read_bytes(path: Path) -> bytes:
    """The bytes of a file. Raises DataError: a file that cannot be read may be fine, so it is not called corrupt."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error


def decode_image(data: bytes, where: str) -> Image.Image:
    """An encoded image -> RGB, 8 bits a channel, upright by its EXIF orientation, on white where it is transparent.

    16 bits a channel are scaled to 8, and so is a float image in 0..1. Of an animation or a file of several pages it is
    the first.

    Args:
        data: The bytes of the file.
        where: What the image is called in messages.

    Raises:
        CorruptImageError: If it cannot be used.
        DataError: If there is not enough memory for it.
    """
    if not data:
        raise CorruptImageError(f"{where} is not an image: it is empty", "it is empty")
    try:
        with Image.open(io.BytesIO(data)) as image:
            image.load()
            if 0 in image.size:
                raise ValueError(f"it has {image.width} x {image.height} pixels")
            rgb = _to_rgb(image)
            turn = UPRIGHT.get(_orientation(image) or 0)
            return rgb if turn is None else rgb.transpose(turn)
    except MemoryError as error:
        raise DataError(f"not enough memory to decode {where}") from error
    except Exception as error:  # a damaged file fails anywhere inside Pillow, in any way
        reason = str(error) or type(error).__name__
        reason = "not an image format that Pillow knows" if "BytesIO" in reason else reason
        raise CorruptImageError(f"{where} is corrupt: {reason}", reason) from error


def _orientation(image: Image.Image) -> int | None:
    """The EXIF orientation of a loaded image; a TIFF has been turned upright by then, and tells none."""
    try:
        return image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # damaged metadata fail in any way, and leave the pixels as they are
        return None


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith(("I", "F")):
        return _from_deep(image).convert("RGB")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), rgba).convert("RGB")
    return image.convert("RGB")


def _from_deep(image: Image.Image) -> Image.Image:
    """Grey levels of more than 8 bits -> 8 bits. Pillow's own conversion clips them to 255, which is white.

    Raises ValueError where the level of white is not known.
    """
    levels = np.asarray(image)
    tags = image.tag_v2 if isinstance(image, TiffImageFile) else None
    low, high = levels.min(), levels.max()
    if image.mode == "F":
        white = 1
    elif image.mode == "I" and image.format not in ("PNG", "PPM"):  # those are 16 bits in a wider array
        raise ValueError("it has 32 bits a pixel, whose white is not known: convert it to 8 or 16 bits")
    else:
        white = 65535 if tags is None else 2 ** tags.get(ExifTags.Base.BitsPerSample, (16,))[0] - 1
    if not (low >= 0 and high <= white):  # also refuses NaN
        raise ValueError(f"its levels lie in {low:g}..{high:g}, not in 0..{white}: convert it to 8 or 16 bits")
    scaled = levels.astype(np.float64) * (255 / white)
    if tags is not None and tags.get(ExifTags.Base.PhotometricInterpretation) == 0:  # white is zero
        scaled = 255 - scaled
    pixels = scaled.round().astype(np.uint8)
    if "transparency" in image.info:
        pixels[levels == image.info["transparency"]] = 255
    return Image.fromarray(pixels)
