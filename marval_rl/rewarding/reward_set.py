"""Scoring images with several rewards at once, and holding each of them to the protocol."""

from __future__ import annotations

import difflib
import math
import numbers
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from marval_rl.errors import RewardError
from marval_rl.rewarding.loading import STANDARD_ARGUMENTS, Reward, is_differentiable, load_reward, reward_name


@dataclass
class RewardScores:
    """total: the weighted sum, float32 [B], NaN where every reward left the sample out.
    components: each reward's own scores before weighting, float32 [B], NaN where it left the sample out."""

    total: Tensor
    components: dict[str, Tensor]


class RewardSet:
    """Several rewards with weights, called by keyword and summed.

    reward_funcs    specs or callables as `load_reward` takes them
    reward_weights  one factor a reward; None for 1 each
    reward_kwargs   name of a reward -> what its class is made with. The name is what `reward_name` says, the
                    second of equal names with _2 appended, and so on.

    names, weights, rewards: lists in the order of reward_funcs. differentiable: whether all rewards are.

    Raises ValueError for an empty list, wrong weights, kwargs for a reward that is not there, and whatever
    `load_reward` refuses.
    """

    def __init__(
        self,
        reward_funcs: Sequence[str | Reward],
        reward_weights: Sequence[float] | None = None,
        reward_kwargs: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> None:
        if isinstance(reward_funcs, str) or not isinstance(reward_funcs, Sequence) or not reward_funcs:
            raise ValueError(f"reward_funcs must be a list of at least one reward, not {reward_funcs!r}")
        self.names = _unique([reward_name(spec) for spec in reward_funcs])
        self.weights = _check_weights(reward_weights, self.names)
        kwargs = dict(reward_kwargs or {})
        _check_kwargs(kwargs, self.names)
        specs = zip(reward_funcs, self.names, strict=True)
        self.rewards = [load_reward(spec, **kwargs.get(name, {})) for spec, name in specs]
        self.differentiable = all(is_differentiable(reward) for reward in self.rewards)

    def score(
        self,
        images: Tensor,
        prompts: Sequence[str],
        class_labels: Tensor,
        class_names: Sequence[str],
        columns: Mapping[str, Any] | None = None,
        with_grad: bool = False,
    ) -> RewardScores:
        """Score images [B, 1 or 3, H, W] in 0..1 (grey ones are handed on with three channels).

        prompts and class_names have length B, class_labels [B]; columns are handed on as further keywords.
        with_grad keeps the graph from the images to the scores; without it nothing is recorded.

        Raises RewardError where a reward raises or returns anything but B finite numbers or Nones; ValueError
        for arguments that do not fit, and for with_grad with a reward that is not differentiable.
        """
        images = _check_images(images)
        self._check_batch(images, prompts, class_labels, class_names, columns)
        if with_grad:
            self._check_gradients_possible(images)
        arguments = {
            "images": images if with_grad else images.detach(),
            "prompts": list(prompts),
            "class_labels": class_labels,
            "class_names": list(class_names),
            **(columns or {}),
        }
        arguments["completions"] = arguments["images"]  # the word TRL's rewards know

        with torch.set_grad_enabled(with_grad):
            components = {
                name: _call(name, reward, arguments, with_grad)
                for name, reward in zip(self.names, self.rewards, strict=True)
            }
            return RewardScores(self._weighted_sum(list(components.values())), components)

    def _weighted_sum(self, components: list[Tensor]) -> Tensor:
        scores = torch.stack(components)  # [R, B]
        left_out = scores.isnan()
        weights = scores.new_tensor(self.weights).unsqueeze(1)  # [R, 1]
        total = (weights * scores.masked_fill(left_out, 0)).sum(dim=0)
        return total.masked_fill(left_out.all(dim=0), torch.nan)

    def _check_batch(
        self,
        images: Tensor,
        prompts: Sequence[str],
        class_labels: Tensor,
        class_names: Sequence[str],
        columns: Mapping[str, Any] | None,
    ) -> None:
        for what, values in (("prompts", prompts), ("class_labels", class_labels), ("class_names", class_names)):
            if len(values) != len(images):
                raise ValueError(f"{len(images)} images but {len(values)} {what}")
        reserved = sorted(set(columns or {}) & set(STANDARD_ARGUMENTS))
        if reserved:
            raise ValueError(f"a data set's column must not be called {', '.join(reserved)}; rename it")

    def _check_gradients_possible(self, images: Tensor) -> None:
        for name, reward in zip(self.names, self.rewards, strict=True):
            if not is_differentiable(reward):
                raise ValueError(
                    f"reward {name!r} is not differentiable, so gradients cannot pass through it; "
                    "use method grpo, or declare `differentiable = True` if it is"
                )
        if not images.requires_grad:
            raise ValueError("with_grad needs images that require gradients, but these do not")


def _call(name: str, reward: Reward, arguments: dict[str, Any], with_grad: bool) -> Tensor:
    images = arguments["images"]
    version = _version(images)
    try:
        returned = reward(**arguments)
    except Exception as error:  # a reward may raise anything
        raise RewardError(f"reward {name!r} raised {type(error).__name__}: {error}") from error
    if _version(images) != version:
        raise RewardError(f"reward {name!r} changed the images in place; it must work on a copy (images.clone())")
    scores = _to_scores(name, returned, images)
    if with_grad and not scores.requires_grad:
        raise RewardError(
            f"reward {name!r} declares itself differentiable, but no gradient leads from its scores to the images; "
            "it must return a tensor computed from them without .item(), .detach() or torch.no_grad()"
        )
    return scores


def _version(images: Tensor) -> int | None:
    """A number that changes with every change in place; tensors of the inference mode have none."""
    return None if images.is_inference() else images._version


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


def _check_images(images: Tensor) -> Tensor:
    """Refuse what is no image, so that no reward is blamed for it; repeat a grey channel."""
    if images.ndim != 4 or images.shape[1] not in (1, 3) or len(images) == 0:
        raise ValueError(f"images must have the shape [B, 1 or 3, H, W], not {list(images.shape)}")
    low, high = (float(bound) for bound in images.detach().aminmax())
    if not (low >= 0 and high <= 1):  # also refuses NaN
        raise ValueError(f"pixels must lie in 0..1, but they lie in {low:g}..{high:g}")
    images = images.float()
    return images.repeat(1, 3, 1, 1) if images.shape[1] == 1 else images


def _unique(names: list[str]) -> list[str]:
    """Append _2, _3, ... to the later ones of equal names."""
    unique: list[str] = []
    for name in names:
        candidate, number = name, 1
        while candidate in unique:
            number += 1
            candidate = f"{name}_{number}"
        unique.append(candidate)
    return unique


def _check_weights(weights: Sequence[float] | None, names: list[str]) -> list[float]:
    if weights is None:
        return [1.0] * len(names)
    if len(weights) != len(names):
        raise ValueError(f"{len(weights)} reward_weights for {len(names)} reward_funcs ({', '.join(names)})")
    for weight, name in zip(weights, names, strict=True):
        if not isinstance(weight, numbers.Real) or not math.isfinite(weight):
            raise ValueError(f"the weight of reward {name!r} must be a finite number, not {weight!r}")
    return [float(weight) for weight in weights]


def _check_kwargs(kwargs: dict[str, Any], names: list[str]) -> None:
    for name, values in kwargs.items():
        if name not in names:
            nearest = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
            hint = f"; did you mean {nearest[0]}?" if nearest else ""
            raise ValueError(f"reward_kwargs names {name!r}, which is no reward here ({', '.join(names)}){hint}")
        if not isinstance(values, Mapping):
            raise ValueError(f"reward_kwargs[{name!r}] must map argument names to values, not {values!r}")
