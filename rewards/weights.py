"""Reading other people's weights: nothing is executed, and mismatches are one-line errors."""

from __future__ import annotations

import pickle
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from marval_rl.errors import CheckpointError, first_line

# The errors of libraries for a file that is damaged, of another kind, or of another network.
LOADING_ERRORS = (
    OSError,
    RuntimeError,
    ValueError,
    KeyError,
    TypeError,
    EOFError,
    pickle.UnpicklingError,
    SafetensorError,
)


@contextmanager
def loading(what: str, hint: str = "") -> Iterator[None]:
    """Within it what a library raises for files that it cannot load becomes a CheckpointError that names them."""
    try:
        yield
    except LOADING_ERRORS as error:
        raise CheckpointError(f"cannot load {what}: {first_line(error)}{hint}") from error


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors file or of a state_dict that torch.save wrote, by name, on the CPU.

    Raises:
        CheckpointError: For anything else, such as a pickle that would run code.
    """
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except LOADING_ERRORS as error:
        raise CheckpointError(
            f"{path} cannot be read as weights (damaged, or more than tensors): {first_line(error)}"
        ) from error
    if not isinstance(tensors, Mapping) or not all(isinstance(value, Tensor) for value in tensors.values()):
        raise CheckpointError(f"{path} holds a {type(tensors).__name__} that does not map names to weights")
    return dict(tensors)


def load_strictly(network: nn.Module, tensors: Mapping[str, Tensor], source: object) -> None:
    """Copy tensors into a network that has exactly these names and shapes. Raises CheckpointError."""
    wanted = network.state_dict()
    problems = {
        "missing": sorted(wanted.keys() - tensors.keys()),
        "unknown": sorted(tensors.keys() - wanted.keys()),
        "of another shape": sorted(
            name for name in wanted.keys() & tensors.keys() if wanted[name].shape != tensors[name].shape
        ),
    }
    found = [f"{len(names)} {what} ({', '.join(names[:3])})" for what, names in problems.items() if names]
    if found:
        raise CheckpointError(f"the weights of {source} do not fit {type(network).__name__}: {'; '.join(found)}")
    network.load_state_dict(tensors)
    check_finite(network, source)


def load_pretrained(model_class: Any, name_or_path: str, what: str, **options: Any) -> nn.Module:
    """A model of transformers from a folder or the hub: safetensors only, complete, finite, in float32.

    what is what it should be, for messages. Raises CheckpointError.
    """
    # Weights are drawn before they are loaded.
    with loading(f"the {what} {name_or_path}"), torch.random.fork_rng(devices=[]):
        network, info = model_class.from_pretrained(
            name_or_path, output_loading_info=True, dtype=torch.float32, use_safetensors=True, **options
        )
    for problem in ("missing_keys", "mismatched_keys"):
        if info[problem]:
            shown = ", ".join(map(str, sorted(info[problem], key=str)[:3]))
            raise CheckpointError(f"{name_or_path} is not a complete {what}: {len(info[problem])} {problem}: {shown}")
    check_finite(network, name_or_path)
    return network


def check_finite(network: nn.Module, source: object) -> None:
    """Raises CheckpointError if a weight is NaN or infinite: every score would be."""
    for name, parameter in network.named_parameters():
        if not parameter.isfinite().all():
            raise CheckpointError(f"the weight {name} of {source} holds NaN or infinity")


def check_exists_if_local(what: str, name_or_path: str) -> None:
    """Raises CheckpointError for a path that does not exist, so that it is not looked for on the hub."""
    looks_local = name_or_path.startswith((".", "/", "~")) or name_or_path.count("/") > 1
    if looks_local and not Path(name_or_path).exists():
        raise CheckpointError(f"{what} {name_or_path!r} does not exist; give a folder, or a hub id such as org/name")
