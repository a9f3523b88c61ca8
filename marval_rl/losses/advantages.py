"""From rewards to advantages: an image is compared with the others of its group, of one reward or of several.

Rewards come as [N], or [N, R] of R reward functions, groups of num_generations images in a row. NaN marks an image that
a reward left out. There is one standard deviation: unbiased, within a group, over the images that have a score.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

STD_EPSILON = 1e-4  # as in TRL: keeps advantages finite when the rewards of a group barely differ
REWARD_SCALES = ("group", "batch", "none")
MULTI_OBJECTIVE_AGGREGATIONS = ("sum_then_normalize", "normalize_then_sum")


def group_std(rewards: Tensor, num_generations: int) -> Tensor:
    """Unbiased standard deviation within each group, [N] -> [N / num_generations].

    0 in a group with one score, NaN in one without any.

    Raises:
        ValueError: If the rewards do not divide into groups.
    """
    return _std(_by_group(rewards, num_generations)).squeeze(1)


def group_advantages(
    rewards: Tensor, num_generations: int, scale_rewards: str = "group"
) -> tuple[Tensor, dict[str, Tensor]]:
    """A_i = (R_i - mean of its group) / (std + 1e-4)   (DeepSeekMath, arXiv 2402.03300, section 4.1).

    Args:
        rewards: [N]. An image without a reward is left out of its group's statistics and gets advantage 0.
        num_generations: Images per group.
        scale_rewards: "group" divides by the group's standard deviation, "batch" by that of all rewards (arXiv
            2508.08221), "none" does not divide (Dr. GRPO, arXiv 2503.20783).

    Returns:
        Advantages [N], and metrics as TRL names them: `reward`, `reward_std` (mean over groups),
        `frac_reward_zero_std`.

    Raises:
        ValueError: For another scale, and if the rewards do not divide into groups.
    """
    groups = _by_group(rewards, num_generations)
    std = _std(groups)
    centered = groups - groups.nanmean(dim=1, keepdim=True)
    if scale_rewards == "group":
        centered = centered / (std + STD_EPSILON)
    elif scale_rewards == "batch":
        centered = centered / (_std(groups.view(1, -1)) + STD_EPSILON)
    elif scale_rewards != "none":
        raise ValueError(f'scale_rewards must be one of {", ".join(REWARD_SCALES)}, not "{scale_rewards}"')
    metrics = {
        "reward": groups.nanmean(),
        "reward_std": std.nanmean(),
        "frac_reward_zero_std": (std < STD_EPSILON).sum() / (~std.isnan()).sum(),  # of the groups with a score
    }
    return torch.where(groups.isnan(), 0, centered).flatten(), metrics


def aggregate_advantages(
    components: Tensor,
    weights: Sequence[float],
    num_generations: int,
    scale_rewards: str = "group",
    aggregation: str = "sum_then_normalize",
) -> tuple[Tensor, dict[str, Tensor]]:
    """Advantages of images with several rewards, as TRL's `multi_objective_aggregation` has them.

    Args:
        components: [N, R], each reward's scores. An image that all rewards left out gets advantage 0.
        weights: R factors.
        num_generations: Images per group.
        scale_rewards: As in `group_advantages`; for "sum_then_normalize".
        aggregation: "sum_then_normalize" compares weighted sums within each group, so that the reward with the widest
            spread decides. "normalize_then_sum" (GDPO, arXiv 2601.05242) first brings each reward by itself to mean 0
            and standard deviation 1 within each group, so that the weights alone say what counts, and then the
            weighted sums to mean 0 and standard deviation 1 over the batch; scale_rewards has no say in it.

    Returns:
        Advantages [N], and `group_advantages`' metrics. `reward` and `reward_std` are of the weighted sums of the
        scores in either case, so that runs compare; `frac_reward_zero_std` is of what the advantages are made of.

    Raises:
        ValueError: For another aggregation or scale, and if the images do not divide into groups.
    """
    if aggregation not in MULTI_OBJECTIVE_AGGREGATIONS:
        raise ValueError(
            f"multi_objective_aggregation must be one of {', '.join(MULTI_OBJECTIVE_AGGREGATIONS)}, not {aggregation!r}"
        )
    components = components.float()
    advantages, metrics = group_advantages(weighted_sum(components, weights), num_generations, scale_rewards)
    if aggregation == "sum_then_normalize":
        return advantages, metrics

    normalized = [group_advantages(scores, num_generations)[0] for scores in components.unbind(dim=1)]
    unscored = components.isnan().all(dim=1)
    total = weighted_sum(torch.stack(normalized, dim=1), weights).masked_fill(unscored, torch.nan)
    advantages, _ = group_advantages(total, len(total), "batch")
    _, metrics_of_total = group_advantages(total, num_generations)
    return advantages, {**metrics, "frac_reward_zero_std": metrics_of_total["frac_reward_zero_std"]}


def weighted_sum(components: Tensor, weights: Sequence[float]) -> Tensor:
    """Sum of weight x score over the rewards that scored an image: [N, R] -> [N], NaN where all left it out."""
    assert components.shape[1] == len(weights)
    left_out = components.isnan()
    total = (components.masked_fill(left_out, 0) * components.new_tensor(weights)).sum(dim=1)
    return total.masked_fill(left_out.all(dim=1), torch.nan)


def group_weights(advantages: Tensor, num_generations: int) -> Tensor:
    """What an image counts in the policy loss, so that groups without a preference are dropped from it: [N] -> [N].

    0 in a group whose advantages are all 0, and (number of groups) / (groups kept) in the others: the loss is a mean
    over the images that have something to teach (dynamic sampling of DAPO, arXiv 2503.14476, without sampling more).
    A dropped group keeps its KL divergence, as in TRL: it has nothing to teach, but it may still drift.
    """
    kept = advantages.view(-1, num_generations).ne(0).any(dim=1).float()
    return (kept * len(kept) / kept.sum().clamp(min=1)).repeat_interleave(num_generations)


def _by_group(rewards: Tensor, num_generations: int) -> Tensor:
    """[N] -> [number of groups, num_generations], float32."""
    if num_generations < 1 or rewards.numel() % num_generations:
        raise ValueError(f"{rewards.numel()} rewards do not divide into groups of {num_generations}")
    return rewards.float().view(-1, num_generations)


def _std(rows: Tensor) -> Tensor:
    """Unbiased standard deviation of the known values of each row, [G, n] -> [G, 1]; 0 of one value, NaN of none."""
    known = ~rows.isnan()
    count = known.sum(dim=1, keepdim=True)
    mean = torch.where(known, rows, 0).sum(dim=1, keepdim=True) / count
    squares = torch.where(known, (rows - mean).square(), 0).sum(dim=1, keepdim=True)
    return (squares / (count - 1).clamp(min=1)).sqrt().masked_fill(count == 0, torch.nan)
