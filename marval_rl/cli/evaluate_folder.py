"""`marval-rl evaluate --images DIR`: the fidelity of a folder of images, whoever painted them."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from marval_rl.cli.evaluate import refuse, write_results
from marval_rl.cli.evaluate_fidelity import (
    check_fidelity_arguments,
    count_notes,
    environment,
    fidelity_results,
    inception_batch_size,
    print_results,
)
from marval_rl.errors import check_output
from marval_rl.evaluation.fidelity import SCORE_SPLITS
from marval_rl.evaluation.inception import Inception
from marval_rl.evaluation.reference import list_images, open_reference

PAINTING = ("images_dir", "num_images", "rewards", "reward_kwargs", "prompt_template", "class_names")


def evaluate_folder(args: argparse.Namespace) -> None:
    """Writes evaluation.json in the current folder and prints it as a table.

    Raises ValueError or a MarvalError for what is missing or does not fit.
    """
    refuse(args, (*PAINTING, "dataset", "redraws", "class_groups"), "a folder of images is evaluated")
    if args.inception_weights is None:
        raise ValueError("--images needs the weights of Inception (--inception_weights FILE)")
    check_fidelity_arguments(args)
    output = args.output or Path("evaluation.json")
    check_output(output)
    reference = None if args.reference is None else open_reference(args.reference)
    files = list_images(args.images)
    print(f"{len(files)} images in {args.images}", flush=True)
    count_notes(args, reference, len(files))  # raises if they are too few, before any is read
    if reference is None and len(files) < SCORE_SPLITS:
        raise ValueError(
            f"without a reference only the Inception Score is measured, and it needs at least {SCORE_SPLITS} images; "
            f"{args.images} holds {len(files)}: add images, or give a --reference for FID"
        )
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    inception = Inception(args.inception_weights, device, inception_batch_size(args))
    results = {
        **fidelity_results(args, inception.of_many(files), reference, device),
        "images": str(args.images),
        "settings": {"num_images": len(files)},
        **environment(device),
    }
    print_results(results)
    write_results(results, output)
