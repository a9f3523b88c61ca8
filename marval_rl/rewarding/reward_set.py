"""Scoring images with several rewards at once, and holding each of them to the protocol."""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from marval_rl.errors import nearest
from marval_rl.losses.advantages import weighted_sum
from marval_rl.rewarding.calling import RewardCalls
from marval_rl.rewarding.loading import STANDARD_ARGUMENTS, Offers, Reward, is_differentiable, load_reward, reward_name
from marval_rl.rewarding.process_state import global_settings, kept_settings


@dataclass
class RewardScores:
    """The scores of B samples by R rewards.

    total: the weighted sum, float32 [B], NaN where every reward left the sample out.
    components: each reward's own scores before weighting, float32 [B], NaN where it left the sample out.
    """

    total: Tensor
    components: dict[str, Tensor]

    def by_reward(self) -> Tensor:
        """The components side by side, in the order of the rewards: [B, R]."""
        return torch.stack(list(self.components.values()), dim=1)


class RewardSet:
    """Several rewards with weights, called by keyword and summed.

    Args:
        reward_funcs: Specs or callables as `load_reward` takes them.
        reward_weights: One factor per reward; None for 1 each.
        reward_kwargs: Name of a reward -> what its class is made with. The name is what `reward_name` says, the second
            of equal names with _2 appended, and so on.
        offers: Of `load_reward`.

    names, weights, rewards: lists in the order of reward_funcs. differentiable: whether all rewards are.

    Raises:
        ValueError: For an empty list, wrong weights, kwargs for a reward that is not in the list, and whatever
            `load_reward` refuses.
    """

    def __init__(
        self,
        reward_funcs: Sequence[str | Reward],
        reward_weights: Sequence[float] | None = None,
        reward_kwargs: Mapping[str, Mapping[str, Any]] | None = None,
        offers: Offers | None = None,
    ) -> None:
        if isinstance(reward_funcs, str) or not isinstance(reward_funcs, Sequence) or not reward_funcs:
            raise ValueError(f"reward_funcs must be a list of at least one reward, not {reward_funcs!r}")
        self.names = _unique([reward_name(spec) for spec in reward_funcs])
        self.weights = _check_weights(reward_weights, self.names)
        kwargs = dict(reward_kwargs or {})
        _check_kwargs(kwargs, self.names)
        specs = zip(reward_funcs, self.names, strict=True)
        self.rewards = [load_reward(spec, offers, **kwargs.get(name, {})) for spec, name in specs]
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

        Each reward is given its own copies of all arguments. Random states are not looked at here.

        Raises:
            RewardError: Where a reward raises, changes the images or a setting of the whole process (default dtype,
                gradient mode, working directory), or returns anything but B finite numbers or Nones.
            ValueError: For invalid arguments, and for with_grad with a reward that is not differentiable.
        """
        scoring = Scoring(self, with_grad)
        scoring.add(images, prompts, class_labels, class_names, columns)
        return scoring.result()

    def in_parts(self) -> Scoring:
        """For a batch whose images come in parts: `add` each of them as soon as it is there, then ask for `result`."""
        return Scoring(self, with_grad=False)


class Scoring:
    """The scoring of one batch, whose images may come in parts.

    Rewards that are `async def` begin with a part when it is added and wait for their answers meanwhile; the others are
    called for the complete batch. Scores are those of `RewardSet.score` if a reward judges each image by itself. As a
    context it gives up what has not been answered when an error ends it.
    """

    def __init__(self, rewards: RewardSet, with_grad: bool) -> None:
        self._rewards = rewards
        self._with_grad = with_grad
        self._settings = global_settings()  # before any reward begins
        self._calls = RewardCalls(dict(zip(rewards.names, rewards.rewards, strict=True)), with_grad)

    def add(
        self,
        images: Tensor,
        prompts: Sequence[str],
        class_labels: Tensor,
        class_names: Sequence[str],
        columns: Mapping[str, Any] | None = None,
    ) -> None:
        """A part of the batch, as `RewardSet.score` takes it. Raises its ValueErrors."""
        images = checked_images(images)
        self._check_batch(images, prompts, class_labels, class_names, columns)
        if self._with_grad:
            self._check_gradients_possible(images)
        arguments = {
            "images": images if self._with_grad else images.detach(),
            "prompts": list(prompts),
            "class_labels": class_labels,
            "class_names": list(class_names),
            **(columns or {}),
        }
        with torch.set_grad_enabled(self._with_grad):
            self._calls.begin(arguments)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, error: type[BaseException] | None, *_: Any) -> None:
        if error is not None:
            self._calls.cancel()

    def result(self) -> RewardScores:
        """The scores of all parts, in their order. Raises the RewardErrors of `RewardSet.score`."""
        with kept_settings(self._settings), torch.set_grad_enabled(self._with_grad):
            components = self._calls.scores()
            total = weighted_sum(torch.stack(list(components.values()), dim=1), self._rewards.weights)
            return RewardScores(total, components)

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
        for name, reward in zip(self._rewards.names, self._rewards.rewards, strict=True):
            if not is_differentiable(reward):
                raise ValueError(
                    f"reward {name!r} is not differentiable, so gradients cannot pass through it; "
                    "use method grpo, or declare `differentiable = True` if it is"
                )
        if not images.requires_grad:
            raise ValueError("with_grad needs images that require gradients, but these do not")


def checked_images(images: Tensor) -> Tensor:
    """Images [B, 1 or 3, H, W] in 0..1 -> float32 [B, 3, H, W]. Raises ValueError for others, so that no reward is
    blamed for them."""
    if images.ndim != 4 or images.shape[1] not in (1, 3) or len(images) == 0:
        raise ValueError(f"images must have the shape [B, 1 or 3, H, W], not {list(images.shape)}")
    low, high = torch.stack(images.detach().aminmax()).tolist()  # waits for the device
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
            raise ValueError(
                f"reward_kwargs names {name!r}, which is not a reward here ({', '.join(names)}){nearest(name, names)}"
            )
        if not isinstance(values, Mapping):
            raise ValueError(f"reward_kwargs[{name!r}] must map argument names to values, not {values!r}")
