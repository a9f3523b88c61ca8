"""The checks of `marval-rl rewards check`: a reward is tried on made-up images and held to each rule."""

from __future__ import annotations

import dis
import functools
import inspect
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from marval_rl.errors import MarvalError, RewardError
from marval_rl.rewarding.contract_gradients import check_gradient
from marval_rl.rewarding.contract_probe import FAILS, NUM_IMAGES, OK, WARNING, Captions, Probe, Verdict
from marval_rl.rewarding.loading import STANDARD_ARGUMENTS, describe
from marval_rl.rewarding.reward_set import RewardSet

OTHER_SIZES = ((8, 8), (33, 47), (256, 256))  # height, width
BATCH_SIZES = (1, 32)  # of the timing
TIMED_SECONDS = 0.5
EXACT, ROUGH = 1e-3, 0.05  # differences, as a share of the spread of the scores, that are rounding; that are suspicious


@dataclass(frozen=True)
class Finding:
    """One line of the table. status: "ok"; "warning", works but with a consequence one should know; or "fails"."""

    check: str
    status: str
    detail: str


def check_contract(rewards: RewardSet, captions: Captions, image_size: int, device: str) -> Iterator[Finding]:
    """Yield the findings about the only reward of a set; the other checks are left out where it gives no scores at all.

    image_size is the side of the square images; other sizes are tried as well. Nothing that the reward raises or
    returns gets through, and the global random state is left as it was.
    """
    probe = Probe(rewards, captions, image_size, device)
    yield Finding("keywords", OK, _keywords(rewards))
    for name, check in CHECKS.items():
        try:
            status, detail = check(probe)
        except Exception as error:  # the author's reward may bring about anything, and the rest is still worth knowing
            status, detail = FAILS, str(error) if isinstance(error, MarvalError) else describe(error)
        yield Finding(name, status, detail)
        if name == "scores" and status == FAILS:
            return


def _keywords(rewards: RewardSet) -> str:
    parameters = inspect.signature(rewards.rewards[0]).parameters.values()
    named = [parameter.name for parameter in parameters if parameter.kind is not parameter.VAR_KEYWORD]
    columns = [name for name in named if name not in STANDARD_ARGUMENTS]
    words = f"uses {', '.join(named) or 'whatever it is given'}"
    return f"{words} ({', '.join(columns)}: of the data set)" if columns else words


def _scores(probe: Probe) -> Verdict:
    """Keywords, number, type and range of the scores."""
    kept = probe.scores[~probe.scores.isnan()]
    if not len(kept):
        return WARNING, f"None for all {NUM_IMAGES} images: they would not train"
    low, high, left_out = float(kept.min()), float(kept.max()), NUM_IMAGES - len(kept)
    if low == high and len(kept) > 1:
        return WARNING, f"{low:g} for all {len(kept)} images, which are different: nothing can be learned from that"
    return OK, f"{len(kept)} from {low:.4g} to {high:.4g}" + (f", {left_out} left out (None)" if left_out else "")


def _images_unchanged(probe: Probe) -> Verdict:
    probe.score(probe.images)  # raises if not
    return OK, "the images are left as they are"


def _repeatable(probe: Probe) -> Verdict:
    difference, share = probe.compare(probe.score(probe.images), probe.scores)
    if share <= EXACT:
        return OK, "the same images score the same" + (f" within {difference:.2g}" if difference else "")
    return WARNING, f"the same images scored {_by(difference)} the second time: a resumed run will go another way"


def _batch(probe: Probe) -> Verdict:
    """Four images together and each by itself."""
    together = probe.score(probe.images[:4])
    alone = torch.cat([probe.score(probe.images[index : index + 1], first=index) for index in range(4)])
    difference, share = probe.compare(alone, together)
    if share <= EXACT:
        return OK, "4 images together score as they do one by one" + (f" within {difference:.2g}" if difference else "")
    detail = f"4 images together scored {_by(difference)} than one by one; a score must not depend on the other images"
    return (WARNING if share <= ROUGH else FAILS), detail


def _networks(probe: Probe) -> Verdict:
    """Whether the networks that the reward holds or names are in evaluation mode."""
    networks = networks_of(probe.reward)
    training = [name for name, network in networks.items() if any(part.training for part in network.modules())]
    if training:
        names = ", ".join(training)
        return WARNING, f"{names}: in training mode, with dropout and the batch's own statistics; call its eval()"
    return OK, f"{', '.join(networks)}: in evaluation mode" if networks else "no network was found"


