"""A large set of generated images: which there are, how each is painted, and where it is kept.

Image i has the class and the noise of its index, and the batches are fixed. So neither the number of processes nor an
interruption changes the set.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from marval_rl.data.decoding import CorruptImageError, decode_image, read_bytes
from marval_rl.errors import DataError
from marval_rl.models import LatentCodec, MARModel, generate
from marval_rl.models.generation import SamplingSettings, balanced_labels
from marval_rl.models.noise import IndexedNoise

SETTINGS_FILE = "settings.json"
IO_THREADS = 8  # Pillow packs and unpacks PNG without Python's lock


@dataclass(frozen=True)
class ImagePlan:
    """Which images there are: as in MAR sorted by class, equally many each (50 of 1000 classes: 50,000).

    Raises ValueError for counts below 1.
    """

    num_images: int
    num_classes: int
    batch_size: int

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value < 1:
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
        return balanced_labels(self.num_images, self.num_classes)[self.indices(batch)]


def paint(
    model: MARModel, codec: LatentCodec, plan: ImagePlan, batch: int, settings: SamplingSettings, seed: int
) -> Tensor:
    """A batch of the plan as uint8 [B, 3, H, W] on the model's device; the codec works in float32."""
    indices, labels = plan.indices(batch).to(model.device), plan.labels(batch).to(model.device)
    with torch.no_grad():
        output = generate(model, labels, generator=IndexedNoise(seed, indices), **vars(settings))
        return to_pixels(codec.decode(output.latents))


def to_pixels(images: Tensor) -> Tensor:
    """Images [B, 1 or 3, H, W] in 0..1 -> uint8 [B, 3, H, W], rounded half to even as MAR rounds them."""
    return (images.float() * 255).clamp(0, 255).round().to(torch.uint8).expand(-1, 3, -1, -1).contiguous()


def weights_digest(model: MARModel) -> str:
    """SHA-256 of a model's weights: tells whether images were painted by this very model."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def image_file(folder: Path, index: int) -> Path:
    return folder / f"{index:06d}.png"


def write_images(folder: Path, indices: Tensor, pixels: Tensor) -> None:
    """Writes uint8 [B, 3, H, W] as PNG; a file is there whole or not at all."""

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


def read_images(files: Iterable[Path]) -> Tensor:
    """Image files -> uint8 [B, 3, H, W], decoded as for training.

    Raises:
        DataError: If one is missing or cannot be decoded, or they differ in size.
    """
    files = list(files)
    with ThreadPoolExecutor(IO_THREADS) as pool:
        images = list(pool.map(_read_image, files))
    for file, image in zip(files, images, strict=True):
        if image.shape != images[0].shape:
            sizes = [
                f"{path} is {shape[0]} x {shape[1]}"
                for path, shape in zip((files[0], file), (images[0].shape, image.shape), strict=True)
            ]
            raise DataError(f"images must be of one size, but {' and '.join(sizes)}: crop and resize them first")
    # Contiguous, as fresh images are: sums over another layout are rounded otherwise.
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()


def _read_image(file: Path) -> np.ndarray:
    try:
        return np.array(decode_image(read_bytes(file), str(file)))
    except CorruptImageError as error:
        raise DataError(f"cannot read the image {file}: {error.reason}") from error


def claim_folder(folder: Path, settings: Mapping[str, Any], what: str, remedy: str) -> None:
    """Marks a new folder with the settings that its content comes from, or checks that an old one has the same.

    Args:
        settings: What JSON can hold.
        what: What the folder holds, for the message.
        remedy: How to go on where they differ.

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
