"""Horizontal flips that depend on nothing but (seed, epoch, index), so that a resumed run sees the same ones."""

from __future__ import annotations

import hashlib

import torch
from torch.utils.data import Dataset


class FlippingDataset(Dataset):
    """Base of the data sets that flip each image with probability 1/2, anew in each epoch.

    Args:
        flip: False to flip none.
        seed: Of the flips.
    """

    def __init__(self, flip: bool, seed: int):
        self.flip = flip
        self.seed = seed
        # In shared memory: workers that live on from epoch to epoch see the change.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def set_epoch(self, epoch: int) -> None:
        """Call it before an epoch begins, with workers or without."""
        self._epoch.fill_(epoch)

    def is_flipped(self, index: int) -> bool:
        """Whether this image is flipped in this epoch."""
        if not self.flip:
            return False
        return bool(hashlib.sha256(f"flip:{self.seed}:{int(self._epoch)}:{index}".encode()).digest()[0] & 1)
