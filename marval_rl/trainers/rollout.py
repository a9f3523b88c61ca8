"""Rollouts of the one-step student: the unmasking steps as actions, with or without a gradient."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from marval_rl.losses.policy import action_log_prob
from marval_rl.models import MARModel
from marval_rl.models.unmasking import gather_tokens, random_order, revealed_positions, scatter_tokens, unmasking_steps


@torch.no_grad()
def sample_rollout(
    student: MARModel, class_labels: Tensor, num_unmasking_steps: int, sigma: float
) -> dict[str, Tensor]:
    """Sample a_k ~ N(mu(z_k, s_k), sigma^2) for every unmasking step.

    class_labels [B]. The state s_k follows from the final tokens, the order and k, so a rollout is kept as
    {class_labels [B], order [B, L], noise z [B, L, C], tokens a [B, L, C], log_prob [B, K']}, K' being the number of
    steps that reveal anything.
    """
    config, device, batch = student.config, class_labels.device, len(class_labels)
    order = random_order(batch, config.num_tokens, device)
    noise = torch.randn(batch, config.num_tokens, config.token_channels, device=device)
    exploration = torch.randn_like(noise)
    tokens, log_probs = torch.zeros_like(noise), []
    for masked, kept in unmasking_steps(config.num_tokens, num_unmasking_steps):
        positions = revealed_positions(order, masked, kept)
        mean, _ = student.one_step(tokens, class_labels, order, masked, kept, gather_tokens(noise, positions))
        action = mean + sigma * gather_tokens(exploration, positions)
        log_probs.append(action_log_prob(action, mean, sigma))
        tokens = scatter_tokens(tokens, positions, action)
    return {
        "class_labels": class_labels,
        "order": order,
        "noise": noise,
        "tokens": tokens,
        "log_prob": torch.stack(log_probs, dim=1),
    }


def step_mean(student: MARModel, rollout: dict[str, Tensor], masked: int, kept: int) -> tuple[Tensor, Tensor]:
    """(action a_k, mean mu_theta(z_k, s_k)), both [B, M, C], of one unmasking step of a rollout."""
    positions = revealed_positions(rollout["order"], masked, kept)
    mean, _ = student.one_step(
        rollout["tokens"],
        rollout["class_labels"],
        rollout["order"],
        masked,
        kept,
        gather_tokens(rollout["noise"], positions),
    )
    return gather_tokens(rollout["tokens"], positions), mean


def differentiable_rollout(student: MARModel, class_labels: Tensor, num_unmasking_steps: int) -> dict[str, Tensor]:
    """Paint with a gradient through all unmasking steps: G_theta(z, class, K) of reward back-propagation.

    Each step is checkpointed: memory holds one step's activations and K states. Returns {tokens, order, class_labels}.
    """
    config, device, batch = student.config, class_labels.device, len(class_labels)
    order = random_order(batch, config.num_tokens, device)
    noise = torch.randn(batch, config.num_tokens, config.token_channels, device=device)
    tokens = torch.zeros_like(noise)

    def reveal(tokens: Tensor, masked: int, kept: int) -> Tensor:
        positions = revealed_positions(order, masked, kept)
        revealed, _ = student.one_step(tokens, class_labels, order, masked, kept, gather_tokens(noise, positions))
        return scatter_tokens(tokens, positions, revealed)

    for masked, kept in unmasking_steps(config.num_tokens, num_unmasking_steps):
        tokens = checkpoint(reveal, tokens, masked, kept, use_reentrant=False)
    return {"tokens": tokens, "order": order, "class_labels": class_labels}
