"""Recipes: one flat YAML file gives the settings of a run, and `--key value` on the command line wins over it.

The rules are those of TRL's `TrlParser`: YAML sets defaults, an `env:` block sets environment variables, a key that no
dataclass has is an error. What we add: values from YAML are checked against the types of the dataclasses, errors name
the key, the value and the nearest known name, and a run can write down its own recipe.

    settings = read_settings("recipes/digits/teacher.yaml", ["--max_steps", "10"], (PretrainConfig,))
    configs = build_configs(settings, (PretrainConfig,))
    save_recipe("runs/teacher/recipe.yaml", resolved_recipe(configs, settings))
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import os
from collections.abc import Sequence
from enum import Enum
from pathlib import Path
from typing import Any, get_type_hints

import yaml
from trl import TrlParser

from marval_rl.errors import RecipeError
from marval_rl.paths import SHIPPED_RECIPES, expand_path, shipped_recipe
from marval_rl.recipes.unknown_settings import explain_unknown
from marval_rl.recipes.values import WrongType, convert, pick, rejoin_list
from marval_rl.runtime.settings import default_of
from marval_rl.text import dump_yaml, load_yaml, read_text, yaml_problem

# Settings that are paths, some of them or else a hub id or a name: ~ and $VARIABLE are replaced in them.
PATH_SETTINGS = (
    *("cache_dir", "class_names", "dataset", "eval_dataset", "eval_reference", "model", "teacher", "vae"),
    *("prompts", "eval_prompts"),
    *("deepspeed", "fsdp_config", "output_dir", "resume_from_checkpoint"),
)
COMMAND_OPTIONS = ("dry_run", "resume", "debug", "help")  # not settings, but worth suggesting for `--dryrun`
ONE_OR_SEVERAL = ("image_size",)  # lists of which a single element is written without brackets
SECRET_KEYS = ("hub_token",)  # never written down: run folders are shared


def read_settings(
    path: str | Path | None, overrides: Sequence[str], config_types: Sequence[type], *, only_known: bool = False
) -> dict[str, Any]:
    """Returns what the recipe and the command line set, by key, checked and converted; defaults are not in it.

    Paths have ~ and $VARIABLE replaced; relative ones start at the current folder. Also sets the environment
    variables of the recipe's `env:` block, whose values are the text that is written there.

    Args:
        only_known: Pass over the recipe's other keys, which belong to another command.

    Raises:
        RecipeError: For a file that is missing or is not a mapping, for an unknown key (with the nearest known ones),
            a key that is written twice, and a value of the wrong type.
    """
    hints = {name: hint for config_type in config_types for name, hint in get_type_hints(config_type).items()}
    fields = {f.name: f for config_type in config_types for f in dataclasses.fields(config_type) if f.init}
    settings: dict[str, Any] = {}
    if path is not None:
        recipe = _load_yaml(path)
        environment = recipe.pop("env", None) or {}
        for key, value in recipe.items():
            if key not in fields and only_known:
                continue
            if key not in fields:
                raise RecipeError(f"{path}: {explain_unknown(str(key), fields, f'unknown key {str(key)!r}')}")
            settings[key] = _checked(value, fields[key], hints[key], f"{path}: {key}")
        if not isinstance(environment, dict) or not all(isinstance(value, str) for value in environment.values()):
            raise RecipeError(f"{path}: env: expected a mapping of names to values, got {environment!r}")
        os.environ.update({str(name): value for name, value in environment.items()})
    for key, value in _command_line(overrides, config_types, fields).items():
        settings[key] = _checked(value, fields[key], hints[key], f"--{key}")
    return settings


def build_configs(settings: dict[str, Any], config_types: Sequence[type]) -> tuple:
    """Returns one instance of each dataclass; `settings` as `read_settings` returns them.

    Raises RecipeError with the text of a ValueError from `__post_init__`.
    """
    try:
        return TrlParser(dataclass_types=config_types).parse_dict(settings)
    except RecipeError:
        raise
    except ValueError as error:
        raise RecipeError(str(error)) from error


def peek_setting(path: str | Path | None, overrides: Sequence[str], key: str) -> Any:
    """Returns the value of one key before its dataclass is known, or None: `method` decides which dataclass it is."""
    parser = _OptionParser(add_help=False, allow_abbrev=False)
    parser.add_argument(f"--{key}")
    given = vars(parser.parse_known_args(list(overrides))[0])[key]
    if given is not None or path is None:
        return given
    return _load_yaml(path).get(key)


def resolved_recipe(configs: Sequence[Any], settings: dict[str, Any]) -> dict[str, Any]:
    """Returns the recipe of a run: `settings` first, then every other field of our own at its default.

    "Our own" are the fields that `transformers.TrainingArguments` does not have, or has with another default; its
    hundred others are left out where untouched. The values are those the constructors were given, not what
    `__post_init__` derived from them, so that reading the recipe again builds the same configuration. The `env:` block
    and access tokens are left out.
    """
    from transformers import TrainingArguments

    foreign = {f.name: default_of(f) for f in dataclasses.fields(TrainingArguments)}
    recipe = dict(settings)
    for config in configs:
        for f in dataclasses.fields(config):
            is_ours = f.name not in foreign or foreign[f.name] != default_of(f)
            if f.init and is_ours:
                recipe.setdefault(f.name, default_of(f))
    return {key: _plain(value) for key, value in recipe.items() if key not in SECRET_KEYS}


def save_recipe(path: str | Path, recipe: dict[str, Any]) -> None:
    """Writes a recipe as YAML, keys in their order; the folder is made if needed."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(dump_yaml(recipe), encoding="utf-8")


