"""The arguments that name one reward on the command line."""

from __future__ import annotations

import argparse
import json
from typing import Any

PROMPTS_HELP = 'text, or JSON with "prompt", "class_name", "class_label" and columns of your own'


def add_reward_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("spec", metavar="SPEC", help="name, path/file.py:attribute or package.module:attribute")
    parser.add_argument("--reward_kwargs", default="{}", metavar="JSON", help="what the reward's class is made with")


def parse_kwargs(text: str) -> dict[str, Any]:
    """The JSON object of --reward_kwargs. Raises ValueError for anything else."""
    try:
        kwargs = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"--reward_kwargs is not valid JSON: {error}") from error
    if not isinstance(kwargs, dict):
        raise ValueError(f'--reward_kwargs must be a JSON object such as {{"score": "accuracy"}}, got {text}')
    return kwargs
