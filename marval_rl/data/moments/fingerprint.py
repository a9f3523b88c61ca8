"""Hashes that tell whether a cache that is resumed still has the same images and the same VAE."""

from __future__ import annotations

import hashlib

import torch
from torch import nn

from marval_rl.data.labelled_images import LabelledImages


def hash_images(source: LabelledImages) -> str:
    """SHA-256 of all names and labels; what the images hold is in the sidecars of the shards."""
    digest = hashlib.sha256()
    for index, label in enumerate(source.modes):
        digest.update(f"{source.name(index)}\0{label}\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def hash_content(data: bytes) -> str:
    """The first half of the SHA-256 of an encoded image."""
    return hashlib.sha256(data).hexdigest()[:32]


def hash_weights(network: nn.Module) -> str:
    """SHA-256 of all weights with their names, types and shapes."""
    digest = hashlib.sha256()
    for name, weight in sorted(network.state_dict().items()):
        digest.update(f"{name}:{weight.dtype}:{list(weight.shape)}\n".encode())
        digest.update(weight.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
