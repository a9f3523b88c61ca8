"""A set of generated images: which there are, how each is generated, and where it is kept.

Image i has the class and the noise of its index, and the batches are fixed. So neither the number of processes nor an
interruption changes the set.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from marval_rl.data.crop import center_crop
from marval_rl.data.decoding import CorruptImageError, decode_image, read_bytes
from marval_rl.errors import DataError
from marval_rl.image_size import ImageSize, height_and_width
from marval_rl.models import LatentCodec, MaskedModel, generate
from marval_rl.models.generation import MAX_GRID_ROWS, SamplingSettings, balanced_labels
from marval_rl.models.noise import IndexedNoise

SETTINGS_FILE = "settings.json"
MANY_SHOWN = 100  # images in a sample grid of many classes
IO_THREADS = 8  # Pillow packs and unpacks PNG without Python's lock


@dataclass(frozen=True)
class ImagePlan:
    """Which images there are: as in MAR sorted by class, equally many each (50 of 1000 classes: 50,000).

    Raises ValueError for counts below 1. Labels count from first_class.
    """

    num_images: int
    num_classes: int
    batch_size: int
    first_class: int = 0

    def __post_init__(self) -> None:
        for name in ("num_images", "num_classes", "batch_size"):
            if (value := getattr(self, name)) < 1:
                raise ValueError(f"{name} must be at least 1, not {value}")

    @property
    def num_batches(self) -> int:
        return -(-self.num_images // self.batch_size)

    def share(self, rank: int, world_size: int) -> range:
        """The batches of one of several processes."""
        return range(rank, self.num_batches, world_size)

    def indices(self, batch: int) -> Tensor:
        """The images of a batch, int64 [B]; the last batch may be smaller."""
        start = batch * self.batch_size
        return torch.arange(start, min(start + self.batch_size, self.num_images))

    def labels(self, batch: int) -> Tensor:
        """Their classes, int64 [B]."""
        return self.first_class + balanced_labels(self.num_images, self.num_classes)[self.indices(batch)]

    def shown(self, columns: int) -> Tensor:
        """The images of a sample grid: the first `columns` of each class, or of many classes 100 evenly spaced ones."""
        labels = balanced_labels(self.num_images, self.num_classes)
        if len(labels.unique()) > MAX_GRID_ROWS:
            return torch.linspace(0, self.num_images - 1, min(self.num_images, MANY_SHOWN)).round().long()
        return torch.cat([(labels == label).nonzero()[:columns, 0] for label in labels.unique()])


@dataclass(frozen=True)
class GeneratedBatch:
    """What processes exchange of a batch: the measurements of its images, and those for the sample grid.

    shown uint8 [n, 3, H, W], shown_labels [n].
    """

    number: int
    rows: dict[str, Tensor]
    shown: Tensor
    shown_labels: Tensor


def grid_of(batches: Iterable[GeneratedBatch]) -> tuple[Tensor, Tensor]:
    """Images [n, 3, H, W] in 0..1 and labels [n] of the sample grid."""
    batches = list(batches)
    images = torch.cat([batch.shown for batch in batches]).float() / 255
    return images, torch.cat([batch.shown_labels for batch in batches])


def generate_batch(
    model: MaskedModel, codec: LatentCodec, plan: ImagePlan, batch: int, settings: SamplingSettings, seed: int
) -> Tensor:
    """A batch of the plan as uint8 [B, 3, H, W] on the model's device; the codec works in float32."""
    indices, labels = plan.indices(batch).to(model.device), plan.labels(batch).to(model.device)
    with torch.no_grad():
        output = generate(model, labels, generator=IndexedNoise(seed, indices), **vars(settings))
        return to_pixels(codec.decode(output.latents, model.decoder_text(labels)))


def to_pixels(images: Tensor) -> Tensor:
    """Images [B, 1 or 3, H, W] in 0..1 -> uint8 [B, 3, H, W], rounded half to even as MAR rounds them."""
    return (images.float() * 255).clamp(0, 255).round().to(torch.uint8).expand(-1, 3, -1, -1).contiguous()


def write_rows(file: Path, rows: Mapping[str, Tensor]) -> None:
    """Keeps what was measured of some images; a file is complete or not there at all."""
    unfinished = file.with_suffix(f".{os.getpid()}.tmp")
    save_file({name: values.contiguous() for name, values in rows.items()}, unfinished)
    unfinished.replace(file)


