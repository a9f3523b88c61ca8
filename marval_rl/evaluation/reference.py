"""The real images that generated ones are compared with: a folder of them, or stored statistics."""

from __future__ import annotations

import codecs
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from marval_rl.data.class_folders import is_ignored
from marval_rl.data.decoding import IMAGE_ENDINGS
from marval_rl.errors import DataError, first_line
from marval_rl.evaluation.fidelity import Gaussian
from marval_rl.evaluation.inception import NUM_FEATURES

FORMATS = "a folder of images, an .npz with mu and sigma (such as ADM's adm_in256_stats.npz), or torch-fidelity's .pt"


@dataclass(frozen=True)
class Reference:
    """Stored statistics, single images (files, or an array uint8 [N, H, W, 3]), or both."""

    gaussian: Gaussian | None
    images: list[Path] | np.ndarray | None


def open_reference(path: Path) -> Reference:
    """Reads the statistics, and finds the images without reading them all.

    A folder is searched with its sub-folders. An .npz may also hold images as `arr_0`, as ADM's reference batches
    (VIRTUAL_imagenet256_labeled.npz) do: FID then uses mu and sigma, precision and recall the images.

    Raises:
        DataError: If there is nothing, or it has another format, other shapes or values that are not finite.
    """
    if path.is_dir():
        return Reference(None, list_images(path))
    if not path.is_file():
        raise DataError(f"no reference at {path}: give {FORMATS}")
    if path.suffix == ".npz":
        return _read_npz(path)
    if path.suffix == ".pt":
        return Reference(_gaussian(path, _read_pt(path)), None)
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


def _read_npz(path: Path) -> Reference:
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in ("mu", "sigma", "arr_0") if name in archive.files}
            names = archive.files
    except Exception as error:  # a damaged archive fails anywhere inside NumPy, in any way
        raise DataError(
            f"cannot read the reference {path}, damaged or no .npz of arrays: {first_line(error)}"
        ) from error
    images = arrays.pop("arr_0", None)
    if images is not None and (images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3):
        raise DataError(
            f"arr_0 of {path} must hold images, uint8 [N, H, W, 3], not {images.dtype} {list(images.shape)}"
        )
    if images is not None and not arrays:
        return Reference(None, images)
    if len(arrays) != 2:
        raise DataError(f"{path} has no mu and sigma; it has {', '.join(names) or 'nothing'}")
    return Reference(_gaussian(path, arrays), images)


def _read_pt(path: Path) -> Any:
    """What torch-fidelity keeps in its cache: a dictionary of NumPy arrays, which torch needs leave to unpickle."""
    rebuild = np.empty(0).__reduce__()[0]
    allowed = [
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
    arrays = []
    for name, shape in (("mu", (NUM_FEATURES,)), ("sigma", (NUM_FEATURES, NUM_FEATURES))):
        array = np.asarray(statistics[name])
        if array.shape != shape or array.dtype.kind != "f":
            raise DataError(
                f"{name} of {path} must hold real numbers of the shape {list(shape)} (Inception's features), "
                f"not {array.dtype} {list(array.shape)}"
            )
        if not np.isfinite(array).all():
            raise DataError(f"{name} of {path} holds NaN or infinity")
        arrays.append(array.astype(np.float64))
    return Gaussian(*arrays)
