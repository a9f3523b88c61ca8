"""Finding a reward: an entry-point name, `path/file.py:attribute`, `package.module:attribute`, or a callable."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
import os
import sys
from collections.abc import Callable, Mapping
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from types import ModuleType
from typing import Any

from marval_rl.errors import MarvalError, nearest
from marval_rl.paths import expand_path, expand_sure_paths
from marval_rl.rewarding.neighbours import folder_package, neighbours_of
from marval_rl.rewarding.process_state import global_settings, kept_settings

ENTRY_POINT_GROUP = "marval_rl.rewards"

# What every reward is called with, by keyword; the columns of the data set come on top.
STANDARD_ARGUMENTS = ("images", "prompts", "completions", "class_labels", "class_names")

IMPORT_ERRORS = (Exception, SystemExit)  # an author's code may raise anything; a script may end itself by sys.exit()

Reward = Callable[..., Any]  # returns B scores, or an awaitable of them
Offers = Mapping[str, Callable[[], Any]]  # parameter of a reward's class -> what makes the argument where it is taken


def load_reward(spec: str | Reward, offers: Offers | None = None, /, **kwargs: Any) -> Reward:
    """Return the reward that `spec` names, ready to be called.

    Args:
        spec: The name of an entry point of the group `marval_rl.rewards`, `path/file.py:attribute`,
            `package.module:attribute`, or a callable. A class is instantiated with kwargs.
        offers: What its class is made with besides, where it has a parameter of that name that kwargs do not set.

    Raises:
        ValueError: For an invalid spec (unknown names are answered with the nearest ones), for something that
            is not callable with the arguments of a reward, and for kwargs that are not accepted.
    """
    name = reward_name(spec)
    if isinstance(spec, str) and spec.rpartition(":")[0].endswith(".py"):
        spec = expand_path(spec)
    with kept_settings(global_settings()), neighbours_of(spec):
        target = _find(spec) if isinstance(spec, str) else spec
        if inspect.isclass(target):
            return _checked(name, _instantiate(name, target, _with_paths(name, kwargs), offers or {}), target)
    if kwargs:
        given = ", ".join(kwargs)
        raise ValueError(
            f"reward {name!r} is not a class, so it takes no reward_kwargs (given: {given}); make it a class"
        )
    return _checked(name, target, target)


def _checked(name: str, reward: Any, target: Any) -> Reward:
    if not callable(reward):
        remedy = "give its class a __call__ method" if inspect.isclass(target) else "it must be a function or a class"
        raise ValueError(f"reward {name!r} is not callable but a {type(reward).__name__}; {remedy}")
    _check_arguments(name, reward)
    return reward


def reward_name(spec: str | Reward) -> str:
    """The name of a reward in metrics and in reward_kwargs.

    For a string what was written (the entry point's name, or the attribute after the colon), for a callable its
    `name`, `__name__`, or the name of its class. A functools.partial has the name of what it wraps.
    """
    if isinstance(spec, str):
        return spec.rpartition(":")[2]
    for attribute in ("name", "__name__"):
        name = getattr(spec, attribute, None)  # both are optional in the protocol
        if isinstance(name, str):
            return "lambda" if name == "<lambda>" else name
    return reward_name(spec.func) if isinstance(spec, functools.partial) else type(spec).__name__


def is_differentiable(reward: Reward) -> bool:
    """Whether gradients reach the images through the reward: its optional attribute `differentiable`, or that of what
    a functools.partial wraps."""
    declared = getattr(reward, "differentiable", None)  # optional in the protocol
    if declared is None and isinstance(reward, functools.partial):
        return is_differentiable(reward.func)
    return bool(declared)


def list_rewards() -> list[tuple[str, str, str]]:
    """The registered rewards, by name: (name, `module:attribute`, first line of the docstring).

    A reward that cannot be imported is listed with the reason in place of its docstring.
    """
    listing = []
    points = {(point.name, point.value): point for point in entry_points(group=ENTRY_POINT_GROUP)}
    for (name, target), point in sorted(points.items()):
        try:
            lines = (inspect.getdoc(_load_entry_point(point)) or "no description").splitlines()
        except ValueError as error:
            lines = str(error).splitlines()
        listing.append((name, target, lines[0]))
    return listing


def _find(spec: str) -> Any:
    source, colon, attribute = spec.rpartition(":")
    if not colon:
        return _find_entry_point(spec)
    if not source or not attribute:
        raise ValueError(f"reward {spec!r} must look like path/file.py:attribute or package.module:attribute")
    module = _import_file(spec, Path(source)) if source.endswith(".py") else _import_module(spec, source)
    try:
        return getattr(module, attribute)
    except AttributeError as error:
        known = [name for name, value in vars(module).items() if callable(value) and not name.startswith("_")]
        raise ValueError(f"reward {spec!r}: {source} has no {attribute!r}{nearest(attribute, known)}") from error


def _find_entry_point(name: str) -> Any:
    points = entry_points(group=ENTRY_POINT_GROUP)
    if name not in points.names:
        known = sorted(points.names)
        raise ValueError(
            f"unknown reward {name!r}{nearest(name, known)}; registered: {', '.join(known) or 'none'}. "
            "For a reward of your own write path/file.py:attribute or package.module:attribute"
        )
    targets = {point.value: point for point in points if point.name == name}
    if len(targets) > 1:
        raise ValueError(f"reward {name!r} is registered more than once: {', '.join(targets)}; write one of these")
    return _load_entry_point(*targets.values())


def _load_entry_point(point: EntryPoint) -> Any:
    try:
        return point.load()
    except IMPORT_ERRORS as error:
        raise ValueError(f"reward {point.name!r} ({point.value}) cannot be imported: {describe(error)}") from error


def _import_file(spec: str, path: Path) -> ModuleType:
    if not path.is_file():
        raise ValueError(f"reward {spec!r}: the file {str(path)!r} does not exist (looked from {Path.cwd()})")
    module_name = f"{folder_package(path.resolve().parent)}.{path.stem}"
    module_spec = importlib.util.spec_from_file_location(module_name, path)
    assert module_spec is not None and module_spec.loader is not None  # the suffix is .py
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[module_name] = module  # dataclasses and pickle look their module up there
    try:
        module_spec.loader.exec_module(module)
    except IMPORT_ERRORS as error:
        del sys.modules[module_name]
        raise ValueError(f"reward {spec!r}: {path} cannot be imported: {describe(error)}") from error
    return module


def _import_module(spec: str, module_name: str) -> ModuleType:
    try:
        if "" not in sys.path and os.getcwd() not in sys.path:
            sys.path.append(os.getcwd())  # a console script does not look in the current folder by itself
        return importlib.import_module(module_name)
    except IMPORT_ERRORS as error:
        raise ValueError(f"reward {spec!r}: {module_name} cannot be imported: {describe(error)}") from error


def _with_paths(name: str, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The keyword arguments with ~ and $VARIABLE replaced in what can only be a path ("~/clip.pt")."""
    try:
        return {key: expand_sure_paths(value) for key, value in kwargs.items()}
    except ValueError as error:
        raise ValueError(f"reward {name!r}: {error}") from error


def _instantiate(name: str, target: type, kwargs: dict[str, Any], offers: Offers) -> Any:
    signature = inspect.signature(target)
    taken = [key for key in offers if key in signature.parameters and key not in kwargs]
    try:
        signature.bind(**kwargs)
    except TypeError as error:
        raise ValueError(f"reward {name!r} refuses its reward_kwargs: {error}; it takes {signature}") from error
    try:
        return target(**kwargs, **{key: offers[key]() for key in taken})
    except MarvalError:
        raise
    except IMPORT_ERRORS as error:
        raise ValueError(f"reward {name!r} cannot be made with {kwargs or 'no kwargs'}: {describe(error)}") from error


def _check_arguments(name: str, reward: Reward) -> None:
    """Refuse at once, and not after minutes of training, what cannot be called with the arguments of a reward."""
    try:
        signature = inspect.signature(reward)
    except ValueError as error:  # a function written in C
        raise ValueError(f"reward {name!r} does not say which arguments it takes: {error}; wrap it in a def") from error
    # A parameter of another name is a column of the data set, as in TRL; one more stands for columns it does not know.
    columns = [
        parameter.name
        for parameter in signature.parameters.values()
        if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
        and parameter.name not in STANDARD_ARGUMENTS
    ]
    try:
        signature.bind(**dict.fromkeys([*STANDARD_ARGUMENTS, *columns]), other_column=None)
    except TypeError as error:
        raise ValueError(
            f"reward {name!r} has the signature {signature}, but is called by keyword with "
            f"{', '.join(STANDARD_ARGUMENTS)} and the data set's columns: {error}; "
            "name those it needs and end with **columns"
        ) from error


def describe(error: BaseException) -> str:
    """The kind of an error and its text."""
    return f"{type(error).__name__}: {error}"
