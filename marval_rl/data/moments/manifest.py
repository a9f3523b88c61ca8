"""What a cache of moments consists of, when it is finished, and whether its bytes are still those that were written.

cache.json             the settings of the cache: what was encoded, by which VAE, how it is stored
shard-00000.safetensors  moments [n, 2c, h, w], moments_flip (likewise), class_labels [n], indices [n] in the source
shard-00000.json       written after its shard: size, SHA-256, the images that were skipped and why, and of every image
                       its stamp (size and time of the file) and the hash of its bytes
manifest.json          written last: all shards, and how many images each class has
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from marval_rl.data.moments.files import read_json, remove_leftovers, write_json
from marval_rl.errors import DataError

FORMAT = 2  # 1: images as Pillow converts them, and nothing recorded of their content
READABLE_FORMATS = (1, 2)
SETTINGS = "cache.json"
MANIFEST = "manifest.json"

# The settings that decide what a cache holds, as an error message calls them.
DECISIVE = {
    "format": "format",
    "class_names": "class_names",
    "source_images": "the number of images",
    "source_sha256": "the images (names or labels)",
    "image_size": "image_size",
    "vae_sha256": "the weights of the VAE",
    "scale": "the latent scale of the VAE",
    "moments_shape": "the shape of the moments",
    "dtype": "cache_dtype",
    "shard_size": "shard_size",
    "flip": "flip",
}


def shard_path(folder: Path, shard: int) -> Path:
    return folder / f"shard-{shard:05d}.safetensors"


def sidecar_path(folder: Path, shard: int) -> Path:
    return shard_path(folder, shard).with_suffix(".json")


def number_of_shards(settings: dict[str, Any]) -> int:
    return -(-settings["source_images"] // settings["shard_size"])


def digest(settings: dict[str, Any]) -> str:
    """Identifies the decisive settings; each sidecar repeats it."""
    decisive = {name: settings[name] for name in DECISIVE}
    return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()


def check_settings(folder: Path, settings: dict[str, Any]) -> None:
    """Raises DataError if a cache was begun here with other settings; says which and what to do."""
    begun = read_json(folder / SETTINGS)
    if begun is None:
        return
    for name, meaning in DECISIVE.items():
        if begun.get(name) != settings[name]:
            raise DataError(
                f"{folder} was begun with another setting: {meaning} was {_short(begun.get(name))} and is now "
                f"{_short(settings[name])}; set it back, delete {folder} to encode all images again, or choose another "
                "folder (--cache_dir ...)"
            )


def begin(folder: Path, settings: dict[str, Any]) -> None:
    """Make the folder and write down the settings, or check those that are there. Raises DataError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"cannot make the folder {folder}: {error.strerror}") from error
    if read_json(folder / SETTINGS) is None:
        write_json(folder / SETTINGS, settings)
    check_settings(folder, settings)


def read_sidecar(folder: Path, shard: int, settings_digest: str) -> dict[str, Any] | None:
    """The sidecar of a shard that is complete, by its size; None if the shard must be built."""
    sidecar = read_json(sidecar_path(folder, shard))
    if sidecar is None or sidecar.get("settings") != settings_digest:
        return None
    path = shard_path(folder, shard)
    if not path.is_file() or path.stat().st_size != sidecar["bytes"]:
        return None
    return sidecar


def missing_shards(folder: Path, settings: dict[str, Any]) -> list[int]:
    """The shards that are missing, incomplete, or of other settings."""
    expected = digest(settings)
    return [shard for shard in range(number_of_shards(settings)) if read_sidecar(folder, shard, expected) is None]


def write_manifest(folder: Path, settings: dict[str, Any], class_labels: list[int]) -> dict[str, Any] | None:
    """Write manifest.json if all shards are there, and return it; None if some are missing. Raises DataError."""
    expected = digest(settings)
    sidecars = []
    for shard in range(number_of_shards(settings)):
        sidecar = read_sidecar(folder, shard, expected)
        if sidecar is None:
            return None
        sidecars.append(sidecar)
    skipped = [image for sidecar in sidecars for image in sidecar["skipped"]]
    class_counts = [0] * len(settings["class_names"])
    for label in class_labels:
        class_counts[label] += 1
    for image in skipped:
        class_counts[class_labels[image["index"]]] -= 1
    manifest = {
        **settings,
        "images": sum(sidecar["images"] for sidecar in sidecars),
        "bytes": sum(sidecar["bytes"] for sidecar in sidecars),
        "class_counts": class_counts,
        "skipped": skipped,
        "shards": [{name: sidecar[name] for name in ("file", "images", "bytes", "sha256")} for sidecar in sidecars],
    }
    write_json(folder / MANIFEST, manifest)
    remove_leftovers(folder, SETTINGS)
    return manifest


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a finished cache. Raises DataError if there is none, or shards are missing or cut off."""
    if not folder.is_dir():
        raise DataError(f"no cache at {folder}: the folder does not exist (`marval-rl cache RECIPE` makes it)")
    manifest = read_json(folder / MANIFEST)
    if manifest is None:
        settings = _read_settings(folder)
        total = number_of_shards(settings)
        done = total - len(missing_shards(folder, settings))
        raise DataError(f"the cache {folder} is unfinished: {done} of {total} shards; run `marval-rl cache` again")
    _check_format(folder / MANIFEST, manifest)
    for shard in manifest["shards"]:
        path = folder / shard["file"]
        size = path.stat().st_size if path.is_file() else 0
        if size != shard["bytes"]:
            raise DataError(
                f"{path} has {size} of its {shard['bytes']} bytes: run `marval-rl cache` again, it rebuilds this shard"
            )
    return manifest


def verify(folder: Path) -> list[str]:
    """Hash all shards again; returns a line for each that is missing or differs, and marks it to be rebuilt.

    A bad shard loses its sidecar, and the cache its manifest, so that nothing reads it before `marval-rl cache` has
    run again. Raises DataError if there is no cache.
    """
    settings = _read_settings(folder)
    expected = digest(settings)
    bad = []
    for shard in range(number_of_shards(settings)):
        path = shard_path(folder, shard)
        sidecar = read_sidecar(folder, shard, expected)
        if sidecar is None:
            bad.append(f"{path.name}: missing, cut off or unfinished")
        elif _sha256(path) != sidecar["sha256"]:
            bad.append(f"{path.name}: its bytes are not those that were written")
        else:
            continue
        (folder / MANIFEST).unlink(missing_ok=True)
        sidecar_path(folder, shard).unlink(missing_ok=True)
    return bad


def _read_settings(folder: Path) -> dict[str, Any]:
    settings = read_json(folder / SETTINGS)
    if settings is None:
        raise DataError(
            f"{folder} holds no cache: {SETTINGS} is missing or damaged (`marval-rl cache RECIPE` makes one)"
        )
    _check_format(folder / SETTINGS, settings)
    return settings


def _check_format(path: Path, content: dict[str, Any]) -> None:
    if content.get("format") not in READABLE_FORMATS:
        raise DataError(f"{path} has the format {content.get('format')}, this version reads {READABLE_FORMATS}")


def _sha256(path: Path) -> str:
    try:
        with open(path, "rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 24 else f"{text[:16]}..."
