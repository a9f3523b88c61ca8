"""What several commands share: arguments, and quiet libraries. Nothing heavy is imported before a command runs."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import warnings
from typing import TYPE_CHECKING

from marval_rl.paths import path_or_id

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from marval_rl.models import LatentCodec, MaskedModel
    from marval_rl.models.generation import SamplingSettings

DTYPES = ("float32", "bfloat16")
NOISE = (  # warnings of transformers that ask nothing of the user; all others are shown
    "does not expose input embeddings",  # of language models' adapters
    "do not match the ones in the `trainer_state.json`",  # a resumed run says itself what has changed
    'attempting to log a value of "None"',  # a figure that these images do not have, such as the colours of grey ones
)


# ---- pretrain, distill and train ----


def add_recipe_argument(parser: argparse.ArgumentParser) -> None:
    """Adds RECIPE. It is optional for argparse, so that the message about a missing one can list those that exist."""
    parser.add_argument(
        "recipe",
        nargs="?",
        metavar="RECIPE",
        help="YAML file of settings, or the name of one that ships; --key value wins",
    )


def add_recipe_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds RECIPE, --dry_run, --resume and the options of a launch. Everything else on the command line is a setting
    (`--key value`).

    `args.resume` is None (start a new run), "latest" (the newest checkpoint of the output folder), "auto" (that, or a
    new run where there is none) or the path of a checkpoint. The options of a launch are there for the help alone: the
    command line handles them before the command is run.
    """
    from marval_rl.cli.launch import add_launch_arguments
    from marval_rl.runtime.resume import LATEST

    parser.usage = f"{parser.prog} RECIPE [--dry_run] [--resume [CHECKPOINT]] [--num_processes N ...] [--key value ...]"
    add_recipe_argument(parser)
    parser.add_argument("--dry_run", action="store_true", help="print what would be run, and train nothing")
    parser.add_argument(
        "--resume",
        type=path_or_id,
        nargs="?",
        const=LATEST,
        metavar="CHECKPOINT",
        help="resume from this checkpoint folder; without a value, from the newest one of the run; auto: from the "
        "newest one, or start a new run where no checkpoint was written yet",
    )
    add_launch_arguments(parser)


# ---- sample, evaluate and bench ----


def add_sampling_arguments(parser: argparse.ArgumentParser, *, model_is_optional: bool = False) -> None:
    """Adds MODEL and how to sample it."""
    count = "?" if model_is_optional else None
    parser.add_argument(
        "model", type=path_or_id, metavar="MODEL", nargs=count, help="model folder, run folder or hub id"
    )
    parser.add_argument(
        "--vae",
        type=path_or_id,
        metavar="PATH",
        help="diffusers AutoencoderKL: folder or hub id (default: the model's)",
    )
    parser.add_argument("--steps", type=int, default=16, metavar="K", help="unmasking steps (default: 16)")
    parser.add_argument("--guidance_scale", type=float, default=1.0, help="1.0 is none; for teachers only")
    parser.add_argument("--guidance_schedule", default="linear", choices=["linear", "constant"])
    parser.add_argument("--temperature", type=float, default=1.0, help="scale of the noise (default: 1.0)")
    parser.add_argument("--diffusion_steps", type=int, metavar="N", help="of a teacher (default: the model's)")
    parser.add_argument(
        "--compile",
        action="store_true",
        help="for many images on a GPU: compile the blocks, which takes minutes, and capture a student's generations "
        "as CUDA graphs",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of all noise (default: 0)")
    parser.add_argument("--batch_size", type=int, default=250, help="images at once (default: 250)")
    add_device_arguments(parser)


def add_device_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds --dtype and --device."""
    parser.add_argument(
        "--dtype", default="float32", choices=DTYPES, help="bfloat16 runs MAR under autocast; never the VAE"
    )
    parser.add_argument("--device", help="cpu, cuda, ... (default: the GPU if there is one)")


def chosen_device(args: argparse.Namespace) -> torch.device:
    """The device of --device."""
    import torch

    return torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))


def autocast_dtype(args: argparse.Namespace) -> torch.dtype | None:
    """The type of --dtype to autocast to; None for float32, which needs none."""
    import torch

    return torch.bfloat16 if args.dtype == "bfloat16" else None


def load_for_sampling(
    args: argparse.Namespace, prompts: Sequence[str] | None = None
) -> tuple[MaskedModel, LatentCodec, torch.device]:
    """The model on its device, and its codec; sets `args.progress`, whether to draw progress bars.

    prompts: Those of a model of text. Raises ValueError if a model of classes gets some, or one of text none.
    """
    from marval_rl.models import codec_for
    from marval_rl.models.checkpoints import load_model

    device = chosen_device(args)
    quiet_libraries()
    if args.batch_size < 1:
        raise ValueError(f"--batch_size must be at least 1, not {args.batch_size}")
    args.progress = sys.stderr.isatty()
    model = load_model(args.model)
    if args.vae is not None:
        model.config.vae = args.vae
    if model.config.takes_prompts and not prompts:
        raise ValueError(f"{args.model} is conditioned on text: give prompts (--prompts FILE)")
    if prompts and not model.config.takes_prompts:
        raise ValueError(f"{args.model} knows classes, and prompts were given: leave them out")
    model = model.to(device)
    model.condition_on(prompts or [])
    if args.compile:
        from marval_rl.models.compiling import CapturedGenerations, compile_blocks

        compile_blocks(model)
        if device.type == "cuda" and model.config.is_one_step:
            model.captured = CapturedGenerations(model)
    return model, codec_for(model.config).to(device), device


def sampling_settings(args: argparse.Namespace) -> SamplingSettings:
    """The settings of `generate` from the command line."""
    from marval_rl.models.generation import SamplingSettings

    return SamplingSettings(
        num_unmasking_steps=args.steps,
        guidance_scale=args.guidance_scale,
        guidance_schedule=args.guidance_schedule,
        temperature=args.temperature,
        num_diffusion_steps=args.diffusion_steps,
        autocast_dtype=autocast_dtype(args),
    )


# ---- What libraries print for developers ----


def quiet_libraries() -> None:
    """No warnings meant for developers, and no progress bars of loading and saving."""
    import torch
    from transformers.utils import logging as transformers_logging

    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else deepspeed, where installed, warns that it finds no GPU
    for library in ("transformers", "huggingface_hub", "diffusers"):
        for category in (FutureWarning, DeprecationWarning):  # of what will be renamed in their next release
            warnings.filterwarnings("ignore", category=category, module=library)
    transformers_logging.set_verbosity_warning()
    transformers_logging.disable_progress_bar()
    for handler in logging.getLogger("transformers").handlers:
        handler.addFilter(_is_for_the_user)


def _is_for_the_user(record: logging.LogRecord) -> bool:
    return not any(noise in record.getMessage() for noise in NOISE)
