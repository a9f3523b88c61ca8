"""Names and shapes of weights: the strict comparison with what a model needs, and a hash of them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from marval_rl.errors import CheckpointError

SHOWN = 5


def key_hash(weights: Mapping[str, Tensor]) -> str:
    """sha256 of the lines "name:d0xd1x...", sorted by name: equal when names and shapes are."""
    lines = (f"{name}:{'x'.join(map(str, tensor.shape))}\n" for name, tensor in sorted(weights.items()))
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def check_shapes(found: Mapping[str, Tensor], expected: Mapping[str, torch.Size], path: Path) -> None:
    """Raises CheckpointError unless `found` has the names and shapes of `expected`; it lists what is wrong."""
    problems = [
        _listed("missing", [name for name in expected if name not in found]),
        _listed("extra", [name for name in found if name not in expected]),
        _listed(
            "of another shape",
            [
                f"{name} {list(tensor.shape)} instead of {list(expected[name])}"
                for name, tensor in found.items()
                if name in expected and tensor.shape != expected[name]
            ],
        ),
    ]
    if any(problems):
        raise CheckpointError(f"the weights of {path} do not fit: {'; '.join(filter(None, problems))}")


def check_ranks(found: Mapping[str, Tensor], ranks: Mapping[str, int], path: Path) -> None:
    """Raises CheckpointError unless the weights that tell a model's sizes are there, with so many dimensions."""
    missing = [name for name in ranks if name not in found]
    if missing:
        raise CheckpointError(f"the weights of {path} do not fit: {_listed('missing', missing)}")
    for name, rank in ranks.items():
        if found[name].ndim != rank:
            raise CheckpointError(f"{name} of {path} has the shape {list(found[name].shape)}, not {rank} dimensions")


def _listed(what: str, names: Sequence[str]) -> str:
    """ "7 missing: a, b, c, d, e, ..."; nothing for none."""
    if not names:
        return ""
    return f"{len(names)} {what}: {', '.join(names[:SHOWN])}{', ...' if len(names) > SHOWN else ''}"
