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


class CroppedImages(FlippingDataset):
    """Items {"images": float32 [3, image_size, image_size] in 0..1, "class_labels": int}.

    Args:
        source: The images.
        image_size: Pixels along one side after ADM's centre crop.
        flip: Flip half of the images horizontally, others in each epoch.
        seed: Of the flips.

    Raises (on reading an item):
        DataError: If the image is corrupt; it names the image and the remedy.
    """

    def __init__(self, source: LabelledImages, image_size: int, flip: bool = True, seed: int = 0):
        super().__init__(flip, seed)
        self.source = source
        self.image_size = image_size
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
        pixels = to_pixels(center_crop(image, self.image_size)).float() / 255
        if self.is_flipped(index):
            pixels = pixels.flip(-1)
        return {"images": pixels, "class_labels": self.source.class_labels[index]}


def to_pixels(image: Image.Image) -> Tensor:
    """An RGB image -> uint8 [3, H, W]."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()
