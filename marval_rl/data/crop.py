"""The centre crop of ADM (Dhariwal & Nichol 2021, arXiv 2105.05233), which MAR and its evaluation use."""

from __future__ import annotations

import PIL
from PIL import Image

PILLOW = int(PIL.__version__.partition(".")[0])
LONGEST = 16  # times the short side: beyond it only the central square is resized, as the rest would fill the memory


def center_crop(image: Image.Image, size: int) -> Image.Image:
    """The central square of an image, `size` pixels wide.

    The image is halved by averaging (BOX) while its short side is at least twice `size`, then resized (BICUBIC) until
    its short side is `size`, then cropped; an odd surplus pixel is cut off on the right or at the bottom.
    An image whose long side is more than 16 times the short one is cropped while it is resized, which may round a level
    differently.
    """
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), resample=Image.Resampling.BOX)
    scale = size / min(image.size)
    width, height = round(image.width * scale), round(image.height * scale)
    left, top = (width - size) // 2, (height - size) // 2
    if max(image.size) > LONGEST * min(image.size):
        across, down = image.width / width, image.height / height
        return _resize_part(image, (left * across, top * down, (left + size) * across, (top + size) * down), size)
    image = image.resize((width, height), resample=Image.Resampling.BICUBIC)
    return image.crop((left, top, left + size, top + size))


def _resize_part(image: Image.Image, box: tuple[float, float, float, float], size: int) -> Image.Image:
    """The square `box` (left, top, right, bottom) of a long image, resized; the rest is never enlarged."""
    reach = 2 * max(1, min(image.size) // size) + 4  # of the filter, beyond the square
    x, y = max(0, int(box[0]) - reach), max(0, int(box[1]) - reach)
    part = image.crop((x, y, min(image.width, int(box[2]) + reach), min(image.height, int(box[3]) + reach)))
    left, top, right, bottom = box[0] - x, box[1] - y, box[2] - x, box[3] - y
    # In the order in which Pillow resizes such an image whole, as levels are rounded in between: before its release 13
    # always across first.
    if image.height > image.width >= size and PILLOW >= 13:
        part = part.resize((part.width, size), Image.Resampling.BICUBIC, box=(0, top, part.width, bottom))
        return part.resize((size, size), Image.Resampling.BICUBIC, box=(left, 0, right, size))
    part = part.resize((size, part.height), Image.Resampling.BICUBIC, box=(left, 0, right, part.height))
    return part.resize((size, size), Image.Resampling.BICUBIC, box=(0, top, size, bottom))