def read_rows(file: Path) -> dict[str, Tensor] | None:
    """What `write_rows` wrote; None if the file is missing or damaged."""
    try:
        return load_file(file)
    except (FileNotFoundError, SafetensorError):
        return None


def image_file(folder: Path, index: int) -> Path:
    return folder / f"{index:06d}.png"


def write_images(folder: Path, indices: Tensor, pixels: Tensor) -> None:
    """Writes uint8 [B, 3, H, W] as PNG; a file is complete or not there at all."""

    def write(index: int, image: np.ndarray) -> None:
        file = image_file(folder, index)
        half = file.with_suffix(".tmp")
        Image.fromarray(image).save(half, format="PNG")
        half.replace(file)

    arrays = pixels.cpu().permute(0, 2, 3, 1).contiguous().numpy()
    with ThreadPoolExecutor(IO_THREADS) as pool:
        list(pool.map(write, indices.tolist(), arrays))


def read_written_images(folder: Path, indices: Tensor) -> Tensor | None:
    """What `write_images` wrote, uint8 [B, 3, H, W]; None if a file is missing or damaged."""
    try:
        return read_images([image_file(folder, index) for index in indices.tolist()])
    except DataError:
        return None


def read_images(files: Iterable[Path], image_size: ImageSize | None = None) -> Tensor:
    """Image files -> uint8 [B, 3, H, W], decoded as for training.

    Args:
        files: The files.
        image_size: Crop images of another size to it, as for training; None takes them as they are.

    Raises:
        DataError: If one is missing or cannot be decoded, or, without image_size, they differ in size.
    """
    files = list(files)
    with ThreadPoolExecutor(IO_THREADS) as pool:
        images = list(pool.map(_read_image, files))
    for file, image in zip(files, images, strict=True):
        if image_size is None and image.size != images[0].size:
            sizes = [
                f"{path} is {found.height} x {found.width}" for path, found in ((files[0], images[0]), (file, image))
            ]
            raise DataError(f"images must be of one size, but {' and '.join(sizes)}: crop and resize them first")
    return stack_images(images, image_size)


def stack_images(images: Iterable[Image.Image], image_size: ImageSize | None = None) -> Tensor:
    """RGB images -> uint8 [B, 3, H, W], cropped to image_size as for training if it is given."""
    if image_size is not None:
        height, width = height_and_width(image_size)
        images = [image if image.size == (width, height) else center_crop(image, image_size) for image in images]
    # Contiguous, as fresh images are: sums over another layout are rounded otherwise.
    return torch.from_numpy(np.stack([np.array(image) for image in images])).permute(0, 3, 1, 2).contiguous()


def _read_image(file: Path) -> Image.Image:
    try:
        return decode_image(read_bytes(file), str(file))
    except CorruptImageError as error:
        raise DataError(f"cannot read the image {file}: {error.reason}") from error


def claim_folder(folder: Path, settings: Mapping[str, Any], what: str, remedy: str) -> None:
    """Marks a new folder with the settings that its content comes from, or checks that an old one has the same.

    Args:
        settings: What JSON can hold.
        what: What the folder holds, for the message.
        remedy: What to do where they differ.

    Raises:
        DataError: If it has other settings, naming them, or if it holds files without saying from what.
    """
    settings = json.loads(json.dumps(settings))  # tuples become lists, as in the file
    file = folder / SETTINGS_FILE
    if file.is_file():
        try:
            found = json.loads(file.read_text())
        except ValueError as error:
            raise DataError(f"{file} is damaged ({error}): {remedy}") from error
        names = [name for name in [*settings, *found] if settings.get(name) != found.get(name)]
        if names:
            differences = "; ".join(
                f"{name} was {found.get(name)!r} and is now {settings.get(name)!r}" for name in dict.fromkeys(names)
            )
            raise DataError(f"{folder} holds {what} of other settings: {differences}. {remedy}")
        return
    if folder.is_dir() and any(folder.iterdir()):
        raise DataError(f"{folder} is not empty and has no {SETTINGS_FILE} that says what it holds: {remedy}")
    folder.mkdir(parents=True, exist_ok=True)
    half = file.with_suffix(".tmp")
    half.write_text(json.dumps(settings, indent=2) + "\n")
    half.replace(file)
