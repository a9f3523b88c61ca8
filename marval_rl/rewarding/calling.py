"""Calling rewards: the asynchronous ones all at once, and whatever breaks the contract with the reward's name."""

from __future__ import annotations

import asyncio
import copy
import inspect
import numbers
import os
import threading
from collections.abc import Awaitable, Mapping
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from marval_rl.errors import RewardError
from marval_rl.rewarding.loading import Reward
from marval_rl.rewarding.process_state import GLOBAL_SETTINGS, global_settings


def call_rewards(rewards: Mapping[str, Reward], arguments: Mapping[str, Any], with_grad: bool) -> dict[str, Tensor]:
    """Call every reward with the same keywords -> {name: float32 [B] on the device of the images, NaN for None}.

    Each reward has its own copies of the images, the labels, the lists and the columns, so that nothing that it does
    to them, now or later, reaches another reward or the training. What returns an awaitable (`async def`) is awaited,
    all of them at the same time, after the others have been called.

    Raises:
        RewardError: Where a reward raises, changes the images or a setting of the whole process, returns anything but B
            finite numbers or Nones, or, with_grad, returns scores without a gradient.
    """
    images = arguments["images"]
    scores: dict[str, Tensor] = {}
    awaited: dict[str, Awaitable[Any]] = {}
    given: dict[str, Tensor] = {}  # the images of each reward
    try:
        for name, reward in rewards.items():
            own = _copies_of(arguments)
            given[name] = own["images"]
            with torch.set_grad_enabled(with_grad):
                settings = global_settings()
                try:
                    returned = reward(**own)
                except KeyboardInterrupt:  # the user's
                    raise
                except BaseException as error:  # a reward may raise anything, SystemExit too
                    raise _raised(name, error) from error
                _check_settings(settings, [name])
            if inspect.isawaitable(returned):
                awaited[name] = returned
            else:  # read at once: the next reward may reuse the memory
                _check_unchanged(name, given[name], images)
                scores[name] = _read_scores(name, returned, images, with_grad)
    except BaseException:
        for value in awaited.values():
            if inspect.iscoroutine(value):
                value.close()  # or Python complains that it was never awaited
        raise
    if awaited:
        settings = global_settings()
        answers = _await_all(awaited, with_grad)
        _check_settings(settings, list(awaited))
        for name, returned in answers.items():
            _check_unchanged(name, given[name], images)
            scores[name] = _read_scores(name, returned, images, with_grad)
    scores = {name: scores[name] for name in rewards}  # in their order
    if with_grad:
        _check_gradients(scores)
    return scores


