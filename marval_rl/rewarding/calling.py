"""Calling rewards: the asynchronous ones at the same time, and whatever breaks the contract with its reward's name."""

from __future__ import annotations

import asyncio
import copy
import inspect
import numbers
import os
import threading
from collections.abc import Awaitable, Coroutine, Mapping
from concurrent.futures import Future
from functools import cache
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor

from marval_rl.errors import RewardError
from marval_rl.rewarding.loading import Reward
from marval_rl.rewarding.process_state import GLOBAL_SETTINGS, global_settings


class RewardCalls:
    """Calls of several rewards with the same keywords, for the parts of one batch.

    What is `async def` is called for each part as it comes, so that it waits, for a server or another device, while
    the caller makes the next part, and while the other rewards are called. Those are called once, for all parts
    together, when the scores are asked for.

    Each reward has its own copies of the images, the labels, the lists and the columns, so that nothing that it does
    to them, now or later, reaches another reward or the training.

    Args:
        rewards: By their names.
        with_grad: Whether scores keep the graph from the images.
    """

    def __init__(self, rewards: Mapping[str, Reward], with_grad: bool) -> None:
        self._rewards = rewards
        self._with_grad = with_grad
        self._asynchronous = [name for name, reward in rewards.items() if _is_asynchronous(reward)]
        self._parts: list[Mapping[str, Any]] = []
        self._answers: dict[str, list[Future[Any]]] = {name: [] for name in self._asynchronous}
        self._given: dict[str, list[Tensor]] = {name: [] for name in rewards}  # the images of each reward

    def begin(self, arguments: Mapping[str, Any]) -> None:
        """Begin with a part of the batch: images [b, 3, H, W], and lists and tensors of that length."""
        if not self._parts:
            self._settings = global_settings()
        self._parts.append(arguments)
        for name in self._asynchronous:
            self._answers[name].append(self._submit(name, self._rewards[name], arguments))

    def scores(self) -> dict[str, Tensor]:
        """The scores of all parts -> {name: float32 [B] on the device of the images, NaN for None}.

        Raises:
            RewardError: Where a reward raises, changes the images or a setting of the whole process, returns anything
                but B finite numbers or Nones, or, with_grad, returns scores without a gradient. All of them have ended
                by then.
        """
        try:
            scores = self._call_plain() | self._await_answers()
        except BaseException:  # Ctrl-C, too
            self.cancel()
            raise
        scores = {name: scores[name] for name in self._rewards}  # in their order
        if self._with_grad:
            _check_gradients(scores)
        return scores

    def cancel(self) -> None:
        """Gives up what has not been answered."""
        for answer in chain.from_iterable(self._answers.values()):
            answer.cancel()

    def _call_plain(self) -> dict[str, Tensor]:
        """Call what is not `async def`. What returns an awaitable nevertheless is awaited with the others."""
        scores: dict[str, Tensor] = {}
        arguments = _joined(self._parts)
        for name, reward in self._rewards.items():
            if name in self._asynchronous:
                continue
            own = self._own(name, arguments)
            with torch.set_grad_enabled(self._with_grad):
                settings = global_settings()
                try:
                    returned = reward(**own)
                except KeyboardInterrupt:  # the user's
                    raise
                except BaseException as error:  # a reward may raise anything, SystemExit too
                    raise _raised(name, error) from error
                _check_settings(settings, [name, *self._answers])
            if inspect.isawaitable(returned):
                self._answers[name] = [self._schedule(_outcome(returned, self._with_grad))]
            else:  # read at once: the next reward may reuse the memory
                scores[name] = self._read(name, 0, returned, arguments["images"])
        return scores

    def _await_answers(self) -> dict[str, Tensor]:
        outcomes = {name: [answer.result() for answer in answers] for name, answers in self._answers.items()}
        for name, outcome in ((name, outcome) for name, parts in outcomes.items() for outcome in parts):
            if isinstance(outcome, KeyboardInterrupt):
                raise outcome
            if isinstance(outcome, BaseException):
                raise _raised(name, outcome) from outcome
        if outcomes:
            _check_settings(self._settings, list(outcomes))
        images = [part["images"] for part in self._parts]
        scores = {}
        for name, parts in outcomes.items():
            seen = images if name in self._asynchronous else [torch.cat(images)]
            read = [self._read(name, index, *pair) for index, pair in enumerate(zip(parts, seen, strict=True))]
            scores[name] = torch.cat(read)
        return scores

    def _submit(self, name: str, reward: Reward, arguments: Mapping[str, Any]) -> Future[Any]:
        own = self._own(name, arguments)

        async def call() -> Any:  # so that an argument that is missing is an outcome, too
            return await reward(**own)

        return self._schedule(_outcome(call(), self._with_grad))

    def _schedule(self, coroutine: Coroutine[Any, Any, Any]) -> Future[Any]:
        return asyncio.run_coroutine_threadsafe(coroutine, _event_loop(os.getpid()))

    def _own(self, name: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments in memory that nobody else sees; the images keep their graph."""
        own = {key: _copy_of(value) for key, value in arguments.items() if key != "images"}
        own["images"] = own["completions"] = arguments["images"].clone()  # completions: the word TRL's rewards know
        self._given[name].append(own["images"])
        return own

    def _read(self, name: str, part: int, returned: Any, images: Tensor) -> Tensor:
        if not torch.equal(self._given[name][part], images):  # the values: NumPy, and `.data`, leave no other trace
            raise RewardError(f"reward {name!r} changed the images in place; it must work on a copy (images.clone())")
        return _read_scores(name, returned, images, self._with_grad)


def _is_asynchronous(reward: Reward) -> bool:
    return inspect.iscoroutinefunction(reward) or inspect.iscoroutinefunction(type(reward).__call__)


def _joined(parts: list[Mapping[str, Any]]) -> Mapping[str, Any]:
    """The arguments of all parts as those of one batch."""
    if len(parts) == 1:
        return parts[0]
    joined: dict[str, Any] = {}
    for name in parts[0]:
        values = [part[name] for part in parts]
        joined[name] = torch.cat(values) if isinstance(values[0], Tensor) else list(chain.from_iterable(values))
    return joined


def _copy_of(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.clone()
    try:
        return copy.deepcopy(value)
    except Exception:  # an open file, a lock: a column may hold anything, and these cannot be copied
        return value


async def _outcome(awaitable: Awaitable[Any], with_grad: bool) -> Any:
    """What it returns or raises. Nothing may escape: a SystemExit would end the loop, and its caller wait for ever."""
    torch.set_grad_enabled(with_grad)  # the mode of a thread: the caller's is unknown here
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
