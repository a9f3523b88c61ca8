"""The policy gradient on unmasking steps: log-probability and KL divergence of an action, and the clipped loss.

The action of unmasking step k is the M_k tokens revealed in it, a_k = mu_theta(z_k, s_k) + policy_std xi with
xi ~ N(0, I): a Gaussian whose mean is the one-step student. Everything here is computed in float32.

Letters in shapes: B images, S unmasking steps, M tokens revealed in a step, C channels per token.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

MAX_LOG_RATIO = 20.0
LOSS_TYPES = ("grpo", "cispo")
LOG_PROB_REDUCTIONS = ("sum", "mean")


def action_log_prob(actions: Tensor, means: Tensor, policy_std: float, reduction: str = "sum") -> Tensor:
    """log pi(a_k | s_k) = sum over tokens and channels of log N(a; mu, policy_std^2).

    Args:
        actions: [B, M, C].
        means: [B, M, C].
        policy_std: Standard deviation of the policy, in latent units.
        reduction: "sum", or "mean", which divides by M C as flow-matching GRPO does (arXiv 2505.05470): ratios then
            stay near 1, and a step weighs the same however many tokens it reveals. A clip range belongs to the
            reduction: 0.2 for a sum is 0.2 / (M C) for a mean.

    Returns:
        [B].

    Raises:
        ValueError: For another reduction.
    """
    residual = (actions.float() - means.float()) / policy_std
    constant = math.log(policy_std) + 0.5 * math.log(2 * math.pi)
    return _reduce(-(0.5 * residual.square() + constant), reduction)


def action_kl(means: Tensor, reference_means: Tensor, policy_std: float, reduction: str = "sum") -> Tensor:
    """KL(pi_theta || pi_ref) of one unmasking step in closed form, |mu - mu_ref|^2 / (2 policy_std^2).

    Args:
        means: [B, M, C].
        reference_means: [B, M, C].
        policy_std: Standard deviation of both policies.
        reduction: As that of the log-probability it stands beside, so that beta weighs both in the same unit.

    Returns:
        [B].

    Raises:
        ValueError: For another reduction.
    """
    return _reduce((means.float() - reference_means.float()).square(), reduction) / (2 * policy_std**2)


def _reduce(values: Tensor, reduction: str) -> Tensor:
    """[B, M, C] -> [B]."""
    if reduction == "sum":
        return values.flatten(1).sum(dim=1)
    if reduction == "mean":
        return values.flatten(1).mean(dim=1)
    raise ValueError(f'log_prob_reduction must be one of {", ".join(LOG_PROB_REDUCTIONS)}, not "{reduction}"')


def policy_loss(
    log_prob: Tensor,
    old_log_prob: Tensor,
    advantages: Tensor,
    epsilon_low: float = 0.2,
    epsilon_high: float = 0.2,
    loss_type: str = "grpo",
    weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The policy gradient loss, with the ratio rho = exp(log pi - log pi_old) of each unmasking step.

    Args:
        log_prob: [B, S], with gradient.
        old_log_prob: [B, S], of the policy that sampled.
        advantages: [B], one per image.
        epsilon_low: The ratio is clipped from below at 1 - epsilon_low ("cispo" does not).
        epsilon_high: It is clipped from above at 1 + epsilon_high.
        loss_type: "grpo": -E[min(rho A, clip(rho, 1 - eps_low, 1 + eps_high) A)], PPO's clipped objective (arXiv
            1707.06347, equation 7). "cispo": -E[min(rho, 1 + eps_high) A log pi] with no gradient through rho, so
            that no action is silenced by the clip (MiniMax-M1, arXiv 2506.13585, equation 4). TRL's "dr_grpo" would be
            "grpo": all images have equally many actions.
        weights: [B], what each image counts, as `group_weights` gives it; None for 1 each.

    Returns:
        The mean loss, and metrics: `ratio` (mean), `clip_ratio/low_mean`, `clip_ratio/high_mean` and
        `clip_ratio/region_mean`, the shares of entries whose ratio the clip holds.

    Raises:
        ValueError: For another loss_type.
    """
    # Far beyond any clip range, yet exp stays finite: infinity times zero would turn the gradient into NaN.
    ratio = (log_prob - old_log_prob).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()  # [B, S]
    advantages = advantages.unsqueeze(1)  # [B, 1]
    high = (ratio > 1 + epsilon_high) & (advantages > 0)
    if loss_type == "grpo":
        clipped = ratio.clamp(1 - epsilon_low, 1 + epsilon_high)
        losses = -torch.minimum(ratio * advantages, clipped * advantages)
        low = (ratio < 1 - epsilon_low) & (advantages < 0)
    elif loss_type == "cispo":
        losses = -ratio.detach().clamp(max=1 + epsilon_high) * advantages * log_prob
        low = torch.zeros_like(high)
    else:
        raise ValueError(f'loss_type must be one of {", ".join(LOSS_TYPES)}, not "{loss_type}"')
    if weights is not None:
        losses = losses * weights.unsqueeze(1)
    metrics = {
        "ratio": ratio.detach().mean(),
        "clip_ratio/low_mean": low.float().mean(),
        "clip_ratio/high_mean": high.float().mean(),
        "clip_ratio/region_mean": (low | high).float().mean(),
    }
    return losses.mean(), metrics
