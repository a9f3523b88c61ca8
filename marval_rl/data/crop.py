"""The centre crop of ADM (Dhariwal & Nichol 2021, arXiv 2105.05233), which MAR and its evaluation use."""

from __future__ import annotations

from PIL import Image


def center_crop(image: Image.Image, size: int) -> Image.Image:
    """The central square of an image, `size` pixels wide.

    The image is halved by averaging (BOX) while its short side is at least twice `size`, then resized (BICUBIC) until
    its short side is `size`, then cropped; an odd surplus pixel is cut off on the right or at the bottom.
    """
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), resample=Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), resample=Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))
