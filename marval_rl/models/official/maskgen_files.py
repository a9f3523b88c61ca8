"""Where official MaskGen and TA-TiTok weights lie: a folder or hub id with nested settings, or a plain .bin file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import huggingface_hub
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from marval_rl.errors import CheckpointError, first_line
from marval_rl.models.official.reading import weights_of
from marval_rl.paths import looks_like_hub_id
from marval_rl.text import read_text

CONFIG, WEIGHTS = "config.json", "model.safetensors"


class OfficialFiles(NamedTuple):
    """Weights by official name, the nested settings (empty where there are none), and where both came from."""

    weights: dict[str, Tensor]
    settings: dict[str, Any]
    path: Path


def holds_official_maskgen(source: Path) -> bool:
    """Whether a folder is one of the official code: its config.json is nested."""
    try:
        settings = json.loads(read_text(source / CONFIG))
    except (OSError, ValueError):
        return False
    return isinstance(settings, dict) and isinstance(settings.get("model"), dict)


def read_folder(source: Path) -> OfficialFiles:
    """A folder as the official code writes it, or a hub id; its weights stay on disk until they are read.

    Raises:
        CheckpointError: If it cannot be downloaded or read.
    """
    folder = source
    if not source.exists() and looks_like_hub_id(source):
        try:
            folder = Path(huggingface_hub.snapshot_download(str(source), allow_patterns=[CONFIG, WEIGHTS]))
        except (OSError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
            raise CheckpointError(f"cannot download {source} from the hub: {first_line(error)}") from error
    try:
        settings = json.loads(read_text(folder / CONFIG))
        weights = load_file(folder / WEIGHTS)
    except (OSError, ValueError, SafetensorError) as error:
        raise CheckpointError(
            f"{source} has no {CONFIG} and {WEIGHTS} that can be read: {first_line(error)}"
        ) from error
    return OfficialFiles(weights_of({"weights": weights}, "weights", source), settings, source)


def plain_weights(content: Mapping[str, Any], source: Path) -> OfficialFiles:
    """A file that holds a state dict and nothing else, as `read_checkpoint` read it. Raises CheckpointError."""
    return OfficialFiles(weights_of({"weights": dict(content)}, "weights", source), {}, source)


def section(settings: Mapping[str, Any], *names: str) -> dict[str, Any]:
    """A part of nested settings; empty where it is not there, as the published ones may hold more or less."""
    found: Any = settings
    for name in names:
        found = found.get(name) if isinstance(found, Mapping) else None
    return dict(found) if isinstance(found, Mapping) else {}


def count_of(settings: Mapping[str, Any], name: str, default: int, path: Path) -> int:
    """A positive whole number of the settings, or written as text. Raises CheckpointError for anything else."""
    value = settings.get(name, default)
    if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) < 10:
        value = int(value)
    if type(value) is not int or value < 1:
        raise CheckpointError(f"{name} in the settings of {path} is {value!r:.40}, not a positive whole number")
    return value


def check_agreement(settings: Mapping[str, Any], found: Mapping[str, int], path: Path) -> None:
    """Raises CheckpointError where settings contradict the sizes that the weights have."""
    for name, value in found.items():
        if (written := count_of(settings, name, value, path)) != value:
            raise CheckpointError(f"{path} contradicts itself: {name} is {written}, but {value} by the weights")
