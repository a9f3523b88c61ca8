"""The centre crop of ADM (Dhariwal & Nichol 2021, arXiv 2105.05233), which MAR and its evaluation use."""

from __future__ import annotations

import PIL
from PIL import Image

from marval_rl.image_size import ImageSize, height_and_width

PILLOW = int(PIL.__version__.partition(".")[0])
LONGEST = 16  # times the short side: beyond it only the central square is resized, as the rest would fill the memory


def center_crop(image: Image.Image, size: ImageSize) -> Image.Image:
    """The central part of an image: a square `size` pixels wide, or of that height and width.

    The image is halved by averaging (BOX) while both sides are at least twice as long as they will be, then resized
    (BICUBIC) until one side fits and the other is not too short, then cropped; an odd surplus pixel is cut off on the
    right or at the bottom.
    An image that would be more than 16 times as long as what is left of it is cropped while it is resized, which may
    round a level differently.
    """
    rows, columns = height_and_width(size)
    while image.width >= 2 * columns and image.height >= 2 * rows:
        image = image.resize((image.width // 2, image.height // 2), resample=Image.Resampling.BOX)
    scale = max(columns / image.width, rows / image.height)
    width, height = round(image.width * scale), round(image.height * scale)
    left, top = (width - columns) // 2, (height - rows) // 2
    if max(width / columns, height / rows) > LONGEST:
        across, down = image.width / width, image.height / height
        box = (left * across, top * down, (left + columns) * across, (top + rows) * down)
        return _resize_part(image, box, columns, rows)
    image = image.resize((width, height), resample=Image.Resampling.BICUBIC)
    return image.crop((left, top, left + columns, top + rows))


def _resize_part(image: Image.Image, box: tuple[float, float, float, float], columns: int, rows: int) -> Image.Image:
    """The part `box` (left, top, right, bottom) of a long image, resized; the rest is never enlarged."""
    reach = 2 * max(1, min(image.width // columns, image.height // rows)) + 4  # of the filter, beyond the part
    x, y = max(0, int(box[0]) - reach), max(0, int(box[1]) - reach)
    part = image.crop((x, y, min(image.width, int(box[2]) + reach), min(image.height, int(box[3]) + reach)))
    left, top, right, bottom = box[0] - x, box[1] - y, box[2] - x, box[3] - y
    # In the order in which Pillow resizes such an image whole, as levels are rounded in between: before its release 13
    # always across first.
    if image.height / rows > image.width / columns >= 1 and PILLOW >= 13:
        part = part.resize((part.width, rows), Image.Resampling.BICUBIC, box=(0, top, part.width, bottom))
        return part.resize((columns, rows), Image.Resampling.BICUBIC, box=(left, 0, right, rows))
    part = part.resize((columns, part.height), Image.Resampling.BICUBIC, box=(left, 0, right, part.height))
    return part.resize((columns, rows), Image.Resampling.BICUBIC, box=(0, top, columns, bottom))
