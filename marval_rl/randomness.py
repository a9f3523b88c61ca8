"""Seeds that depend on nothing but the place in training, so that a resumed run draws what an undisturbed one draws."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def derive_seed(*parts: int | str) -> int:
    """A 63-bit seed from any integers and strings."""
    digest = hashlib.sha256(":".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def derive_generator(device: torch.device | str, *parts: int | str) -> torch.Generator:
    """A generator on `device` seeded by `derive_seed`."""
    return torch.Generator(device=device).manual_seed(derive_seed(*parts))


@contextmanager
def kept_random_state(device: torch.device) -> Iterator[None]:
    """Restores torch's global random state at the end: what is not ours may draw from it, or seed it."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        yield
