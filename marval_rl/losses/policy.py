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
LOSS_TYPES = ("grpo", "cispo")
IMPORTANCE_SAMPLING_LEVELS = ("unmasking_step", "image")
LOG_PROB_REDUCTIONS = ("sum", "mean")


def action_log_prob(actions: Tensor, means: Tensor, sigma: float, reduction: str = "sum") -> Tensor:
    """log pi(a_k | s_k) = sum over the M tokens and C channels of log N(a; mu, sigma^2).

    actions, means [B, M, C] -> [B].
    reduction "mean" divides by M C, as many systems do: then ratios stay near 1, and an unmasking step weighs the same
    however many tokens it reveals. A clip range belongs to the reduction: 0.2 for a sum is 0.2 / (M C) for a mean.
    """
    residual = (actions.float() - means.float()) / sigma
    constant = math.log(sigma) + 0.5 * math.log(2 * math.pi)
    log_probs = -(0.5 * residual.square() + constant).flatten(1)
    return log_probs.sum(dim=1) if reduction == "sum" else log_probs.mean(dim=1)


def action_kl(means: Tensor, reference_means: Tensor, sigma: float) -> Tensor:
    """KL(pi_theta || pi_ref) of one unmasking step in closed form, |mu - mu_ref|^2 / (2 sigma^2). [B, M, C] -> [B]."""
    return (means.float() - reference_means.float()).square().sum(dim=(1, 2)) / (2 * sigma**2)


def group_advantages(
    rewards: Tensor, num_generations: int, scale_rewards: str = "group", std_floor: float = 0.0
) -> tuple[Tensor, dict[str, Tensor]]:
    """A_i = (R_i - mean of its group) / (std + 1e-4)   (DeepSeekMath, arXiv 2402.03300, section 4.1).

    Args:
        rewards: [N], groups of num_generations in a row. NaN marks a sample without a reward: it is left out of its
            group's statistics and gets advantage 0.
        scale_rewards: "group" divides by the group's standard deviation, "batch" by that of all rewards (arXiv
            2508.08221), "none" does not divide (Dr. GRPO, arXiv 2503.20783).
        std_floor: No deviation counts as less than this, in units of the reward: a group whose rewards barely differ
            says little, and dividing by its deviation would make it shout.

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
        centered = centered / (std.clamp(min=std_floor) + STD_FLOOR)
    elif scale_rewards == "batch":
        batch_std = _nanstd(groups.view(1, -1), valid.view(1, -1))
        centered = centered / (batch_std.clamp(min=std_floor) + STD_FLOOR)
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


def group_weights(advantages: Tensor, num_generations: int) -> Tensor:
    """What an image counts in the loss, so that groups without a preference are dropped from its mean: [N] -> [N].

    0 in a group whose advantages are all 0, and (number of groups) / (groups kept) in the others: the loss is a mean
    over the images that have something to teach (dynamic sampling of DAPO, arXiv 2503.14476, without sampling more).
    """
    kept = advantages.view(-1, num_generations).ne(0).any(dim=1).float()
    return (kept * len(kept) / kept.sum().clamp(min=1)).repeat_interleave(num_generations)


def policy_loss(
    log_prob: Tensor,
    old_log_prob: Tensor,
    advantages: Tensor,
    epsilon_low: float = 0.2,
    epsilon_high: float = 0.2,
    loss_type: str = "grpo",
    importance_sampling_level: str = "unmasking_step",
    weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The policy gradient loss of B images with S trained unmasking steps, with rho = exp(log pi - log pi_old).

    Args:
        log_prob, old_log_prob: [B, S].
        advantages: [B], one an image.
        epsilon_low, epsilon_high: Clip range.
        loss_type: "grpo": -E[min(rho A, clip(rho, 1 - eps_low, 1 + eps_high) A)], PPO's clipped objective (arXiv
            1707.06347, equation 7). "cispo": -E[min(rho, 1 + eps_high) A log pi] with no gradient through rho, so
            that no action is silenced by the clip (MiniMax-M1, arXiv 2506.13585, equation 4). TRL's "dr_grpo" would be
            "grpo": all images have equally many actions.
        importance_sampling_level: "unmasking_step": a ratio for each action. "image": one for the whole image, exp of
            the mean log-ratio of its steps (GSPO, arXiv 2507.18071).
        weights: [B], what each image counts; None for 1 each.

    Metrics: `ratio` (mean), `clip_ratio/low_mean`, `clip_ratio/high_mean`, `clip_ratio/region_mean`: shares of entries
    whose ratio the clip holds.
    """
    log_ratio = log_prob - old_log_prob
    if importance_sampling_level == "image":
        log_ratio = log_ratio.mean(dim=1, keepdim=True)
    # Far beyond any clip range, yet exp stays finite: infinity times zero would turn the gradient into NaN.
    ratio = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    advantages = advantages.unsqueeze(1)
    high = (ratio > 1 + epsilon_high) & (advantages > 0)
    if loss_type == "cispo":
        losses = -ratio.detach().clamp(max=1 + epsilon_high) * advantages * log_prob
        low = torch.zeros_like(high)
    else:
        clipped = ratio.clamp(1 - epsilon_low, 1 + epsilon_high)
        losses = -torch.minimum(ratio * advantages, clipped * advantages)
        low = (ratio < 1 - epsilon_low) & (advantages < 0)
    if weights is not None:
        losses = losses * weights.unsqueeze(1)
    metrics = {
        "ratio": ratio.detach().mean(),
        "clip_ratio/low_mean": low.float().mean(),
        "clip_ratio/high_mean": high.float().mean(),
        "clip_ratio/region_mean": (low | high).float().mean(),
    }
    return losses.mean(), metrics
