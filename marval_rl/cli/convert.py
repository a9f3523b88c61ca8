"""`marval-rl convert`: official weights (MAR, its VAE, MaskGen-KL, TA-TiTok) to a model folder, and back."""

from __future__ import annotations

import argparse
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from safetensors.torch import save_file
from torch import Tensor

from marval_rl.cli.arguments import quiet_libraries
from marval_rl.errors import CheckpointError, check_folder
from marval_rl.models import MARModel
from marval_rl.models.checkpoints import load_model
from marval_rl.models.maskgen.codec import load_tokenizer
from marval_rl.models.maskgen.config import MaskGenConfig
from marval_rl.models.maskgen.model import MaskGenModel
from marval_rl.models.maskgen.tatitok import TATiTokConfig, TATiTokModel
from marval_rl.models.official import maskgen_weights
from marval_rl.models.official.mar_weights import mar_checkpoint, published_name, read_mar
from marval_rl.models.official.maskgen_files import (
    CONFIG,
    WEIGHTS,
    OfficialFiles,
    holds_official_maskgen,
    plain_weights,
    read_folder,
)
from marval_rl.models.official.maskgen_weights import is_maskgen, maskgen_config, maskgen_official
from marval_rl.models.official.reading import check_finite, read_checkpoint
from marval_rl.models.official.shapes import key_hash
from marval_rl.models.official.tatitok_weights import is_tatitok, tatitok_config, tatitok_official
from marval_rl.models.official.vae_weights import is_vae, read_vae, vae_checkpoint
from marval_rl.models.vae import load_autoencoder
from marval_rl.paths import looks_like_hub_id, path_or_id
from marval_rl.text import read_text


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "source",
        type=Path,
        metavar="SOURCE",
        help="checkpoint-last.pth, kl16.ckpt, or MaskGen's .bin, folder or hub id; or a model folder",
    )
    parser.add_argument(
        "output",
        type=Path,
        metavar="OUT",
        help="folder to write; with --to_official the file, for MaskGen the folder, that the official code reads",
    )
    parser.add_argument("--weights", choices=["ema", "model"], help="MAR: averaged or raw weights (default: ema)")
    parser.add_argument(
        "--num_heads", type=int, metavar="N", help="MAR or MaskGen of unpublished width: its attention heads"
    )
    parser.add_argument(
        "--vae", type=path_or_id, metavar="NAME", help="MAR or MaskGen: folder or hub id of its VAE or tokenizer"
    )
    parser.add_argument("--to_official", action="store_true", help="SOURCE is a model folder, OUT an official file")
    parser.add_argument("--overwrite", action="store_true", help="replace OUT if it is there")


def run(args: argparse.Namespace, extra: list[str]) -> None:
    """Converts, and prints what it found. Raises CheckpointError for weights that cannot be used."""
    quiet_libraries()
    if args.to_official:
        _refuse_mar_options(args, "go with official files, and --to_official takes none of them")
        to_official(args.source, args.output, args.overwrite)
    else:
        from_official(args)


def from_official(args: argparse.Namespace) -> None:
    """Writes a folder as `save_pretrained` does, weights bit for bit as in the official file."""
    _check_free(args.output, args.overwrite, wants_folder=True)
    on_hub = not args.source.exists() and looks_like_hub_id(args.source)
    if on_hub or holds_official_maskgen(args.source):
        from_maskgen(args, read_folder(args.source))
        return
    if (args.source / "config.json").is_file():
        raise CheckpointError(f"{args.source} is a model folder already (--to_official makes an official file of it)")
    content = read_checkpoint(args.source)
    if is_maskgen(content) or is_tatitok(content):
        from_maskgen(args, plain_weights(content, args.source))
        return
    if is_vae(content):
        _refuse_mar_options(args, f"belong to a MAR, but {args.source} is a VAE")
        model = read_vae(content, args.source)
        name, origin, weights = "VAE", "model", vae_checkpoint(model, args.source)["model"]
    else:
        official = read_mar(args.source, args.weights or "ema", args.num_heads)
        official.config.vae = args.vae
        official.config.class_names = class_names(official.config.num_classes)
        with torch.device("meta"):
            model = MARModel(official.config)
        model.load_state_dict(official.weights, strict=True, assign=True)
        name, origin, weights = published_name(official.config) or "MAR", args.weights or "ema", official.weights
    check_finite(weights, args.source)
    _write(args.output, model.save_pretrained)
    _report(f"{name} ({origin} weights)", weights, args.output)


