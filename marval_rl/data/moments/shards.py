"""One shard of a cache: decoding, encoding, and writing it down."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save
from torch import Tensor
from torch.utils.data import Dataset

from marval_rl.data.crop import center_crop
from marval_rl.data.datasets import to_pixels
from marval_rl.data.decoding import CorruptImageError, decode_image
from marval_rl.data.labelled_images import LabelledImages
from marval_rl.data.moments.files import remove_leftovers, write_atomically, write_json
from marval_rl.data.moments.fingerprint import hash_content
from marval_rl.data.moments.manifest import digest, shard_path, sidecar_path
from marval_rl.errors import DataError

if TYPE_CHECKING:
    from marval_rl.models.latents import Autoencoder

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Crop:
    """A decoded image, pixels uint8 [3, H, W]; or None, and the reason. record: its stamp and the hash of its bytes."""

    index: int
    pixels: Tensor | None
    reason: str = ""
    record: str = ""


class Crops(Dataset):
    """The crops of all images; corrupt ones say why."""

    def __init__(self, source: LabelledImages, image_size: int):
        self.source = source
        self.image_size = image_size

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Crop:
        record = f"{self.source.stamp(index)} "  # before it is read: a change in between is noticed later
        try:
            data = self.source.encoded(index)
            record += hash_content(data)
            image = decode_image(data, self.source.where(index))
        except CorruptImageError as error:
            return Crop(index, None, error.reason, record)
        return Crop(index, to_pixels(center_crop(image, self.image_size)), record=record)


def encode_crops(
    crops: list[Crop], source: LabelledImages, codec: Autoencoder, settings: dict[str, Any], device: torch.device | str
) -> dict[str, Tensor]:
    """The part of a shard that a batch makes; on the CPU."""
    dtype = DTYPES[settings["dtype"]]
    indices = [crop.index for crop in crops]
    part = {
        "indices": torch.tensor(indices, dtype=torch.int64),
        "class_labels": torch.tensor([source.modes[index] for index in indices], dtype=torch.int64),
    }
    size = settings["image_size"]
    decoded = [crop.pixels for crop in crops if crop.pixels is not None]
    pixels = torch.stack(decoded) if crops else torch.empty(0, 3, size, size)
    images = pixels.to(device).float() / 255
    views = {"moments": images, "moments_flip": images.flip(-1)} if settings["flip"] else {"moments": images}
    for name, view in views.items():
        if not crops:
            part[name] = torch.empty(0, *settings["moments_shape"], dtype=dtype)
            continue
        moments = codec.moments(view).to(dtype).cpu().contiguous()
        finite = moments.flatten(1).isfinite().all(1)
        if not finite.all():
            worst = source.name(indices[int(finite.int().argmin())])
            raise DataError(
                f"the moments of {worst} are not finite as {settings['dtype']}: is the VAE damaged, or do they need "
                "--cache_dtype float32?"
            )
        part[name] = moments
    return part


def write_shard(
    folder: Path,
    shard: int,
    settings: dict[str, Any],
    parts: list[dict[str, Tensor]],
    skipped: list[dict[str, Any]],
    records: list[str],
) -> None:
    """First the shard, then its sidecar: without it the shard does not count. records: of all its images."""
    path, sidecar = shard_path(folder, shard), sidecar_path(folder, shard)
    remove_leftovers(folder, f"{path.stem}.*")
    tensors = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    data = save(tensors)
    write_atomically(path, data)
    content = {
        "file": path.name,
        "images": len(tensors["indices"]),
        "bytes": len(data),
        "sha256": hashlib.sha256(data).hexdigest(),
        "skipped": skipped,
        "records": records,
        "settings": digest(settings),
    }
    write_json(sidecar, content)
