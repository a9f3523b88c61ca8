"""The arguments of commands that sample a model."""

from __future__ import annotations

import argparse

import torch

from marval_rl.cli.main import path_or_id
from marval_rl.cli.quiet import is_watched, quiet_libraries
from marval_rl.models import LatentCodec, MARModel, codec_for
from marval_rl.models.checkpoints import load_model
from marval_rl.models.generation import SamplingSettings

AUTOCAST_DTYPES = {"float32": None, "bfloat16": torch.bfloat16}


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
    parser.add_argument("--seed", type=int, default=0, help="seed of all noise (default: 0)")
    parser.add_argument("--batch_size", type=int, default=250, help="images at once (default: 250)")
    parser.add_argument(
        "--dtype", default="float32", choices=AUTOCAST_DTYPES, help="bfloat16 runs MAR under autocast; never the VAE"
    )
    parser.add_argument("--device", help="cpu, cuda, ... (default: the GPU if there is one)")


def load_for_sampling(args: argparse.Namespace) -> tuple[MARModel, LatentCodec, torch.device]:
    """The model on its device, and its codec; `args.progress` tells whether to draw progress bars."""
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    quiet_libraries()
    if args.batch_size < 1:
        raise ValueError(f"--batch_size must be at least 1, not {args.batch_size}")
    args.progress = is_watched()
    model = load_model(args.model)
    if args.vae is not None:
        model.config.vae = args.vae
    return model.to(device), codec_for(model.config).to(device), device


def sampling_settings(args: argparse.Namespace) -> SamplingSettings:
    """The settings of `generate` from the command line."""
    return SamplingSettings(
        num_unmasking_steps=args.steps,
        guidance_scale=args.guidance_scale,
        guidance_schedule=args.guidance_schedule,
        temperature=args.temperature,
        num_diffusion_steps=args.diffusion_steps,
        autocast_dtype=AUTOCAST_DTYPES[args.dtype],
    )
