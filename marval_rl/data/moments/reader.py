"""Training from cached moments: any image in any order, straight from the page cache."""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path

import torch
from torch import Tensor

from marval_rl.data.class_names import read_class_names
from marval_rl.data.datasets import FlippingDataset
from marval_rl.data.moments.changes import changes_since
from marval_rl.data.moments.manifest import MANIFEST, SETTINGS, read_manifest
from marval_rl.data.moments.npz import NpzMoments
from marval_rl.errors import DataError, first_line

STORED_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64}


class MomentsCache(FlippingDataset):
    """What `marval-rl cache` wrote. Items are {"moments": float32 [2c, h, w], "class_labels": int}; half of them,
    others in each epoch, are those of the flipped image.

    Shards are memory-mapped when first read, by each worker for itself; no file stays open.

    class_names:   the names of the classes, in the order of the labels
    class_counts:  images of each mode, which is a class unless `merge_classes` merged some
    moments_shape: (2c, h, w)
    image_size:    pixels along one side of the encoded images
    holdout:       the share of the images that was held out
    vae:           the name or path of the VAE that encoded them
    scale:         its latent scale

    Args:
        folder: The cache.
        flip: Use the moments of the flipped image for half of the images.
        seed: Of the flips.

    Raises:
        DataError: If the cache is not there, unfinished or damaged, or holds no flipped images although `flip`.
    """

    def __init__(self, folder: str | Path, flip: bool = True, seed: int = 0):
        super().__init__(flip, seed)
        self.folder = Path(folder)
        manifest = read_manifest(self.folder)
        if not manifest["images"]:
            raise DataError(f"{folder} holds no images: all {len(manifest['skipped'])} were corrupt, see {MANIFEST}")
        if flip and not manifest["flip"]:
            raise DataError(f"{folder} was made without flipped images: train with --flip false, or make it again")
        self.set_modes(manifest["class_names"])
        self.class_counts: list[int] = manifest["class_counts"]
        self.moments_shape = tuple(manifest["moments_shape"])
        self.image_size: int = manifest["image_size"]
        self.holdout: float = manifest.get("source_holdout", 0.0)
        self.vae: str = manifest["vae"]
        self.scale: float = manifest["scale"]
        self._manifest = manifest
        self._files = [shard["file"] for shard in manifest["shards"]]
        self._ends = list(accumulate(shard["images"] for shard in manifest["shards"]))
        self._open: dict[int, dict[str, Tensor]] = {}

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> dict[str, Tensor | int]:
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} is outside 0..{len(self) - 1}")
        shard = bisect_right(self._ends, index)
        row = index - (self._ends[shard - 1] if shard else 0)
        if shard not in self._open:
            self._open[shard] = map_tensors(self.folder / self._files[shard])
        tensors = self._open[shard]
        moments = tensors["moments_flip" if self.is_flipped(index) else "moments"][row]
        # A copy: what is returned must not be a view of the file.
        mode = int(tensors["class_labels"][row])
        return {"moments": moments.to(torch.float32, copy=True), "class_labels": self.class_of_mode[mode]}

    def changes(self) -> str | None:
        """What is known to have changed in the images since; see `changes_since`."""
        return changes_since(self.folder, self._manifest)

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_open": {}}  # maps stay behind when the data set is sent to a worker


def map_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, mapped into memory.

    Rows of such a tensor are read twice as fast as safetensors' own slices, and Python's mmap would keep a file
    descriptor for each of a thousand shards. Raises DataError if the file is not there or damaged.
    """
    try:
        with open(path, "rb") as stream:
            header_size = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(min(header_size, 2**20)))
        data = torch.from_file(str(path), shared=False, size=path.stat().st_size, dtype=torch.uint8)[8 + header_size :]
        header.pop("__metadata__", None)
        tensors = {}
        for name, entry in header.items():
            start, stop = entry["data_offsets"]
            tensors[name] = data[start:stop].view(STORED_DTYPES[entry["dtype"]]).view(entry["shape"])
        return tensors
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise DataError(
            f"cannot read the shard {path}: {first_line(error)}; `marval-rl cache RECIPE --verify` checks all"
        ) from error


def load_moments(
    folder: str | Path,
    flip: bool = True,
    seed: int = 0,
    class_names: Sequence[str] | str | None = None,
    holdout: float | None = None,
) -> MomentsCache | NpzMoments:
    """A cache of `marval-rl cache`, or the .npz files of LTH14/mar: whichever lies in the folder.

    Args:
        folder: The cache.
        flip: Use the moments of the flipped image for half of the images.
        seed: Of the flips.
        class_names: Names of the classes of .npz files, see `NpzMoments`; a cache of `marval-rl cache` knows its own.
        holdout: The share of the images that must not be in the cache; None for any.

    Raises:
        DataError: If it is neither, unfinished or damaged, or the cache has other `class_names` or another `holdout`.
    """
    path = Path(folder)
    if path.is_dir() and not (path / MANIFEST).is_file() and not (path / SETTINGS).is_file():
        if holdout:
            raise DataError(f"{folder} holds .npz files, of which eval_holdout {holdout} cannot leave out any")
        return NpzMoments(path, flip, seed, class_names)
    cache = MomentsCache(path, flip, seed)
    if class_names is not None and read_class_names(class_names) != cache.mode_names:
        raise DataError(f"{folder} was made with other class_names: leave the setting out, or make the cache again")
    if holdout is not None and holdout != cache.holdout:
        raise DataError(
            f"{folder} was made with eval_holdout {cache.holdout}, not {holdout}: set it back, or make the cache again"
        )
    return cache
