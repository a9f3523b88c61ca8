"""The real images that generated ones are compared with: a data set's, a folder of them, or stored statistics."""

from __future__ import annotations

import codecs
import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from marval_rl.data import CroppedImages, LabelledImages, fixed_choice
from marval_rl.data.class_folders import is_ignored
from marval_rl.data.decoding import IMAGE_ENDINGS
from marval_rl.data.labelled_images import SomeImages
from marval_rl.errors import DataError, first_line
from marval_rl.evaluation.image_set import read_images, read_rows, stack_images, to_pixels, write_rows
from marval_rl.evaluation.measures import Gaussian
from marval_rl.image_size import ImageSize

Rows = dict[str, Tensor]  # what was measured of N images, [N, ...] each, on the CPU

BATCH_SIZE = 50  # real images in memory at once
ROWS_FORMAT = 1  # raise it when what is measured of the same image changes
FORMATS = "a folder of images, an .npz with mu and sigma (such as ADM's adm_in256_stats.npz), or torch-fidelity's .pt"


@dataclass(frozen=True)
class RealImages:
    """Real images of one size, read a batch at a time.

    Attributes:
        read: Indices -> uint8 [B, 3, H, W].
        count: How many there are.
        identity: Changes with the images.
        class_labels: int64 [count], the class that each shows; None where it is unknown.
        modes: int64 [count], the finer class inside it.
    """

    read: Callable[[Sequence[int]], Tensor]
    count: int
    identity: str
    class_labels: Tensor | None = None
    modes: Tensor | None = None

    def __len__(self) -> int:
        return self.count


@dataclass(frozen=True)
class Reference:
    """Stored statistics of the first feature extractor, single images, or both; `path` is where they come from."""

    gaussian: Gaussian | None = None
    images: RealImages | None = None
    path: str | None = None


def images_of_files(files: Sequence[Path], image_size: ImageSize | None = None) -> RealImages:
    """Image files, cropped to `image_size` as training images are where they have another size.

    None takes them as they are: they must be of one size.
    """
    digest = hashlib.sha256(f"{image_size}\n".encode())
    for file in files:
        status = file.stat()
        digest.update(f"{file.resolve()}\0{status.st_size}\0{status.st_mtime_ns}\n".encode("utf-8", "surrogateescape"))

    def read(indices: Sequence[int]) -> Tensor:
        return read_images([files[i] for i in indices], image_size)

    return RealImages(read, len(files), digest.hexdigest())


def images_of_array(array: np.ndarray, image_size: ImageSize | None = None) -> RealImages:
    """An array uint8 [N, H, W, 3], cropped as `images_of_files` does."""
    digest = hashlib.sha256(f"{image_size}\n".encode() + np.ascontiguousarray(array).tobytes()).hexdigest()

    def read(indices: Sequence[int]) -> Tensor:
        return stack_images([Image.fromarray(array[i]) for i in indices], image_size)

    return RealImages(read, len(array), digest)


def images_of_data(source: LabelledImages, image_size: ImageSize, channels: int, max_images: int) -> RealImages:
    """Images of a data set as a model trains on them, never mirrored; a fixed random choice of `max_images` of more."""
    chosen = SomeImages(source, fixed_choice(len(source), max_images))
    cropped = CroppedImages(chosen, image_size, flip=False, channels=channels)

    def read(indices: Sequence[int]) -> Tensor:
        return to_pixels(torch.stack([cropped[index]["images"] for index in indices]))

    labels, modes = torch.tensor(chosen.class_labels), torch.tensor(chosen.modes)
    return RealImages(read, len(chosen), cropped.identity(), labels, modes)


