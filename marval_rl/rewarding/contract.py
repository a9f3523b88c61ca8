"""The checks of `marval-rl rewards check`: each tests one rule of the contract on made-up images."""

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
from torch import Tensor, nn

from marval_rl.errors import MarvalError, RewardError, first_line
from marval_rl.rewarding.contract_probe import FAILS, NUM_IMAGES, OK, WARNING, Captions, Probe, Verdict
from marval_rl.rewarding.loading import STANDARD_ARGUMENTS, describe, is_differentiable
from marval_rl.rewarding.reward_set import RewardSet

OTHER_SIZES = ((8, 8), (33, 47), (256, 256))  # height, width
BATCH_SIZES = (1, 32)  # of the timing
TIMED_SECONDS = 0.5
EXACT, ROUGH = 1e-3, 0.05  # differences, as a share of the spread of the scores, that are rounding; that are suspicious
STEPS = (3e-2, 1e-2, 3e-3, 1e-3)  # of finite differences: small ones drown in rounding, large ones in curvature
CLOSE, WRONG = 0.1, 0.25  # relative errors of a gradient


@dataclass(frozen=True)
class Finding:
    """One line of the table: "ok"; "warning", for what works but has a consequence; or "fails"."""

    check: str
    status: str
    detail: str


def check_contract(rewards: RewardSet, captions: Captions, image_size: int, device: str) -> Iterator[Finding]:
    """Yields the findings about the only reward of a set; without any scores the other checks are skipped.

    Nothing that the reward raises gets through, and the global random state is left as it was.

    Args:
        image_size: Side of the square images in pixels; other sizes are tried as well.
    """
    probe = Probe(rewards, captions, image_size, device)
    yield Finding("keywords", OK, _keywords(rewards))
    for name, check in CHECKS.items():
        try:
            status, detail = check(probe)
        except Exception as error:  # a reward may raise anything, and the other checks are still useful
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
    """Whether the networks that the reward uses are in evaluation mode."""
    networks = networks_of(probe.reward)
    training = [name for name, network in networks.items() if any(part.training for part in network.modules())]
    if training:
        names = ", ".join(training)
        return WARNING, f"{names}: in training mode, with dropout and the batch's own statistics; call its eval()"
    return OK, f"{', '.join(networks)}: in evaluation mode" if networks else "no network was found"


def networks_of(reward: Any) -> dict[str, nn.Module]:
    """The networks that a reward is, holds as attributes, or uses as globals or closure variables, by name."""
    if isinstance(reward, functools.partial):
        return networks_of(reward.func)
    function = reward if inspect.isroutine(reward) else type(reward).__call__
    held: dict[str, Any] = {"the reward itself": reward, **dict(inspect.getmembers_static(reward))}
    if inspect.isfunction(function) or inspect.ismethod(function):
        named = inspect.getclosurevars(function)  # its globals are names of attributes, too
        loaded = {step.argval for step in dis.get_instructions(function) if step.opname == "LOAD_GLOBAL"}
        held |= dict(named.nonlocals) | {name: value for name, value in named.globals.items() if name in loaded}
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
    assert isinstance(numpy_state, tuple)  # unlike with legacy=False
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


def _gradient(probe: Probe) -> Verdict:
    """Whether the gradient exists, is finite and not zero, and agrees with finite differences."""
    images = probe.images.requires_grad_()
    if not is_differentiable(probe.reward):
        try:
            probe.score(images, with_grad=True)
        except ValueError as error:
            return OK, f"none is declared; method reward_backprop would say: {error}"
    scores = probe.score(images, with_grad=True)
    scored = ~scores.isnan()
    if not scored.any():
        return WARNING, "differentiable, but all images are left out (None): nothing to compare"
    try:
        [gradient] = torch.autograd.grad(scores[scored].sum(), images, allow_unused=True)
    except RuntimeError as error:  # an operation without a derivative, or a tensor changed after its use
        return FAILS, f"the gradient cannot be computed: {first_line(error)}"
    if gradient is None:
        return FAILS, "declared differentiable, but the scores do not depend on the images"
    broken = ~gradient.isfinite().flatten(1).all(dim=1)
    if broken.any():
        return FAILS, f"the gradient of sample {int(broken.nonzero()[0])} is not finite"
    flat = scored & (gradient.flatten(1).abs().amax(dim=1) == 0)
    if flat.sum() == scored.sum():
        return FAILS, "declared differentiable, but the gradient is zero for every image"
    difference = _gradient_error(probe, gradient, scored & ~flat)
    off = f"the gradient is off by {difference:.0%} from finite differences"
    if difference > WRONG:
        return FAILS, f"{off}: a part of the way is cut off or wrong"
    if difference > CLOSE:
        return WARNING, f"{off} (rounding of a coarse dtype, kinks?)"
    if flat.any():
        return WARNING, f"the gradient is zero for {int(flat.sum())} of {len(flat)} images: they would not train"
    return OK, f"within {difference:.2g} of finite differences, relatively"


def _gradient_error(probe: Probe, gradient: Tensor, scored: Tensor) -> float:
    """The relative error of the slope along one direction per image; the median over the images, at the best step.

    The direction has random sizes and the gradient's signs, so that the change is far above rounding errors; where the
    gradient is zero the signs are random, so that a detached path is found.
    """
    generator = torch.Generator().manual_seed(0)
    size, sign = torch.rand(2, *gradient.shape, generator=generator).to(gradient.device)
    direction = size * torch.where(gradient == 0, (sign - 0.5).sign(), gradient.sign())
    slope = (gradient * direction).flatten(1).sum(dim=1)[scored]
    errors = []
    for step in STEPS:
        there, back = (probe.score(probe.images + way * step * direction)[scored] for way in (1, -1))
        measured = (there - back) / (2 * step)
        error = (measured - slope).abs() / torch.maximum(measured.abs(), slope.abs())
        errors.append(float(error.nan_to_num(torch.inf).median()))
    return min(errors)


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
    "gradient": _gradient,
    "speed": _speed,
}
