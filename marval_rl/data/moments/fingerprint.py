"""Hashes that tell whether a cache that is resumed still has the same images and the same VAE."""

from __future__ import annotations

import hashlib

import torch
from torch import nn

from marval_rl.data.decoding import CorruptImageError
from marval_rl.data.labelled_images import LabelledImages

SAMPLED_IMAGES = 8


def hash_images(source: LabelledImages) -> str:
    """SHA-256 of all names and labels, and of the sizes of a few images: a resized copy has the same names."""
    digest = hashlib.sha256()
    for index, label in enumerate(source.class_labels):
        digest.update(f"{source.name(index)}\0{label}\n".encode("utf-8", "surrogateescape"))
    for index in range(0, len(source), -(-len(source) // SAMPLED_IMAGES)):
        try:
            digest.update(f"{source.read(index).size}\n".encode())
        except CorruptImageError:
            digest.update(b"corrupt\n")
    return digest.hexdigest()


def hash_weights(network: nn.Module) -> str:
    """SHA-256 of all weights with their names, types and shapes."""
    digest = hashlib.sha256()
    for name, weight in sorted(network.state_dict().items()):
        digest.update(f"{name}:{weight.dtype}:{list(weight.shape)}\n".encode())
        digest.update(weight.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
