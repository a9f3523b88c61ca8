"""The 1000 classes of ImageNet (ILSVRC 2012); sources and licence are in imagenet_classes.tsv."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path


def _read_classes() -> list[tuple[str, str]]:
    lines = Path(__file__).with_name("imagenet_classes.tsv").read_text(encoding="utf-8").splitlines()
    pairs = (line.split("\t") for line in lines if not line.startswith("#"))
    return [(wnid, name) for wnid, name in pairs]


_CLASSES = _read_classes()
IMAGENET_WNIDS = [wnid for wnid, _ in _CLASSES]  # sorted: the label is the position
IMAGENET_CLASS_NAMES = [name for _, name in _CLASSES]  # "missile" and "sunglasses" name two classes each
_NAME_OF_WNID = dict(_CLASSES)


def imagenet_names(folders: Sequence[str]) -> list[str] | None:
    """The names of classes that are given by their WordNet ids; None if any of them is none of the 1000."""
    if not all(folder in _NAME_OF_WNID for folder in folders):
        return None
    return [_NAME_OF_WNID[folder] for folder in folders]
