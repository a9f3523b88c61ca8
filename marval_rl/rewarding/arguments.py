"""The arguments that name one reward on the command line."""

from __future__ import annotations

import argparse
from typing import Any

from marval_rl.paths import path_or_id
from marval_rl.text import parse_mapping

PROMPTS_HELP = 'text, or JSON with "prompt", "class_name", "class_label" and columns of your own'


def add_reward_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "spec", type=path_or_id, metavar="SPEC", help="name, path/file.py:attribute or package.module:attribute"
    )
    parser.add_argument("--reward_kwargs", default="{}", metavar="YAML", help="what the reward's class is made with")


def parse_kwargs(text: str) -> dict[str, Any]:
    """The mapping of --reward_kwargs, in YAML or JSON.

    Raises:
        ValueError: For anything else.
    """
    try:
        return parse_mapping(text)
    except ValueError as error:
        raise ValueError(f"--reward_kwargs must be {error}, in YAML or JSON, not {text!r}") from None
