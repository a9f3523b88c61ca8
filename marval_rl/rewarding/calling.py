"""Calling rewards: the asynchronous ones all at once, and whatever breaks the contract with the reward's name."""

from __future__ import annotations

import asyncio
import inspect
import numbers
import os
import threading
from collections.abc import Awaitable, Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor

from marval_rl.errors import RewardError
from marval_rl.rewarding.loading import Reward


def call_rewards(rewards: Mapping[str, Reward], arguments: Mapping[str, Any], with_grad: bool) -> dict[str, Tensor]:
    """Call every reward with the same keywords -> {name: float32 [B] on the device of the images, NaN for None}.

    What returns an awaitable (`async def`) is awaited, all of them at the same time, after the others have been called.

    Raises RewardError where a reward raises, changes the images, returns anything but B finite numbers or Nones, or,
    with_grad, returns scores without a gradient.
    """
    images = arguments["images"]
    returned: dict[str, Any] = {}
    try:
        for name, reward in rewards.items():
            version = _version(images)
            try:
                returned[name] = reward(**arguments)
            except Exception as error:  # a reward may raise anything
                raise _raised(name, error) from error
            _check_unchanged(images, version, [name])
    except BaseException:
        for value in returned.values():
            if inspect.iscoroutine(value):
                value.close()  # or Python complains that it was never awaited
        raise
    awaited = {name: value for name, value in returned.items() if inspect.isawaitable(value)}
    if awaited:
        version = _version(images)
        returned |= _await_all(awaited, with_grad)
        _check_unchanged(images, version, list(awaited))
    scores = {name: _to_scores(name, value, images) for name, value in returned.items()}
    if with_grad:
        _check_gradients(scores)
    return scores


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
        if isinstance(outcome, (Exception, asyncio.CancelledError)):
            raise _raised(name, outcome) from outcome
        if isinstance(outcome, BaseException):
            raise outcome
    return dict(zip(awaited, outcomes, strict=True))


async def _outcome(awaitable: Awaitable[Any]) -> Any:
    """What it returns or raises. Nothing may escape: a SystemExit would end the loop, and its caller wait for ever."""
    try:
        return await awaitable
    except BaseException as error:
        return error


@cache
def _event_loop(process: int) -> asyncio.AbstractEventLoop:
    """One loop a process (threads do not survive a fork), in a thread of its own: it does not matter whether the caller
    has a running loop, as in a notebook, and the connections that a reward keeps stay usable from call to call."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="rewards", daemon=True).start()
    return loop


def _raised(name: str, error: BaseException) -> RewardError:
    return RewardError(f"reward {name!r} raised {type(error).__name__}: {error}")


def _version(images: Tensor) -> int | None:
    """A number that changes with every change in place; tensors of the inference mode have none."""
    return None if images.is_inference() else images._version


def _check_unchanged(images: Tensor, version: int | None, names: list[str]) -> None:
    if _version(images) != version:
        culprit = " or ".join(map(repr, names))
        raise RewardError(f"reward {culprit} changed the images in place; it must work on a copy (images.clone())")


def _check_gradients(scores: Mapping[str, Tensor]) -> None:
    for name, values in scores.items():
        if not values.requires_grad:
            raise RewardError(
                f"reward {name!r} declares itself differentiable, but no gradient leads from its scores to the images; "
                "it must return a tensor computed from them without .item(), .detach() or torch.no_grad()"
            )


def _to_scores(name: str, returned: Any, images: Tensor) -> Tensor:
    """What a reward returned -> float32 [B] on the device of the images, NaN for None."""
    count = len(images)
    if isinstance(returned, Tensor):
        if returned.shape != (count,):
            raise RewardError(f"reward {name!r} returned a tensor of the shape {list(returned.shape)}, not [{count}]")
        if returned.is_complex():
            raise RewardError(f"reward {name!r} returned complex numbers")
        scores, left_out = returned.to(images.device, torch.float32), torch.zeros(count, dtype=torch.bool)
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

    broken = ~scores.detach().isfinite().cpu() & ~left_out
    if broken.any():
        index = int(broken.nonzero()[0])
        value = float(scores.detach()[index])
        raise RewardError(
            f"reward {name!r}: the score of sample {index} is {value:g} in float32; "
            "a score must be finite, or None to leave the sample out"
        )
    return scores


def _check_scalar(name: str, index: int, value: Any) -> None:
    is_scalar_tensor = isinstance(value, Tensor) and value.ndim == 0 and not value.is_complex()
    if not (value is None or is_scalar_tensor or isinstance(value, numbers.Real)):  # bool and numpy's are Real
        raise RewardError(
            f"reward {name!r}: the score of sample {index} is {value!r} ({type(value).__name__}), not a number or None"
        )


def _join(values: list[Any], device: torch.device) -> Tensor:
    """Numbers, scalar tensors (their graphs are kept) and Nones -> float32 [B], NaN for None."""
    numbers_only = [torch.nan if value is None else value for value in values]
    if any(isinstance(value, Tensor) for value in numbers_only):
        return torch.stack([torch.as_tensor(value).to(device, torch.float32) for value in numbers_only])
    return torch.tensor(numbers_only, dtype=torch.float32, device=device)  # one copy to the device
