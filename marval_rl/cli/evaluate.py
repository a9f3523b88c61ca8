"""`marval-rl evaluate`: quality, rewards and speed of a model, as evaluation.json; or quality of a folder of images."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from marval_rl.cli.arguments import add_sampling_arguments
from marval_rl.cli.launch import add_launch_arguments
from marval_rl.data.bundled import DIGIT_NAMES, PARITY
from marval_rl.launched import launched_processes
from marval_rl.models import MARConfig
from marval_rl.models.checkpoints import load_config
from marval_rl.paths import path_or_id
from marval_rl.recipes.values import WrongType, convert

DIGITS = "digits"
DIGITS_IMAGES, SET_IMAGES = 1000, 50_000
DIGITS_ONLY = ("redraws", "class_groups")
SETS_ONLY = (
    "reference",
    "inception_weights",
    "inception_batch_size",
    "images_dir",
    "rewards",
    "reward_kwargs",
    "prompt_template",
    "class_names",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_sampling_arguments(parser, model_is_optional=True)
    parser.add_argument(
        "--num_images", type=int, help=f"images to generate (default: {SET_IMAGES}; {DIGITS_IMAGES} digits)"
    )
    parser.add_argument("--output", type=Path, metavar="FILE", help="default: evaluation.json beside the model")

    digits = parser.add_argument_group("models of digits (8 x 8 pixels), compared with scikit-learn's")
    digits.add_argument("--dataset", choices=[DIGITS], help="real images to compare with (default: if they fit)")
    digits.add_argument("--redraws", type=int, help="draws, seeds from --seed on; gives mean and std (default: 1)")
    digits.add_argument("--class_groups", help="classes (default: the one that fits the model's class names)")

    sets = parser.add_argument_group("other models: FID, Inception Score, precision, recall, rewards, speed")
    sets.add_argument("--images", type=Path, metavar="DIR", help="evaluate a folder of images instead of a MODEL")
    sets.add_argument(
        "--reference", type=Path, metavar="PATH", help="real images: a folder, .npz (mu, sigma) or torch-fidelity's .pt"
    )
    sets.add_argument("--inception_weights", type=Path, metavar="FILE", help="torch-fidelity's file")
    sets.add_argument("--inception_batch_size", type=int, metavar="N", help="images at once (default: 50)")
    sets.add_argument("--images_dir", type=Path, metavar="DIR", help="keep the images there, as PNG (default: do not)")
    sets.add_argument("--rewards", type=reward_list, metavar="A,B", help="rewards to score with")
    sets.add_argument("--reward_kwargs", metavar="YAML", help="reward name -> what its class is made with")
    sets.add_argument("--prompt_template", help="prompt of a class {name}, for the rewards")
    sets.add_argument(
        "--class_names", type=path_or_id, metavar="FILE", help='"imagenet" or a name a line (default: the model\'s)'
    )
    add_launch_arguments(parser)  # taken by `marval_rl.cli.main`; here for --help


def reward_list(text: str) -> list[str]:
    """The type of --rewards: "a,b" or "[a, b]", as reward_funcs of a recipe."""
    try:
        return convert(text, list[str])
    except WrongType as expected:
        raise argparse.ArgumentTypeError(f"expected {expected}, got {text!r}") from None


def run(args: argparse.Namespace, extra: list[str]) -> None:
    """Evaluates what was named, by the digits or by Inception and rewards. Raises ValueError for options that do not
    go together."""
    if args.images is not None:
        from marval_rl.cli.evaluate_folder import evaluate_folder

        refuse_company("a folder of images")
        if args.model is not None:
            raise ValueError(f"give either the model {args.model} or the images {args.images}, not both")
        evaluate_folder(args)
    elif args.model is None:
        raise ValueError("give a MODEL to evaluate, or a folder of images (--images DIR)")
    elif args.dataset == DIGITS or paints_digits(load_config(args.model)):
        from marval_rl.cli.evaluate_digits import evaluate_digits

        refuse_company(f"{args.model}, which paints digits,")
        refuse(args, SETS_ONLY, f"{args.model} paints digits")
        args.num_images = DIGITS_IMAGES if args.num_images is None else args.num_images
        args.redraws = 1 if args.redraws is None else args.redraws
        evaluate_digits(args)
    else:
        from marval_rl.cli.evaluate_images import evaluate_images

        refuse(args, DIGITS_ONLY, f"{args.model} paints no digits")
        args.num_images = SET_IMAGES if args.num_images is None else args.num_images
        evaluate_images(args)


def paints_digits(config: MARConfig) -> bool:
    """Whether a model's images are like scikit-learn's digits."""
    classes = (None, DIGIT_NAMES, list(PARITY))  # other grey images may be as small
    return (config.image_channels, config.image_size, config.vae) == (1, 8, None) and config.class_names in classes


def refuse(args: argparse.Namespace, names: tuple[str, ...], reason: str) -> None:
    """Raises ValueError if one of these options was given."""
    given = [name for name in names if vars(args)[name] is not None]
    if given:
        raise ValueError(f"--{given[0]} has no effect here, because {reason}: leave it out")


def refuse_company(what: str) -> None:
    """Raises ValueError in one of several processes: all would write the same file."""
    if launched_processes() > 1:
        raise ValueError(f"{what} is evaluated by one process: leave out --num_processes, or the launcher")


def default_output(model: Path) -> Path:
    """evaluation.json in the run folder, or in the model's own; here for a model from the hub."""
    folder = model.parent if model.name == "final" or model.is_file() else model
    return (folder if folder.is_dir() else Path()) / "evaluation.json"


def write_results(results: dict[str, Any], output: Path) -> None:
    """Writes the figures as JSON."""
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(results, indent=2, allow_nan=False) + "\n")
    print(f"evaluation: {output}")
