"""Images as tensors: what a model of pixels, or a VAE at every step, trains on, and what evaluation compares with."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from marval_rl.data.bundled import find_groups
from marval_rl.data.crop import center_crop
from marval_rl.data.decoding import CorruptImageError
from marval_rl.data.labelled_images import Classes, LabelledImages
from marval_rl.data.sources import load_labelled_images
from marval_rl.errors import DataError
from marval_rl.image_size import ImageSize

GREY_SAMPLE = 64  # images that are looked at to tell whether a data set is grey


class FlippingDataset(Classes, Dataset):
    """Base of the data sets that flip each image horizontally with probability 1/2, drawn again in each epoch.

    The flips depend on nothing but (seed, epoch, index), so that a resumed run sees the same ones.

    Args:
        flip: False to flip none.
        seed: Of the flips.
    """

    def __init__(self, flip: bool, seed: int):
        self.flip = flip
        self.seed = seed
        # In shared memory: workers that live on from epoch to epoch see the change.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def set_epoch(self, epoch: int) -> None:
        """Call it before an epoch begins, with workers or without."""
        self._epoch.fill_(epoch)

    def is_flipped(self, index: int) -> bool:
        """Whether this image is flipped in this epoch."""
        if not self.flip:
            return False
        return bool(hashlib.sha256(f"flip:{self.seed}:{int(self._epoch)}:{index}".encode()).digest()[0] & 1)


class CroppedImages(FlippingDataset):
    """Items {"images": float32 [channels, H, W] in 0..1, "class_labels": int}.

    Args:
        source: The images; their classes are those of the data set, `modes` and `class_labels` too.
        image_size: Pixels along one side after ADM's centre crop, or height and width.
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
        image_size: ImageSize,
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
        self.class_names, self.class_of_mode = source.class_names, source.class_of_mode
        self.mode_names, self.modes, self.class_labels = source.mode_names, source.modes, source.class_labels

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> dict[str, Any]:
        try:
            image = self.source.read(index)
        except CorruptImageError as error:
            raise DataError(
                f"{error}: delete it, or train from `marval-rl cache`, which skips and lists such images"
            ) from error
        image = center_crop(image, self.image_size)
        if self.channels == 1 and image.mode == "RGB":
            if self.refuse_colour and not is_grey(image):
                raise DataError(
                    f"{self.source.where(index)} is in colour, but the model generates grey images: set "
                    "--image_channels 1 to turn all images grey, or 3 to train a model of colours"
                )
            image = image.convert("L")
        pixels = to_pixels(image)
        pixels = pixels.float() / 255 if image.mode != "F" else pixels.clamp(0, 1).expand(self.channels, -1, -1)
        if self.is_flipped(index):
            pixels = pixels.flip(-1)
        return {"images": pixels, "class_labels": self.class_labels[index]}

    def unflipped(self) -> CroppedImages:
        """The same images, never mirrored."""
        return CroppedImages(self.source, self.image_size, False, self.seed, self.channels, self.refuse_colour)

    def identity(self) -> str:
        """Changes with the images, without reading them: which files or rows, of which state, how they are cropped."""
        digest = hashlib.sha256(f"{self.image_size} {self.channels}\n".encode())
        for index in range(len(self)):
            described = f"{self.source.where(index)}\0{self.source.stamp(index)}\n"
            digest.update(described.encode("utf-8", "surrogateescape"))
        return digest.hexdigest()

    def looks_grey(self) -> bool:
        """Whether a sample of the images, at most 64 and evenly spaced, are all grey; corrupt ones are passed over."""
        seen = []
        for index in range(0, len(self), -(-len(self) // GREY_SAMPLE)):
            try:
                seen.append(is_grey(self.source.read(index)))
            except CorruptImageError:
                continue
        return bool(seen) and all(seen)

    def in_memory(self) -> ImageDataset:
        """All images decoded at once, as they are in this epoch."""
        images = torch.stack([self[index]["images"] for index in range(len(self))])
        labels, modes = torch.tensor(self.class_labels), torch.tensor(self.modes)
        return ImageDataset(images, labels, self.class_names, modes, len(self.mode_names))


class ImageDataset(Dataset):
    """Images in memory, each with a class and with a mode (a finer class inside it, for measuring coverage).

    images:       float32 [N, C, H, W] in 0..1
    class_labels: int64 [N] in 0..len(class_names) - 1
    class_names:  the name of each class, in the order of the labels
    modes:        int64 [N] in 0..num_modes - 1

    Raises ValueError where lengths, ranges or shapes do not fit.
    """

    def __init__(
        self,
        images: Tensor,
        class_labels: Tensor,
        class_names: Sequence[str],
        modes: Tensor,
        num_modes: int,
    ) -> None:
        if images.ndim != 4:
            raise ValueError(f"images must have the shape [N, C, H, W], not {list(images.shape)}")
        for name, values, limit in (("class_labels", class_labels, len(class_names)), ("modes", modes, num_modes)):
            if values.shape != images.shape[:1]:
                raise ValueError(f"{name} has the shape {list(values.shape)}, but there are {len(images)} images")
            if len(values) and not 0 <= int(values.min()) <= int(values.max()) < limit:
                found = f"{int(values.min())}..{int(values.max())}"
                raise ValueError(f"{name} must lie in 0..{limit - 1}, but they lie in {found}")
        self.images = images
        self.class_labels = class_labels
        self.class_names = list(class_names)
        self.modes = modes
        self.num_modes = num_modes

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"images": self.images[index], "class_labels": self.class_labels[index]}


def load_cropped_images(
    name_or_path: str | Path,
    split: str = "train",
    class_groups: Mapping[str, Sequence[str]] | str | None = None,
    image_size: ImageSize | None = None,
    channels: int | None = None,
) -> CroppedImages:
    """Labelled images, their classes merged, cropped as they are trained on and never mirrored.

    Args:
        name_or_path, split: Of `load_labelled_images`.
        class_groups: New class name -> the names of the classes that it merges; or the name of such groups that a
            bundled set brings.
        image_size: Pixels along one side, or height and width; None for the short side of the first image.
        channels: 3 for RGB, 1 for grey; None for those of the first image.

    Raises:
        DataError: If there are no such images, or one is corrupt.
    """
    source = load_labelled_images(name_or_path, split)
    if class_groups:
        source.merge_classes(find_groups(name_or_path, class_groups))
    first = source.read(0)
    channels = channels or (1 if is_grey(first) else 3)
    return CroppedImages(source, image_size or min(first.size), flip=False, channels=channels)


def load_image_dataset(name_or_path: str | Path, *args: Any, **kwargs: Any) -> ImageDataset:
    """A whole data set in memory; all arguments are those of `load_cropped_images`."""
    return load_cropped_images(name_or_path, *args, **kwargs).in_memory()


def is_grey(image: Image.Image) -> bool:
    """Whether an image is grey, or the channels of an RGB image are equal."""
    pixels = np.atleast_3d(np.asarray(image))
    return bool((pixels == pixels[..., :1]).all())


def to_pixels(image: Image.Image) -> Tensor:
    """An RGB or grey image -> [3 or 1, H, W]: uint8, but float32 of mode F."""
    return torch.from_numpy(np.atleast_3d(np.array(image))).permute(2, 0, 1).contiguous()
