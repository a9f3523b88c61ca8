"""The cached moments of LTH14/mar: one .npz file per image."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from marval_rl.data.class_folders import ClassFolders
from marval_rl.data.datasets import FlippingDataset
from marval_rl.errors import DataError

ENDING = ".npz"


class NpzMoments(FlippingDataset):
    """`folder`/<class>/<file>.npz with the arrays `moments` and `moments_flip`, each [2c, h, w].

    Items are {"moments": float32 [2c, h, w], "class_labels": int}; half of them, others in each epoch, are those of the
    flipped image. Labels are those of `label_classes`.

    class_names:   the names of the classes: ImageNet's where the folders are its WordNet ids, else the folders'
    moments_shape: (2c, h, w), of the first file

    Args:
        folder: Holds the class folders.
        flip: Use `moments_flip` for half of the images.
        seed: Of the flips.
        class_names: Names to use instead: a list, "imagenet" or a text file.

    Raises:
        DataError: If the folder is not laid out so, or the names do not fit; on reading an item, if its file is
            damaged or of another shape.
    """

    def __init__(
        self, folder: str | Path, flip: bool = True, seed: int = 0, class_names: Sequence[str] | str | None = None
    ):
        super().__init__(flip, seed)
        self.files = ClassFolders(Path(folder), (ENDING,), class_names)
        self.set_modes(self.files.class_names)
        self.moments_shape = tuple(_read(self.files.path(0), "moments").shape)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> dict[str, Tensor | int]:
        path = self.files.path(index)
        moments = _read(path, "moments_flip" if self.is_flipped(index) else "moments")
        if moments.shape != self.moments_shape:
            raise DataError(f"{path} holds moments of shape {list(moments.shape)}, not {list(self.moments_shape)}")
        return {"moments": moments, "class_labels": self.class_of_mode[self.files.class_labels[index]]}


def _read(path: Path, name: str) -> Tensor:
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return torch.from_numpy(arrays[name].astype(np.float32))
    except KeyError:
        raise DataError(f"{path} holds no array {name!r}") from None
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(f"{path} is not a readable .npz file: {error}; delete it or make it again") from error
