"""Encodes images by a VAE, shard by shard, so that any process may be killed at any time."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from marval_rl.data.labelled_images import LabelledImages
from marval_rl.data.moments.changes import Changes, drop_changed_shards
from marval_rl.data.moments.files import remove_leftovers
from marval_rl.data.moments.fingerprint import hash_images, hash_weights
from marval_rl.data.moments.manifest import FORMAT, MANIFEST, begin, missing_shards, write_manifest
from marval_rl.data.moments.shards import Crops, encode_crops, write_shard
from marval_rl.models.latents import Autoencoder


@dataclass(frozen=True)
class CacheProgress:
    """How far one process is; told after each batch.

    shards_done, shards_total: shards of this process, without those that it found finished
    images_per_second:         since it began
    skipped:                   the images skipped in this batch: index, name, reason
    num_skipped:               images it has skipped so far
    """

    shards_done: int
    shards_total: int
    images_per_second: float
    skipped: list[dict[str, Any]]
    num_skipped: int


@dataclass(frozen=True)
class CacheJob:
    """What is encoded, where to, and how it is stored.

    Attributes:
        source: The images.
        codec: The VAE.
        image_size: Pixels along one side after the centre crop.
        folder: Of the cache; made if needed.
        vae_name: Recorded for readers; a VAE of the same weights may go by another name when the cache is resumed.
        dtype: Of the stored moments, a key of `shards.DTYPES`.
        shard_size: Images per shard; the corrupt ones among them leave it smaller.
        flip: Store the moments of the flipped images too.
    """

    source: LabelledImages
    codec: Autoencoder
    image_size: int
    folder: Path
    vae_name: str
    dtype: str = "float32"
    shard_size: int = 1024
    flip: bool = True

    def settings(self) -> dict[str, Any]:
        """What cache.json records; the codec is asked for one image.

        Raises ValueError for an image size that does not suit the VAE.
        """
        source, codec, size = self.source, self.codec, self.image_size
        if size < 1 or size % codec.stride:
            raise ValueError(f"image_size {size} is not a multiple of the VAE's stride {codec.stride}")
        probe = torch.zeros(1, 3, size, size, device=codec.network.device)
        return {
            "format": FORMAT,
            "source_sha256": hash_images(source),
            "source_images": len(source),
            "source_folder": source.folder,
            "source_holdout": source.holdout,
            "class_names": source.mode_names,
            "image_size": size,
            "vae": self.vae_name,
            "vae_sha256": hash_weights(codec.network),
            "scale": codec.scale,
            "moments_shape": list(codec.moments(probe).shape[1:]),
            "dtype": self.dtype,
            "shard_size": self.shard_size,
            "flip": self.flip,
        }


def build_cache(
    job: CacheJob,
    *,
    batch_size: int = 32,
    num_workers: int = 0,
    device: torch.device | str = "cpu",
    rank: int = 0,
    world_size: int = 1,
    progress: Callable[[CacheProgress], None] | None = None,
    report_changes: Callable[[Changes], None] | None = None,
) -> dict[str, Any] | None:
    """Encode what is not there yet of this process's shards: shard s belongs to process s mod world_size.

    Processes do not talk to each other, and write the same bytes whenever they are started. Corrupt images are skipped,
    and listed with their reasons in the shard's sidecar and in the manifest.

    Args:
        job: The images, the VAE, and the folder.
        batch_size: Images the VAE encodes at once.
        num_workers: Processes that decode images; 0 decodes in this one.
        device: Where the VAE is moved to, and runs.
        rank, world_size: This process among those that fill the cache.
        progress: Told how far it is after each batch.
        report_changes: Told which of this process's images changed since they were encoded; they are encoded again.

    Returns:
        The manifest, which the process that finds all shards complete has written; None while others are at work.

    Raises:
        DataError: If the folder was begun with other settings, an image cannot be read at all, the disk is full, or
            moments are not finite as `dtype`.
        ValueError: For settings that make no sense.
    """
    source, codec, folder = job.source, job.codec.to(device), job.folder
    settings = job.settings()
    begin(folder, settings)
    changes = drop_changed_shards(folder, settings, source, rank, world_size)
    if report_changes is not None:
        report_changes(changes)
    missing = missing_shards(folder, settings)
    if missing:
        (folder / MANIFEST).unlink(missing_ok=True)
        remove_leftovers(folder, MANIFEST)
    mine = [shard for shard in missing if shard % world_size == rank]
    batches = {shard: _batches(shard, settings, batch_size) for shard in mine}
    loader = DataLoader(
        Crops(source, job.image_size),
        batch_sampler=[batch for shard in mine for batch in batches[shard]],
        num_workers=num_workers,
        collate_fn=list,
    )
    decoded = iter(loader)
    start, num_images, num_skipped = time.perf_counter(), 0, 0
    for shards_done, shard in enumerate(mine):
        parts, skipped, records = [], [], []
        for _ in batches[shard]:
            crops = next(decoded)
            good = [crop for crop in crops if crop.pixels is not None]
            bad = [
                {"index": crop.index, "name": source.name(crop.index), "reason": crop.reason}
                for crop in crops
                if crop.pixels is None
            ]
            parts.append(encode_crops(good, source, codec, settings, device))
            skipped += bad
            records += [crop.record for crop in crops]
            num_images += len(good)
            num_skipped += len(bad)
            if progress is not None:
                speed = num_images / (time.perf_counter() - start)
                progress(CacheProgress(shards_done, len(mine), speed, bad, num_skipped))
        write_shard(folder, shard, settings, parts, skipped, records)
    return write_manifest(folder, settings, source.modes)


def _batches(shard: int, settings: dict[str, Any], batch_size: int) -> list[list[int]]:
    """The images of a shard. Batches end where shards do, so that a shard's bytes do not depend on what came before."""
    start = shard * settings["shard_size"]
    stop = min(start + settings["shard_size"], settings["source_images"])
    return [list(range(i, min(i + batch_size, stop))) for i in range(start, stop, batch_size)]
