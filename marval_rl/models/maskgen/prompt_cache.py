"""The text features of a prompt list in one file: the tower runs once and is not in memory while training."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from marval_rl.errors import DataError, first_line
from marval_rl.models.maskgen.config import MaskGenConfig
from marval_rl.models.maskgen.prompts import PromptFeatures
from marval_rl.models.maskgen.tower import load_tower, tower_identity
from marval_rl.models.maskgen.words import WordTower


def features_of(
    prompts: Sequence[str],
    config: MaskGenConfig,
    *,
    folder: Path | None = None,
    dtype: torch.dtype = torch.float16,
    device: torch.device | str = "cpu",
    progress: bool = False,
) -> PromptFeatures:
    """The features of prompts by the text tower that a model's configuration names.

    CLIP's are kept in `folder` ($MARVAL_RL_CACHE or ~/.cache/marval_rl, in prompts/), in a file that is named after
    prompts, tokenizer, weights, activation and precision.

    Args:
        prompts: The prompts; an empty list gives the empty prompt alone.
        config: Of the model.
        folder: Where to keep the features; None for the cache.
        dtype: Their precision in the file.
        device: Where the tower runs.
        progress: Show a progress bar.

    Raises:
        CheckpointError, ValueError: For a tower that cannot be loaded; see `load_tower`.
        DataError: For a file of features that is damaged.
    """
    if config.vocabulary is not None:
        return WordTower(config.vocabulary, config.text_length).encode(prompts)
    key = cache_key(prompts, tower_identity(config.text_tower, config.text_pretrained), dtype)
    if folder is None:
        folder = Path(os.environ.get("MARVAL_RL_CACHE") or "~/.cache/marval_rl").expanduser() / "prompts"
    file = folder / f"{key}.safetensors"
    if file.exists():
        return read_features(file)
    tower = load_tower(config.text_tower, config.text_pretrained)
    if progress:
        print(f"text tower: {tower.identity}; {len(prompts)} prompts", flush=True)
    features = tower.encode(prompts, dtype=dtype, device=device, progress=progress)
    write_features(features, file, tower.identity)
    return features


def cache_key(prompts: Sequence[str], identity: str, dtype: torch.dtype) -> str:
    """The name of a file of features: sha256 of what they depend on.

    A tower's name says its activation, since open_clip's names do.
    """
    return hashlib.sha256(json.dumps([list(prompts), identity, str(dtype)]).encode()).hexdigest()[:32]


def write_features(features: PromptFeatures, file: Path, identity: str) -> None:
    """Writes a file of features beside its name and renames it; it holds the prompts and a checksum."""
    tensors = {"tokens": features.tokens, "pooled": features.pooled}
    if features.decoder is not None:
        tensors["decoder"] = features.decoder
    if features.scores is not None:
        tensors["scores"] = features.scores
    metadata = {
        "prompts": json.dumps(features.prompts),
        "tower": identity,
        "checksum": checksum(tensors, features.prompts),
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f".{file.name}.partial-{os.getpid()}")
    try:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial, metadata)
        partial.replace(file)
    finally:
        partial.unlink(missing_ok=True)


def read_features(file: Path) -> PromptFeatures:
    """The features of a file; its pages are read from disk when they are needed, once for the checksum.

    Raises:
        DataError: If it is missing, damaged, or not a file of features.
    """
    try:
        with safe_open(file, "pt") as opened:
            metadata = opened.metadata() or {}
        tensors = load_file(file)
    except (OSError, SafetensorError) as error:
        raise DataError(f"the features {file} cannot be read: {first_line(error)}; delete the file") from error
    if not {"prompts", "checksum"} <= metadata.keys() or not {"tokens", "pooled"} <= tensors.keys():
        raise DataError(f"{file} is not a file of prompts' features")
    prompts = json.loads(metadata["prompts"])
    if checksum(tensors, prompts) != metadata["checksum"]:
        raise DataError(f"the features {file} are damaged: their checksum is another; delete the file")
    names = ("tokens", "pooled", "decoder", "scores")
    return PromptFeatures(prompts, *map(tensors.get, names))  # type: ignore[arg-type]  # the first two are there


def checksum(tensors: Mapping[str, Tensor], prompts: Sequence[str]) -> str:
    """sha256 of prompts, names, shapes and values."""
    digest = hashlib.sha256(json.dumps(list(prompts)).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()