def _copies_of(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments in memory that nobody else sees; the images keep their graph."""
    own = {name: _copy_of(value) for name, value in arguments.items() if name != "images"}
    own["images"] = own["completions"] = arguments["images"].clone()  # completions: the word TRL's rewards know
    return own


def _copy_of(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.clone()
    try:
        return copy.deepcopy(value)
    except Exception:  # an open file, a lock: a column may hold anything, and these cannot be copied
        return value


def _await_all(awaited: Mapping[str, Awaitable[Any]], with_grad: bool) -> dict[str, Any]:
    """What the awaitables return, by name; all of them have ended before the first error is raised."""

    async def gather() -> list[Any]:
        with torch.set_grad_enabled(with_grad):  # the mode of a thread; the caller's is unknown here
            return await asyncio.gather(*(_outcome(value) for value in awaited.values()))

    future = asyncio.run_coroutine_threadsafe(gather(), _event_loop(os.getpid()))
    try:
        outcomes = future.result()
    except BaseException:  # Ctrl-C
        future.cancel()
        raise
    for name, outcome in zip(awaited, outcomes, strict=True):
        if isinstance(outcome, KeyboardInterrupt):
            raise outcome
        if isinstance(outcome, BaseException):
            raise _raised(name, outcome) from outcome
    return dict(zip(awaited, outcomes, strict=True))


async def _outcome(awaitable: Awaitable[Any]) -> Any:
    """What it returns or raises. Nothing may escape: a SystemExit would end the loop, and its caller wait for ever."""
    try:
        return await awaitable
    except BaseException as error:
        return error


@cache
def _event_loop(process: int) -> asyncio.AbstractEventLoop:
    """One loop per process (threads do not survive a fork), in its own thread: the caller may have a running loop, as
    in a notebook, and the connections that a reward keeps stay usable from call to call."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="rewards", daemon=True).start()
    return loop


def _raised(name: str, error: BaseException) -> RewardError:
    return RewardError(f"reward {name!r} raised {type(error).__name__}: {error}")


def _check_unchanged(name: str, given: Tensor, images: Tensor) -> None:
    """Compares the values: NumPy, and `.data`, change memory without a trace in the tensor."""
    if not torch.equal(given, images):  # waits for the device
        raise RewardError(f"reward {name!r} changed the images in place; it must work on a copy (images.clone())")


def _check_settings(before: Mapping[str, Any], names: list[str]) -> None:
    """Refuses a change of what the whole process shares."""
    culprit = " or ".join(map(repr, names))
    for what, value in global_settings().items():
        if value != before[what]:
            raise RewardError(
                f"reward {culprit} changed the {what} of the whole process from {before[what]} to {value}; "
                f"{GLOBAL_SETTINGS[what].remedy}"
            )


def _check_gradients(scores: Mapping[str, Tensor]) -> None:
    for name, values in scores.items():
        if not values.requires_grad:
            raise RewardError(
                f"reward {name!r} declares itself differentiable, but no gradient leads from its scores to the images; "
                "it must return a tensor computed from them without .item(), .detach() or torch.no_grad()"
            )


def _read_scores(name: str, returned: Any, images: Tensor, with_grad: bool) -> Tensor:
    """`_to_scores` in new memory, without a graph unless with_grad."""
    try:
        scores = _to_scores(name, returned, images)
    except RewardError:
        raise
    except Exception as error:  # a tensor without values, an integer too large for a float, ...
        raise RewardError(f"reward {name!r} returned what cannot be read as scores: {error}") from error
    return scores if with_grad else scores.detach()


def _to_scores(name: str, returned: Any, images: Tensor) -> Tensor:
    """What a reward returned -> float32 [B] on the device of the images, NaN for None."""
    count = len(images)
    if isinstance(returned, Tensor):
        if returned.shape != (count,):
            raise RewardError(f"reward {name!r} returned a tensor of the shape {list(returned.shape)}, not [{count}]")
        if returned.is_complex():
            raise RewardError(f"reward {name!r} returned complex numbers")
        scores, left_out = returned.to(images.device, torch.float32, copy=True), torch.zeros(count, dtype=torch.bool)
    elif isinstance(returned, list | tuple):
        if len(returned) != count:
            raise RewardError(f"reward {name!r} returned {len(returned)} scores for {count} images")
        for index, value in enumerate(returned):
            _check_scalar(name, index, value)
        scores = _join(list(returned), images.device)
        left_out = torch.tensor([value is None for value in returned])
    else:
        kind = type(returned).__name__
        raise RewardError(
            f"reward {name!r} returned a {kind}; it must be a list of numbers (or None) or a tensor [{count}]"
        )

    sound = scores.detach().isfinite().cpu() | left_out  # waits for the device, so that an error names its reward
    if not sound.all():
        index = int((~sound).nonzero()[0])
        value = float(scores.detach()[index])
        raise RewardError(
            f"reward {name!r}: the score of sample {index} is {value:g} in float32; "
            "a score must be finite, or None to leave the sample out"
        )
    return scores


def _check_scalar(name: str, index: int, value: Any) -> None:
    is_scalar_tensor = isinstance(value, Tensor) and value.ndim == 0 and not value.is_complex()
    if not (value is None or is_scalar_tensor or isinstance(value, numbers.Real | np.bool_)):  # NumPy's others are Real
        raise RewardError(
            f"reward {name!r}: the score of sample {index} is {value!r:.80} ({type(value).__name__}), "
            "not a number or None"
        )


def _join(values: list[Any], device: torch.device) -> Tensor:
    """Numbers, scalar tensors (their graphs are kept) and Nones -> float32 [B], NaN for None."""
    numbers_only = [
        value if isinstance(value, Tensor) else torch.nan if value is None else float(value) for value in values
    ]
    if any(isinstance(value, Tensor) for value in numbers_only):
        return torch.stack([torch.as_tensor(value).to(device, torch.float32) for value in numbers_only])
    return torch.tensor(numbers_only, dtype=torch.float32, device=device)  # one copy to the device
