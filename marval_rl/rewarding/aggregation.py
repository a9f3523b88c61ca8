"""From the scores of several rewards to one: the weighted sum, and GRPO's advantages by either order of summing."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from marval_rl.losses.policy import group_advantages

MULTI_OBJECTIVE_AGGREGATIONS = ("sum_then_normalize", "normalize_then_sum")


def weighted_sum(components: Tensor, weights: Sequence[float]) -> Tensor:
    """Sum of weight x score over the rewards that scored a sample: [N, R], NaN for none -> [N], NaN where all are."""
    assert components.shape[1] == len(weights)
    left_out = components.isnan()
    total = (components.masked_fill(left_out, 0) * components.new_tensor(weights)).sum(dim=1)
    return total.masked_fill(left_out.all(dim=1), torch.nan)


def aggregate_advantages(
    components: Tensor,
    weights: Sequence[float],
    num_generations: int,
    scale_rewards: str = "group",
    aggregation: str = "sum_then_normalize",
    std_floor: float = 0.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Advantages of samples with several rewards, as TRL's `multi_objective_aggregation` has them.

    Args:
        components: [N, R], each reward's scores, groups of num_generations samples in a row. NaN marks a sample that a
            reward left out; one that all left out gets advantage 0.
        weights: R factors.
        scale_rewards: "group", "batch" or "none", as in `group_advantages`; for "sum_then_normalize".
        aggregation: "sum_then_normalize" compares weighted sums within each group, so that the reward with the widest
            spread decides. "normalize_then_sum" (GDPO, arXiv 2601.05242) first brings each reward by itself to mean 0
            and deviation 1 within each group, so that the weights alone say what counts, and then the weighted sums
            to mean 0 and deviation 1 over the batch; scale_rewards has no say in it.
        std_floor: As in `group_advantages`; for a reward or their sum, not for the last normalisation.

    Returns:
        Advantages [N], and `group_advantages`' metrics. `reward` and `reward_std` are of the weighted sums of the
        scores in either case, so that runs compare; `frac_reward_zero_std` is of what the advantages are made of.

    Raises ValueError for another aggregation or scale, and for samples that do not divide into groups.
    """
    if aggregation not in MULTI_OBJECTIVE_AGGREGATIONS:
        raise ValueError(
            f"multi_objective_aggregation must be one of {', '.join(MULTI_OBJECTIVE_AGGREGATIONS)}, not {aggregation!r}"
        )
    components = components.float()
    advantages, metrics = group_advantages(weighted_sum(components, weights), num_generations, scale_rewards, std_floor)
    if aggregation == "sum_then_normalize":
        return advantages, metrics

    normalized = [
        group_advantages(scores, num_generations, std_floor=std_floor)[0] for scores in components.unbind(dim=1)
    ]
    unscored = components.isnan().all(dim=1)
    total = weighted_sum(torch.stack(normalized, dim=1), weights).masked_fill(unscored, torch.nan)
    advantages, _ = group_advantages(total, len(total), "batch")
    _, metrics_of_total = group_advantages(total, num_generations)
    return advantages, {**metrics, "frac_reward_zero_std": metrics_of_total["frac_reward_zero_std"]}