def from_maskgen(args: argparse.Namespace, files: OfficialFiles) -> None:
    """As `from_official`, for MaskGen and TA-TiTok."""
    if args.weights is not None:
        raise ValueError(f"--weights {args.weights} belongs to a MAR: {args.source} has one set of weights")
    if is_tatitok(files.weights):
        _refuse_mar_options(args, f"belong to a generator, but {args.source} is a tokenizer")
        name, config, kind = "TA-TiTok", tatitok_config(files), TATiTokModel
    elif is_maskgen(files.weights):
        config, kind = maskgen_config(files, args.num_heads), MaskGenModel
        config.vae = args.vae
        name = maskgen_weights.published_name(config) or "MaskGen"
    else:
        raise CheckpointError(f"{args.source} holds neither a MaskGen-KL nor a TA-TiTok with KL latents")
    check_finite(files.weights, args.source)
    with torch.device("meta"):
        model = kind(config)
    model.load_state_dict(files.weights, strict=True, assign=True)
    _write(args.output, model.save_pretrained)
    _report(name, files.weights, args.output)


def to_official(source: Path, output: Path, overwrite: bool) -> None:
    """Writes a file that the official code loads, weights bit for bit as in the folder."""
    config = _config_of(source)
    kind = config.get("model_type")
    is_text = kind in (MaskGenConfig.model_type, TATiTokConfig.model_type)
    _check_free(output, overwrite, wants_folder=is_text)
    if not source.is_dir():
        raise CheckpointError(f"no model folder at {source}: --to_official needs one")
    if is_text:
        to_maskgen(source, output, kind == TATiTokConfig.model_type)
        return
    if config.get("_class_name") == AutoencoderKL.__name__:
        model: Any = load_autoencoder(source)
        name, content = "VAE", vae_checkpoint(model, source)
    else:
        model = load_model(source)
        name, content = published_name(model.config) or "MAR", mar_checkpoint(model, source)
    _write(output, lambda path: torch.save(content, path))
    _report(name, content["model"], output)


def to_maskgen(source: Path, output: Path, is_tokenizer: bool) -> None:
    """Writes a folder that the official code's `from_pretrained` loads."""
    if is_tokenizer:
        name, (weights, settings) = "TA-TiTok", tatitok_official(load_tokenizer(source), source)
    else:
        model: Any = load_model(source)
        name, (weights, settings) = (
            maskgen_weights.published_name(model.config) or "MaskGen",
            maskgen_official(model, source),
        )

    def write(folder: Path) -> None:
        folder.mkdir()
        (folder / CONFIG).write_text(json.dumps(settings, indent=2), encoding="utf-8")
        save_file({name: tensor.contiguous() for name, tensor in weights.items()}, folder / WEIGHTS)

    _write(output, write)
    _report(name, weights, output)


def class_names(num_classes: int) -> list[str] | None:
    """ImageNet's names for a model of 1000 classes: the published ones were trained on nothing else."""
    if num_classes != 1000:
        return None
    from marval_rl.data.class_names import IMAGENET_CLASS_NAMES

    return list(IMAGENET_CLASS_NAMES)


def _config_of(folder: Path) -> dict[str, Any]:
    """What a folder's config.json says; nothing where there is none: `load_model` complains."""
    try:
        config = json.loads(read_text(folder / "config.json"))
    except (OSError, ValueError):
        return {}
    return config if isinstance(config, dict) else {}


def _refuse_mar_options(args: argparse.Namespace, why: str) -> None:
    given = [f"--{name}" for name in ("weights", "num_heads", "vae") if getattr(args, name) is not None]
    if given:
        raise ValueError(f"{', '.join(given)} {why}")


def _check_free(output: Path, overwrite: bool, wants_folder: bool) -> None:
    """Raises ValueError if something is in the way that this command did not write or may not replace, or if nothing
    can be written there."""
    check_folder(output.parent, "OUT's folder")
    if not output.exists():
        return
    if output.is_dir() != wants_folder:
        raise ValueError(f"{output} is a {'folder' if output.is_dir() else 'file'}: choose a path that is free")
    held = [entry.name for entry in output.iterdir()] if wants_folder else [output.name]
    if held and not overwrite:
        raise ValueError(f"{output} is there already: give another path, or replace it with --overwrite")
    others = [name for name in held if wants_folder and name != "config.json" and not name.endswith(".safetensors")]
    if others:
        raise ValueError(f"{output} holds more than a model, {min(others)}: it is not replaced, empty it first")


def _write(output: Path, write: Callable[[Path], object]) -> None:
    """Writes beside the output and renames, so that what has its name is complete."""
    partial = output.with_name(f".{output.name}.partial-{os.getpid()}")
    earlier = output.with_name(f".{output.name}.earlier-{os.getpid()}")
    try:
        write(partial)
        if output.is_dir():
            output.rename(earlier)
        partial.replace(output)
    finally:
        partial.unlink(missing_ok=True) if partial.is_file() else shutil.rmtree(partial, ignore_errors=True)
    shutil.rmtree(earlier, ignore_errors=True)


def _report(name: str, weights: Mapping[str, Tensor], output: Path) -> None:
    """Prints what was converted; `weights` have their official names."""
    count = sum(tensor.numel() for tensor in weights.values())
    print(f"{name}: {count:,} parameters in {len(weights)} tensors, key hash {key_hash(weights)}")
    print(f"written: {output}")
