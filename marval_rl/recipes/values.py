"""Checks one value of a recipe, or of the command line, against the type that its dataclass field declares.

The parser of transformers accepts YAML values unchecked, so that `max_steps: many` would surface as an error deep
in training. Strings are read as the command line reads them: `--max_steps 3` and `max_steps: "3"` are the number.
"""

from __future__ import annotations

import types
from collections.abc import Iterable
from enum import Enum
from typing import Any, Literal, Union, get_args, get_origin

import yaml

from marval_rl.text import MAPPING, load_yaml, parse_mapping

TRUE_WORDS = ("true", "yes", "on", "t", "y", "1")
FALSE_WORDS = ("false", "no", "off", "f", "n", "0")
NULL = "null"
NONE_WORDS = ("none", NULL)
WRITTEN = ", written [a, b] or a,b"


class WrongType(Exception):
    """The value does not fit the type; the message says what was expected instead."""


def convert(value: Any, hint: Any) -> Any:
    """Returns `value` as the type `hint` (as `typing.get_type_hints` gives it); numbers may come as strings.

    Types that no recipe can spell (objects) are passed through. Raises WrongType.
    """
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return _convert_union(value, hint)
    if origin is Literal:
        return pick(value, arguments)
    if isinstance(hint, type) and issubclass(hint, Enum):
        return pick(value, [member.value for member in hint])
    if hint is bool:
        return _convert_bool(value)
    if hint in (int, float):
        return _convert_number(value, hint)
    if hint is str:
        if isinstance(value, bool):
            raise WrongType("text: YAML reads a bare yes, no, on or off as true or false, so write it in quotes")
        if not isinstance(value, str):
            raise WrongType("text (write it in quotes)" if isinstance(value, (int, float)) else "text")
        return value
    if hint is list or origin is list:
        return _convert_list(value, hint)
    if hint is dict or origin is dict:
        return _convert_mapping(value, hint)
    return value


def describe(hint: Any) -> str:
    """What a value of this type is, in words: "a list of numbers", "true or false"."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(describe(argument) for argument in arguments))
    if origin is Literal:
        return _one_of(arguments)
    if origin is list and arguments:
        return f"a list, each element {describe(arguments[0])}"
    if isinstance(hint, type) and issubclass(hint, Enum):
        return _one_of(member.value for member in hint)
    words = {bool: "true or false", int: "a whole number", float: "a number", str: "text", type(None): "null"}
    words |= {list: "a list", dict: "a mapping"}
    return words.get(origin or hint, str(hint))


def split_list(text: str) -> list:
    """The elements of a list that was written in one piece: "[a, b]" as YAML has it, "a, b", or "a" alone.

    Raises:
        WrongType: For a bracket that is not closed, and an element without text.
    """
    elements: Any = [element.strip() for element in text.split(",")]
    if text.lstrip().startswith("["):
        try:
            elements = load_yaml(text)
        except yaml.YAMLError:
            elements = None
    if not isinstance(elements, list) or "" in elements:
        raise WrongType(f"a list{WRITTEN}; [] is the empty one")
    return elements


def rejoin_list(words: list[str]) -> str | list[str]:
    """The words that the command line gave for a list, as one text where they are parts of one: `[1, 0.3]` and `1, 0.3`
    without quotes are two words."""
    in_one_piece = len(words) == 1 or words[0].startswith("[") or any(word.endswith(",") for word in words)
    return " ".join(words) if in_one_piece else words


def read_list(option: str, words: list[str], hint: Any) -> list:
    """The list of a command's option, written `a b`, `a,b` or `[a, b]`. Raises ValueError that names the option."""
    try:
        return convert(rejoin_list(words), hint)
    except WrongType as expected:
        raise ValueError(f"{option}: expected {expected}, got {' '.join(words)!r}") from None


def pick(value: Any, choices: Iterable[Any]) -> Any:
    """Returns the choice that `value` spells; a bare `no`, to YAML a boolean, counts as the word. Raises WrongType."""
    choices = list(choices)
    for choice in choices:
        if value == choice and type(value) is type(choice):
            return choice
    word = {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)
    for choice in choices:
        if word == str(choice):
            return choice
    raise WrongType(_one_of(choices))


def _one_of(choices: Iterable[Any]) -> str:
    return "one of " + ", ".join(str(choice) for choice in choices)


def _convert_union(value: Any, hint: Any) -> Any:
    members = [member for member in get_args(hint) if member is not type(None)]
    optional = len(members) < len(get_args(hint))
    if optional and value is None:
        return None
    enums = [member for member in members if isinstance(member, type) and issubclass(member, Enum)]
    if enums:  # transformers writes `SchedulerType | str` for the names of a SchedulerType
        return convert(value, enums[0])
    if str in members and isinstance(value, str):
        if optional and value == NULL:
            return None
        written = {"[": list, "{": dict}.get(value.lstrip()[:1])  # `--report_to "[wandb, tensorboard]"`
        for member in members:
            if written is not None and written in (member, get_origin(member)):
                return convert(value, member)
        return value  # "none" may be a name: report_to has it
    if optional and isinstance(value, str) and value.lower() in NONE_WORDS:
        return None
    for member in members:
        try:
            return convert(value, member)
        except WrongType as expected:
            if len(members) == 1 and isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
                raise WrongType(str(expected)) from None  # it says what is wrong in the YAML
    has_list = any(list in (member, get_origin(member)) for member in members)
    raise WrongType(f"{describe(hint)}{WRITTEN if has_list else ''}")


def _convert_bool(value: Any) -> bool:
    if isinstance(value, bool):
        return value
    word = value.lower() if isinstance(value, str) else ""
    if word not in TRUE_WORDS + FALSE_WORDS:
        raise WrongType("true or false")
    return word in TRUE_WORDS


def _convert_number(value: Any, kind: type[int] | type[float]) -> int | float:
    if isinstance(value, str):
        try:
            return kind(value)
        except ValueError:
            raise WrongType(describe(kind)) from None
    if isinstance(value, bool) or not isinstance(value, (int, kind)):
        raise WrongType(describe(kind))
    return value


def _convert_list(value: Any, hint: Any) -> list:
    arguments = get_args(hint)
    if isinstance(value, str):
        value = split_list(value)
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        value = [value]  # one element needs no brackets
    if not isinstance(value, list):
        raise WrongType(describe(hint))
    try:
        return [convert(element, arguments[0]) for element in value] if arguments else value
    except WrongType:
        raise WrongType(f"{describe(hint)}{WRITTEN}") from None


def _convert_mapping(value: Any, hint: Any) -> dict:
    if isinstance(value, str):  # from the command line, as JSON or YAML
        try:
            value = parse_mapping(value)
        except ValueError as error:
            raise WrongType(str(error)) from None
    if not isinstance(value, dict):
        raise WrongType(MAPPING)
    arguments = get_args(hint)
    if not arguments:
        return value
    return {convert(key, arguments[0]): convert(element, arguments[1]) for key, element in value.items()}
