"""Policy gradient on unmasking steps: log-probabilities, group advantages, the clipped loss and the KL divergence.

The action of unmasking step k is the M_k tokens revealed in it, a_k = mu_theta(z_k, s_k) + sigma xi, xi ~ N(0, I): a
Gaussian whose mean is the one-step student. Everything here is computed in float32.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

MAX_LOG_RATIO = 20.0
STD_FLOOR = 1e-4  # as in TRL: keeps advantages finite when the rewards of a group barely differ
REWARD_SCALES = ("group", "batch", "none")


def action_log_prob(actions: Tensor, means: Tensor, sigma: float) -> Tensor:
    """log pi(a_k | s_k) = sum over the M tokens and C channels of log N(a; mu, sigma^2).

    actions, means [B, M, C] -> [B]. Summed, not averaged: the clip range of 0.1 to 0.2 belongs to this sum.
    """
    residual = (actions.float() - means.float()) / sigma
    constant = math.log(sigma) + 0.5 * math.log(2 * math.pi)
    return -(0.5 * residual.square() + constant).sum(dim=(1, 2))


def action_kl(means: Tensor, reference_means: Tensor, sigma: float) -> Tensor:
    """KL(pi_theta || pi_ref) of one unmasking step in closed form, |mu - mu_ref|^2 / (2 sigma^2). [B, M, C] -> [B]."""
    return (means.float() - reference_means.float()).square().sum(dim=(1, 2)) / (2 * sigma**2)


def group_advantages(
    rewards: Tensor, num_generations: int, scale_rewards: str = "group"
) -> tuple[Tensor, dict[str, Tensor]]:
    """A_i = (R_i - mean of its group) / (std + 1e-4)   (DeepSeekMath, arXiv 2402.03300, section 4.1).

    Args:
        rewards: [N], groups of num_generations in a row. NaN marks a sample without a reward: it is left out of its
            group's statistics and gets advantage 0.
        scale_rewards: "group" divides by the group's standard deviation, "batch" by that of all rewards (arXiv
            2508.08221), "none" does not divide (Dr. GRPO, arXiv 2503.20783).

    Returns:
        Advantages [N], and metrics as TRL names them: `reward`, `reward_std` (mean over groups),
        `frac_reward_zero_std`.
    """
    if scale_rewards not in REWARD_SCALES:
        raise ValueError(f'scale_rewards must be one of {", ".join(REWARD_SCALES)}, not "{scale_rewards}"')
    if num_generations < 1 or rewards.numel() % num_generations:
        raise ValueError(f"{rewards.numel()} rewards do not divide into groups of {num_generations}")
    groups = rewards.float().view(-1, num_generations)
    valid = ~groups.isnan()
    mean = groups.nanmean(dim=1, keepdim=True)
    std = _nanstd(groups, valid)
    centered = groups - mean
    if scale_rewards == "group":
        centered = centered / (std + STD_FLOOR)
    elif scale_rewards == "batch":
        centered = centered / (_nanstd(groups.view(1, -1), valid.view(1, -1)) + STD_FLOOR)
    advantages = torch.where(valid, centered, torch.zeros_like(centered)).flatten()
    has_any = valid.any(dim=1)
    metrics = {
        "reward": groups.nanmean(),
        "reward_std": std[has_any].mean(),
        "frac_reward_zero_std": (std[has_any] < STD_FLOOR).float().mean(),
    }
    return advantages, metrics


def _nanstd(values: Tensor, valid: Tensor) -> Tensor:
    """Unbiased standard deviation of the valid entries of each row, [G, 1]; 0 where fewer than two are valid."""
    count = valid.sum(dim=1, keepdim=True)
    mean = torch.where(valid, values, 0).sum(dim=1, keepdim=True) / count.clamp(min=1)
    squares = torch.where(valid, (values - mean).square(), 0).sum(dim=1, keepdim=True)
    return (squares / (count - 1).clamp(min=1)).sqrt()


def clipped_policy_loss(
    log_prob: Tensor, old_log_prob: Tensor, advantages: Tensor, epsilon_low: float = 0.2, epsilon_high: float = 0.2
) -> tuple[Tensor, dict[str, Tensor]]:
    """-E[min(rho A, clip(rho, 1 - eps_low, 1 + eps_high) A)] with rho = exp(log pi - log pi_old).

    PPO's clipped objective (arXiv 1707.06347, equation 7).
    All [B], one entry an image and unmasking step. Metrics: `ratio` (mean), `clip_ratio/low_mean`,
    `clip_ratio/high_mean`, `clip_ratio/region_mean`: shares of entries whose gradient the clip removes.
    """
    # Far beyond any clip range, yet exp stays finite: infinity times zero would turn the gradient into NaN.
    ratio = (log_prob - old_log_prob).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    clipped = ratio.clamp(1 - epsilon_low, 1 + epsilon_high)
    loss = -torch.minimum(ratio * advantages, clipped * advantages).mean()
    low = ((ratio < 1 - epsilon_low) & (advantages < 0)).float()
    high = ((ratio > 1 + epsilon_high) & (advantages > 0)).float()
    metrics = {
        "ratio": ratio.detach().mean(),
        "clip_ratio/low_mean": low.mean(),
        "clip_ratio/high_mean": high.mean(),
        "clip_ratio/region_mean": torch.maximum(low, high).mean(),
    }
    return loss, metrics
