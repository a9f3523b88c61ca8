"""Which images of a cache were repaired or replaced since they were encoded."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from marval_rl.data.decoding import CorruptImageError
from marval_rl.data.image_folder import ImageFolder
from marval_rl.data.labelled_images import LabelledImages, hold_out
from marval_rl.data.moments.files import write_json
from marval_rl.data.moments.fingerprint import hash_content, hash_images
from marval_rl.data.moments.manifest import MANIFEST, digest, number_of_shards, read_sidecar, sidecar_path
from marval_rl.errors import DataError

CHECKED_IMAGES = 10_000  # at the start of training, evenly spaced


@dataclass
class Changes:
    """names: of the changed images. shards: those that hold them. num_images: how many images were compared.
    sidecars: of unchanged shards that have new stamps."""

    names: list[str] = field(default_factory=list)
    shards: list[int] = field(default_factory=list)
    num_images: int = 0
    sidecars: dict[int, dict[str, Any]] = field(default_factory=dict)

    def __str__(self) -> str:
        more = ", ..." if len(self.names) > 5 else ""
        return f"{len(self.names)} images changed since they were cached ({', '.join(self.names[:5])}{more})"


def find_changes(folder: Path, settings: dict[str, Any], source: LabelledImages, shards: Iterable[int]) -> Changes:
    """Compares the images of finished shards with what the sidecars say of them.

    An image is read only where its stamp differs (as in a copied folder), or where it was skipped: it may be readable
    by now. Nothing is written.

    Raises DataError if an image cannot be read.
    """
    changes, expected = Changes(), digest(settings)
    for shard in shards:
        sidecar = read_sidecar(folder, shard, expected)
        if sidecar is None:
            continue
        first = shard * settings["shard_size"]
        skipped = {image["index"] for image in sidecar["skipped"]}
        records, changed = list(sidecar["records"]), []
        for index, record in enumerate(sidecar["records"], start=first):
            stamp, _, content = record.rpartition(" ")
            found = source.stamp(index)
            records[index - first] = f"{found} {content}"
            is_new = found != stamp and _content(source, index) != content
            if is_new or (index in skipped and _is_readable(source, index)):
                changed.append(source.name(index))
        changes.num_images += len(records)
        if changed:
            changes.names += changed
            changes.shards.append(shard)
        elif records != sidecar["records"]:
            changes.sidecars[shard] = {**sidecar, "records": records}
    return changes


def drop_changed_shards(
    folder: Path, settings: dict[str, Any], source: LabelledImages, rank: int = 0, world_size: int = 1
) -> Changes:
    """Marks the shards of changed images to be built again; those of one process.

    Raises DataError where more than half of the images changed: they are others by the same names.
    """
    changes = find_changes(folder, settings, source, range(rank, number_of_shards(settings), world_size))
    if 2 * len(changes.names) > changes.num_images:
        raise DataError(
            f"{changes}, of {changes.num_images}: are these other images by the same names? Delete {folder} to encode "
            "them all again, or choose another folder (--cache_dir ...)"
        )
    for shard, sidecar in changes.sidecars.items():
        write_json(sidecar_path(folder, shard), sidecar)
    for shard in changes.shards:
        (folder / MANIFEST).unlink(missing_ok=True)
        sidecar_path(folder, shard).unlink()
    return changes


def changes_since(folder: Path, manifest: dict[str, Any]) -> str | None:
    """A note on the images that a cache was made from; None if nothing is known to have changed.

    Only a folder of images that is still there is looked at: all names, and the stamps of at most 10,000 images.
    """
    root = manifest.get("source_folder")
    if root is None or not Path(root).is_dir():
        return None
    remedy = f"`marval-rl cache` tells what to do, this run trains on what {folder} holds"
    try:
        source: LabelledImages = ImageFolder(root, class_names=manifest["class_names"])
        if share := manifest.get("source_holdout"):
            source, _ = hold_out(source, share)
        if hash_images(source) != manifest["source_sha256"]:
            return f"images were added, removed or renamed in {root} since they were cached: {remedy}"
        size, expected, records = manifest["shard_size"], digest(manifest), {}
        for index in range(0, len(source), -(-len(source) // CHECKED_IMAGES)):
            if index // size not in records:
                sidecar = read_sidecar(folder, index // size, expected)
                records = {index // size: [] if sidecar is None else sidecar["records"]}
            for record in records[index // size][index % size :][:1]:
                stamp, _, content = record.rpartition(" ")
                if source.stamp(index) != stamp and _content(source, index) != content:
                    return f"{source.where(index)} changed since it was cached: {remedy}"
    except DataError as error:
        return f"the images changed since they were cached ({error}): {remedy}"
    return None


def _content(source: LabelledImages, index: int) -> str:
    try:
        return hash_content(source.encoded(index))
    except CorruptImageError:  # a row without an image
        return ""


def _is_readable(source: LabelledImages, index: int) -> bool:
    try:
        source.read(index)
    except CorruptImageError:
        return False
    return True