def measure_real(
    images: RealImages,
    parts: Mapping[str, Callable[[Tensor], Rows]],
    identities: Mapping[str, str],
    device: torch.device | str,
) -> Rows:
    """Measures real images, a batch at a time, or reads what was measured of the same images before.

    It is kept in the folder references of $MARVAL_RL_CACHE or ~/.cache/marval_rl.

    Args:
        images: The images.
        parts: Name -> what measures images [B, 3, H, W] in 0..1; each part is kept by itself.
        identities: Name of a part -> what changes when it measures otherwise.
        device: Where images are measured.
    """
    cache = Path(os.environ.get("MARVAL_RL_CACHE") or "~/.cache/marval_rl").expanduser() / "references"
    keys = {name: f"{ROWS_FORMAT} {images.identity} {name} {identities.get(name)}" for name in parts}
    files = {name: cache / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.safetensors" for name, key in keys.items()}
    found = {name: rows for name, file in files.items() if (rows := read_rows(file)) is not None}
    missing: dict[str, list[Rows]] = {name: [] for name in parts if name not in found}
    for start in range(0, len(images) if missing else 0, BATCH_SIZE):
        batch = images.read(range(start, min(start + BATCH_SIZE, len(images)))).to(device).float() / 255
        for name, measured in missing.items():
            measured.append(parts[name](batch))
    for name, measured in missing.items():
        found[name] = {key: torch.cat([rows[key] for rows in measured]) for key in measured[0]}
        files[name].parent.mkdir(parents=True, exist_ok=True)
        write_rows(files[name], found[name])
    return {key: values for name in parts for key, values in found[name].items()}


def open_reference(path: Path, image_size: ImageSize | None = None) -> Reference:
    """Reads the statistics, and finds the images without reading them all.

    Images that have not `image_size` pixels are cropped to it, as training images are; None takes them as they are. A
    folder is searched with its sub-folders. An .npz may also hold images as `arr_0`, as ADM's reference batches
    (VIRTUAL_imagenet256_labeled.npz) do: the Frechet distance then uses mu and sigma, other measures the images.

    Raises:
        DataError: If there is nothing, or it has another format, other shapes or values that are not finite.
    """
    if path.is_dir():
        return Reference(None, images_of_files(list_images(path), image_size), str(path))
    if not path.is_file():
        raise DataError(f"no reference at {path}: give {FORMATS}")
    if path.suffix == ".npz":
        return _read_npz(path, image_size)
    if path.suffix == ".pt":
        return Reference(_gaussian(path, _read_pt(path)), None, str(path))
    raise DataError(f"the reference {path} is neither of these: {FORMATS}")


def list_images(folder: Path) -> list[Path]:
    """The image files of a folder and its sub-folders, sorted; hidden ones are left out. Raises DataError if there is
    none."""
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder of images")
    found = (file for file in folder.rglob("*") if file.name.lower().endswith(IMAGE_ENDINGS))
    files = sorted(file for file in found if not any(is_ignored(part) for part in file.relative_to(folder).parts))
    if not files:
        raise DataError(f"{folder} holds no image ({', '.join(IMAGE_ENDINGS)})")
    return files


def _read_npz(path: Path, image_size: ImageSize | None) -> Reference:
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in ("mu", "sigma", "arr_0") if name in archive.files}
            names = archive.files
    except Exception as error:  # a damaged archive fails anywhere inside NumPy, in any way
        raise DataError(
            f"cannot read the reference {path}, damaged, or not an .npz of arrays: {first_line(error)}"
        ) from error
    images = arrays.pop("arr_0", None)
    if images is not None and (images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3):
        raise DataError(
            f"arr_0 of {path} must hold images, uint8 [N, H, W, 3], not {images.dtype} {list(images.shape)}"
        )
    if images is not None and not arrays:
        return Reference(None, images_of_array(images, image_size), str(path))
    if len(arrays) != 2:
        raise DataError(f"{path} has no mu and sigma; it has {', '.join(names) or 'nothing'}")
    return Reference(
        _gaussian(path, arrays), None if images is None else images_of_array(images, image_size), str(path)
    )


def _read_pt(path: Path) -> Any:
    """What torch-fidelity keeps in its cache: a dictionary of NumPy arrays, which torch needs leave to unpickle."""
    rebuild = np.empty(0).__reduce__()[0]
    allowed: list[Any] = [
        *((rebuild, f"{module}.multiarray._reconstruct") for module in ("numpy.core", "numpy._core")),
        np.ndarray,
        np.dtype,
        *(type(np.dtype(name)) for name in ("float32", "float64")),
        codecs.encode,
    ]
    try:
        with torch.serialization.safe_globals(allowed):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged or hostile pickle fails anywhere inside the unpickler, in any way
        raise DataError(
            f"cannot read the reference {path}: it is damaged, or holds more than torch-fidelity's arrays"
        ) from error


def _gaussian(path: Path, statistics: Any) -> Gaussian:
    if not isinstance(statistics, dict) or not {"mu", "sigma"} <= statistics.keys():
        raise DataError(f"{path} has no mu and sigma: give {FORMATS}")
    mean, covariance = (np.asarray(statistics[name]) for name in ("mu", "sigma"))
    for name, array, shape in (("mu", mean, (mean.size,)), ("sigma", covariance, (mean.size, mean.size))):
        if array.shape != shape or array.dtype.kind != "f":
            raise DataError(
                f"{name} of {path} must hold real numbers of the shape {list(shape)}, not {array.dtype} "
                f"{list(array.shape)}"
            )
        if not np.isfinite(array).all():
            raise DataError(f"{name} of {path} holds NaN or infinity")
    return Gaussian(*(torch.from_numpy(array.astype(np.float64)) for array in (mean, covariance)))
