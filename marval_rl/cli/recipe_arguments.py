"""The arguments that `pretrain`, `distill` and `train` share."""

from __future__ import annotations

import argparse

from marval_rl.cli.launch import add_launch_arguments
from marval_rl.cli.main import path_or_id

LATEST = "latest"


def add_recipe_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds RECIPE, --dry_run, --resume and the options of a launch; all else on the command line is a setting (`--key
    value`).

    `args.resume` is None (start anew), LATEST (the newest checkpoint of the output folder), "auto" (that, or start anew
    where there is none) or the path of a checkpoint.
    The command line launches before the command is run, so here the latter are for the help alone.
    """
    parser.usage = f"{parser.prog} RECIPE [--dry_run] [--resume [CHECKPOINT]] [--num_processes N ...] [--key value ...]"
    parser.add_argument(
        "recipe",
        nargs="?",
        metavar="RECIPE",
        help="YAML file of settings, or the name of one that ships; --key value wins",
    )
    parser.add_argument("--dry_run", action="store_true", help="print what would be run, and train nothing")
    parser.add_argument(
        "--resume",
        type=path_or_id,
        nargs="?",
        const=LATEST,
        metavar="CHECKPOINT",
        help="resume from this checkpoint folder; without a value, from the newest one of the run; auto: from the "
        "newest one, or start anew where no checkpoint was written yet",
    )
    add_launch_arguments(parser)