def find_recipes(folder: str | Path = ".") -> list[Path]:
    """Returns the YAML files under `folder`/recipes, or in `folder` itself where it has no such subfolder; sorted."""
    folder = Path(folder)
    root = folder / "recipes"
    files = root.rglob("*.yaml") if root.is_dir() else folder.glob("*.yaml")
    return sorted(files)


def shipped_recipes() -> list[str]:
    """The names of the recipes that ship with the library, such as digits/teacher.yaml; sorted."""
    names = (file.relative_to(SHIPPED_RECIPES) for file in SHIPPED_RECIPES.rglob("*.yaml"))
    return sorted(str(name) for name in names if name.parts[0] != "accelerate")  # configurations, not recipes


def resolve_recipe(name: str) -> str:
    """The path of the recipe that is meant: a local file, or else one that ships (digits/teacher.yaml).

    A name that is neither is returned as it is: reading it raises an error that lists the recipes.
    """
    try:
        path = expand_path(name)
    except ValueError as error:
        raise RecipeError(f"RECIPE: {error}") from error
    if Path(path).exists() or (shipped := shipped_recipe(path)) is None:
        return path
    return str(shipped)


def default_output_dir(recipe: str) -> str:
    """runs/<recipe>: runs/digits/teacher for recipes/digits/teacher.yaml and for digits/teacher.yaml, which ships."""
    path = Path(recipe).with_suffix("")
    if path.is_relative_to(SHIPPED_RECIPES):
        return str(Path("runs", path.relative_to(SHIPPED_RECIPES)))
    below = next((i for i in range(len(path.parts) - 2, -1, -1) if path.parts[i] == "recipes"), None)
    return str(Path("runs", *path.parts[below + 1 :])) if below is not None else str(Path("runs", path.name))


class _OptionParser(TrlParser):
    """TRL's option names (`--a_b` and `--a-b`, `--no_x` for a field that is true), with errors raised, not printed."""

    def error(self, message: str) -> None:
        raise RecipeError(message)


def _command_line(overrides: Sequence[str], config_types: Sequence[type], fields: dict[str, Any]) -> dict[str, Any]:
    """Returns the keys that the command line sets with their values as strings, lists of strings or booleans."""
    parser = _OptionParser(dataclass_types=config_types, add_help=False, allow_abbrev=False)
    for action in parser._actions:
        action.default, action.required = argparse.SUPPRESS, False  # keep only what was given
        if action.nargs != 0:
            action.type, action.choices = None, None  # checked as values from YAML are, with the same messages
    given, unknown = parser.parse_known_args(list(overrides))
    if unknown and unknown[0].startswith("-"):
        name = unknown[0].lstrip("-").split("=")[0]
        option = f"unknown option {unknown[0].split('=')[0]}"
        raise RecipeError(explain_unknown(name, [*fields, *COMMAND_OPTIONS], option))
    if unknown:
        raise RecipeError(f"unexpected argument {unknown[0]!r}: settings are given as --key value")
    return {key: rejoin_list(value) if isinstance(value, list) else value for key, value in vars(given).items()}


def _load_yaml(path: str | Path) -> dict[Any, Any]:
    path = Path(path)
    try:
        recipe = load_yaml(read_text(path), verbatim=("env",))
    except FileNotFoundError:
        raise RecipeError(f"no recipe at {path}{_recipes_near(path)}") from None
    except (OSError, UnicodeError) as error:
        raise RecipeError(f"cannot read the recipe {path}: {error}") from error
    except yaml.YAMLError as error:
        raise RecipeError(f"{path} is not valid YAML: {yaml_problem(error)}") from error
    if not isinstance(recipe, dict):
        raise RecipeError(f"{path}: a recipe is a mapping of `key: value` lines, this file holds {recipe!r:.60}")
    return recipe


def _recipes_near(path: Path) -> str:
    """The recipes that a wrong path may stand for: those of like name, or else all here and all that ship."""
    here = [str(file) for folder in (path.parent, Path(".")) for file in find_recipes(folder)]
    known = list(dict.fromkeys([*here, *shipped_recipes()]))
    alike = difflib.get_close_matches(str(path), known, n=3, cutoff=0.6)
    alike += [name for name in known if Path(name).stem == path.stem and name not in alike]
    if alike:
        return f"; did you mean {' or '.join(alike)}?"
    return (f"; recipes here: {', '.join(here)}" if here else "") + f"; shipped: {', '.join(shipped_recipes())}"


def _checked(value: Any, f: dataclasses.Field, hint: Any, where: str) -> Any:
    if value is None and f.default is None:
        return None
    try:
        converted = convert(value, hint)
        if f.name in ONE_OR_SEVERAL and isinstance(converted, list) and len(converted) == 1:
            (converted,) = converted
        if "choices" in f.metadata and converted is not None:
            converted = pick(converted, f.metadata["choices"])
        if isinstance(converted, str) and not converted.strip() and f.default != converted:
            remedy = "write null to unset it" if f.default is None else "leave it out for the default"
            raise RecipeError(f"{where}: is empty (an unset variable of the shell?); {remedy}")
        if f.name in PATH_SETTINGS and isinstance(converted, str) and not converted.startswith("{"):
            converted = expand_path(converted)
    except WrongType as expected:
        shown = "null" if value is None else repr(value)
        raise RecipeError(f"{where}: expected {expected}, got {shown}") from None
    except ValueError as error:
        raise error if isinstance(error, RecipeError) else RecipeError(f"{where}: {error}") from error
    return converted


def _plain(value: Any) -> Any:
    """The value in the types that YAML knows."""
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, dict):
        return {key: _plain(element) for key, element in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(element) for element in value]
    return value