def networks_of(reward: Any) -> dict[str, nn.Module]:
    """The networks that a reward is, has as attributes, or names in its code, by their names there."""
    if isinstance(reward, functools.partial):
        return networks_of(reward.func)
    function = reward if inspect.isroutine(reward) else type(reward).__call__
    held = {"the reward itself": reward, **dict(inspect.getmembers_static(reward))}
    if inspect.isfunction(function) or inspect.ismethod(function):
        named = inspect.getclosurevars(function)  # its globals are names of attributes, too
        loaded = {step.argval for step in dis.get_instructions(function) if step.opname == "LOAD_GLOBAL"}
        held |= named.nonlocals | {name: value for name, value in named.globals.items() if name in loaded}
    return {name: value for name, value in held.items() if isinstance(value, nn.Module)}


def _by(difference: float) -> str:
    return f"differently (by up to {difference:.3g})" if difference < float("inf") else "or were left out otherwise"


def _random_numbers(probe: Probe) -> Verdict:
    """Whether a call moves the global random state."""
    changed, ends = set(), []
    with _kept_random_state():
        for seed in (1, 2):
            torch.manual_seed(seed)
            random.seed(seed)
            np.random.seed(seed)
            start = _random_state()
            probe.score(probe.images)
            ends.append(_random_state())
            changed |= {name for name in start if start[name] != ends[-1][name]}
    seeded = sorted(name for name in changed if ends[0][name] == ends[1][name])
    if seeded:
        return FAILS, f"it sets the global seed of {', '.join(seeded)}: every rollout would draw the same noise"
    if changed:
        names = ", ".join(sorted(changed))
        return WARNING, f"it draws from the global random numbers of {names}: as a judge it would change the training"
    return OK, "the global random state is left as it is"


def _random_state() -> dict[str, Any]:
    numpy_state = np.random.get_state()
    state = {
        "torch": torch.get_rng_state().numpy().tobytes(),
        "random": random.getstate(),
        "numpy": (numpy_state[1].tobytes(), *numpy_state[2:]),
    }
    if torch.cuda.is_available():
        state["torch.cuda"] = torch.cuda.get_rng_state().numpy().tobytes()
    return state


@contextmanager
def _kept_random_state() -> Iterator[None]:
    python_state, numpy_state = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[torch.cuda.current_device()] if torch.cuda.is_available() else []):
        try:
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)


def _grey(probe: Probe) -> Verdict:
    probe.score(probe.images[:, :1])
    return OK, "images without colour are scored"


def _flat(probe: Probe) -> Verdict:
    size = (3, probe.image_size, probe.image_size)
    black_and_white = torch.stack([torch.zeros(size), torch.ones(size)]).to(probe.device)
    values = [None if value != value else f"{value:.4g}" for value in probe.score(black_and_white).tolist()]
    return OK, "black scores {}, white {}".format(*values)


def _sizes(probe: Probe) -> Verdict:
    failed = {}
    for height, width in OTHER_SIZES:
        try:
            probe.score(probe.make_images(2, height, width))
        except RewardError as error:
            failed[f"{height}x{width}"] = str(error)
    if not failed:
        return OK, ", ".join(f"{height}x{width}" for height, width in OTHER_SIZES) + " are scored too"
    size, reason = next(iter(failed.items()))
    return WARNING, f"{probe.image_size}x{probe.image_size} works, {', '.join(failed)} not ({size}: {reason})"


def _speed(probe: Probe) -> Verdict:
    rates = []
    for count in BATCH_SIZES:
        images = probe.make_images(count, probe.image_size, probe.image_size)
        probe.score(images)  # whatever is prepared once
        calls, start = 0, time.perf_counter()
        while calls == 0 or time.perf_counter() - start < TIMED_SECONDS:
            probe.score(images).tolist()  # waits for a GPU
            calls += 1
        rates.append(f"{calls * count / (time.perf_counter() - start):,.1f} images/s at batch {count}")
    return OK, ", ".join(rates)


CHECKS: dict[str, Callable[[Probe], Verdict]] = {
    "scores": _scores,
    "images unchanged": _images_unchanged,
    "repeatable": _repeatable,
    "batch": _batch,
    "networks": _networks,
    "random numbers": _random_numbers,
    "grey": _grey,
    "black and white": _flat,
    "sizes": _sizes,
    "gradient": check_gradient,
    "speed": _speed,
}
