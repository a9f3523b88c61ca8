"""Images cropped, flipped and turned into tensors: what a model of pixels, or a VAE at every step, trains on."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from marval_rl.data.crop import center_crop
from marval_rl.data.decoding import CorruptImageError
from marval_rl.data.flips import FlippingDataset
from marval_rl.data.labelled_images import LabelledImages
from marval_rl.errors import DataError

GREY_SAMPLE = 64  # images that are looked at to tell whether a data set is grey


class CroppedImages(FlippingDataset):
    """Items {"images": float32 [channels, image_size, image_size] in 0..1, "class_labels": int}.

    Args:
        source: The images.
        image_size: Pixels along one side after ADM's centre crop.
        flip: Flip half of the images horizontally, others in each epoch.
        seed: Of the flips.
        channels: 3 for RGB, 1 to turn all images grey.
        refuse_colour: With channels 1: refuse an image in colour in place of turning it grey.

    Raises (on reading an item):
        DataError: If the image is corrupt or in colour; it names the image and the remedy.
    """

    def __init__(
        self,
        source: LabelledImages,
        image_size: int,
        flip: bool = True,
        seed: int = 0,
        channels: int = 3,
        refuse_colour: bool = False,
    ):
        super().__init__(flip, seed)
        self.source = source
        self.image_size = image_size
        self.channels = channels
        self.refuse_colour = refuse_colour
        self.class_names = source.class_names

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> dict[str, Tensor | int]:
        try:
            image = self.source.read(index)
        except CorruptImageError as error:
            raise DataError(
                f"{error}: delete it, or train from `marval-rl cache`, which skips and lists such images"
            ) from error
        image = center_crop(image, self.image_size)
        if self.channels == 1:
            if self.refuse_colour and not is_grey(image):
                raise DataError(
                    f"{self.source.where(index)} is in colour, but the model generates grey images: set "
                    "--image_channels 1 to turn all images grey, or 3 to train a model of colours"
                )
            image = image.convert("L")
        pixels = to_pixels(image).float() / 255
        if self.is_flipped(index):
            pixels = pixels.flip(-1)
        return {"images": pixels, "class_labels": self.source.class_labels[index]}

    def looks_grey(self) -> bool:
        """Whether a sample of the images, at most 64 and evenly spaced, are all grey; corrupt ones are passed over."""
        seen = []
        for index in range(0, len(self), -(-len(self) // GREY_SAMPLE)):
            try:
                seen.append(is_grey(self.source.read(index)))
            except CorruptImageError:
                continue
        return bool(seen) and all(seen)


def is_grey(image: Image.Image) -> bool:
    """Whether the channels of an RGB image are equal."""
    pixels = np.asarray(image)
    return bool((pixels == pixels[..., :1]).all())


def to_pixels(image: Image.Image) -> Tensor:
    """An RGB or grey image -> uint8 [3 or 1, H, W]."""
    return torch.from_numpy(np.atleast_3d(np.array(image))).permute(2, 0, 1).contiguous()
