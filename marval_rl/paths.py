"""Paths as users write them, and the files that ship with the library."""

from __future__ import annotations

import argparse
import json
import os
import re
from importlib.resources import files
from pathlib import Path
from typing import Any

from marval_rl.text import read_text

SHIPPED_RECIPES = Path(str(files("marval_rl.shipped_recipes")))  # recipes/ of a checkout
DEEPSPEED_PRESETS = ("zero1", "zero2", "zero3", "zero2_offload", "zero3_offload")  # files in presets/

_VARIABLE = re.compile(r"\$(?:\{([A-Za-z_]\w*)\}|([A-Za-z_]\w*))")
# In the arguments of a reward, of which only its author knows which are paths.
_SURE_PATH = re.compile(r"(?P<scheme>local-dir:)?(?P<path>(?:~[\w.-]*/|\$\w+(?:/|$)|\$\{\w+\}(?:/|$)).*)")


def expand_path(path: str) -> str:
    """Replaces ~, ~user, $VARIABLE and ${VARIABLE} as a shell does; all else, such as a hub id, stays as it is.

    Raises:
        ValueError: For a user or a variable that does not exist, and for white space that no path should end with.
    """
    if path != path.strip() or any(character in path for character in "\n\r\t\0"):
        raise ValueError(f"the path {path!r} begins or ends with white space, or holds a tab or a line break")

    def value_of(variable: re.Match) -> str:
        name = variable[1] or variable[2]
        if not os.environ.get(name):
            raise ValueError(f"the path {path!r} names the variable {name}, which is not set")
        return os.environ[name]

    expanded = os.path.expanduser(_VARIABLE.sub(value_of, path))
    if expanded.startswith("~"):
        user = expanded[1:].split("/")[0]
        whose = f"there is no user {user!r}" if user else "no home folder is known"
        raise ValueError(f"the path {path!r} cannot be expanded: {whose}; write ./{path} for a name with a tilde")
    return expanded


def looks_like_hub_id(name: str | Path) -> bool:
    """Whether a name that is not a path here can be owner/name on the hub. models/ and runs/ are the folders of recipes
    and docs, not owners."""
    return str(name).count("/") == 1 and not str(name).startswith((".", "/", "~", "models/", "runs/"))


def path_or_id(text: str) -> str:
    """The type of a command-line argument that is a path or something else, such as a hub id."""
    if not text:
        raise argparse.ArgumentTypeError("is empty (an unset variable of the shell?)")
    try:
        return expand_path(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def expand_sure_paths(value: object) -> object:
    """Expands what can only be a path ("~/clip.pt", "$WEIGHTS/clip.pt", "local-dir:~/clip") in a value or in the values
    of mappings and lists within it. Raises ValueError as `expand_path` does."""
    if isinstance(value, dict):
        return {key: expand_sure_paths(element) for key, element in value.items()}
    if isinstance(value, list):
        return [expand_sure_paths(element) for element in value]
    if not isinstance(value, str) or (found := _SURE_PATH.fullmatch(value)) is None:
        return value
    return (found["scheme"] or "") + expand_path(found["path"])


def shipped_recipe(name: str | Path) -> Path | None:
    """The file that ships under a name such as digits/teacher.yaml or recipes/digits/teacher.yaml, if there is one."""
    path = Path(name)
    if path.is_absolute() or ".." in path.parts:
        return None
    if path.parts[:1] == ("recipes",):
        path = path.relative_to("recipes")
    file = SHIPPED_RECIPES / path
    return file if file.is_file() and file.suffix == ".yaml" else None


def deepspeed_config(value: str | dict[str, Any] | None) -> dict[str, Any] | None:
    """`TrainingArguments.deepspeed` as a mapping, read from a preset, a file or JSON.

    Raises:
        ValueError: For a name that is neither a preset nor a file, and for what is not JSON.
    """
    if not isinstance(value, str):
        return value
    file = Path(value)
    if value in DEEPSPEED_PRESETS and not file.is_file():
        file = Path(__file__).parent / "presets" / f"{value}.json"
    try:
        if value.startswith("{"):
            return json.loads(value)
        if file.is_file():
            return json.loads(read_text(file))
    except (OSError, ValueError) as error:
        raise ValueError(f"deepspeed {value} cannot be read as JSON: {error}") from error
    raise ValueError(f"deepspeed {value!r} is neither a file nor one of {', '.join(DEEPSPEED_PRESETS)}")
