"""Rollouts of the one-step student: the unmasking steps as actions, with or without a gradient."""

from __future__ import annotations

from collections.abc import Callable, Collection

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from marval_rl.losses.policy import action_log_prob
from marval_rl.models import MARConfig, MARModel
from marval_rl.models.unmasking import gather_tokens, random_order, revealed_positions, scatter_tokens, unmasking_steps


def draw_chances(
    num_groups: int,
    num_generations: int,
    config: MARConfig,
    generator: torch.Generator,
    share_order: bool = False,
    share_noise: bool = False,
) -> dict[str, Tensor]:
    """All that is random in the rollouts of a generation batch of N images, groups of num_generations in a row.

    Returns {order [N, L], noise z [N, L, C], exploration xi [N, L, C]} on the generator's device. With share_order, or
    share_noise, the images of a group have the unmasking order, or z, in common; xi is always each image's own.
    """
    device, length, channels = generator.device, config.num_tokens, config.token_channels
    num_images = num_groups * num_generations

    def draw(shared: bool, make: Callable[[int], Tensor]) -> Tensor:
        return make(num_groups).repeat_interleave(num_generations, dim=0) if shared else make(num_images)

    def normal(count: int) -> Tensor:
        return torch.randn(count, length, channels, device=device, generator=generator)

    return {
        "order": draw(share_order, lambda count: random_order(count, length, device, generator)),
        "noise": draw(share_noise, normal),
        "exploration": normal(num_images),
    }


@torch.no_grad()
def sample_rollout(
    student: MARModel,
    class_labels: Tensor,
    chances: dict[str, Tensor],
    num_unmasking_steps: int,
    sigma: float,
    exploring: Collection[int] | None = None,
    reduction: str = "sum",
) -> dict[str, Tensor]:
    """Sample a_k ~ N(mu(z_k, s_k), sigma^2) for every unmasking step.

    Args:
        class_labels: [B].
        chances: order, noise and exploration of these B images, as of `draw_chances`.
        exploring: Indices of the unmasking steps that explore; the others reveal mu itself (MixGRPO, arXiv 2507.21802).
            None for all.
        reduction: Of the log-probabilities, as in `action_log_prob`.

    The state s_k follows from the final tokens, the order and k, so a rollout is kept as {class_labels [B], order
    [B, L], noise z [B, L, C], tokens a [B, L, C], log_prob [B, K']}, K' being the number of steps that reveal anything.
    log_prob is 0 where a step does not explore.
    """
    config, order, noise = student.config, chances["order"], chances["noise"]
    tokens, log_probs = torch.zeros_like(noise), []
    for index, (masked, kept) in enumerate(unmasking_steps(config.num_tokens, num_unmasking_steps)):
        positions = revealed_positions(order, masked, kept)
        mean, _ = student.one_step(tokens, class_labels, order, masked, kept, gather_tokens(noise, positions))
        if exploring is None or index in exploring:
            action = mean + sigma * gather_tokens(chances["exploration"], positions)
            log_probs.append(action_log_prob(action, mean, sigma, reduction))
        else:
            action = mean
            log_probs.append(torch.zeros(len(mean), device=mean.device))
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


def differentiable_rollout(
    student: MARModel,
    class_labels: Tensor,
    num_unmasking_steps: int,
    with_gradient: Collection[int] | None = None,
    inspect: Callable[[Tensor, dict[str, Tensor], int, int], None] | None = None,
) -> dict[str, Tensor]:
    """Paint with a gradient through unmasking steps: G_theta(z, class, K) of reward back-propagation.

    Args:
        class_labels: [B].
        with_gradient: Indices of the steps that take a gradient; None for all. What the others reveal is a constant.
        inspect: Called for each step that takes a gradient with (mean [B, M, C], the state before it as {tokens,
            class_labels, order, noise}, masked, kept).

    Each step is checkpointed: memory holds one step's activations and K states. Returns {tokens, order, class_labels,
    noise}.
    """
    config, device, batch = student.config, class_labels.device, len(class_labels)
    order = random_order(batch, config.num_tokens, device)
    noise = torch.randn(batch, config.num_tokens, config.token_channels, device=device)
    state = {"tokens": torch.zeros_like(noise), "order": order, "class_labels": class_labels, "noise": noise}

    def reveal(tokens: Tensor, masked: int, kept: int, positions: Tensor) -> Tensor:
        mean, _ = student.one_step(tokens, class_labels, order, masked, kept, gather_tokens(noise, positions))
        return mean

    for index, (masked, kept) in enumerate(unmasking_steps(config.num_tokens, num_unmasking_steps)):
        positions = revealed_positions(order, masked, kept)
        if with_gradient is None or index in with_gradient:
            mean = checkpoint(reveal, state["tokens"], masked, kept, positions, use_reentrant=False)
            if inspect is not None and torch.is_grad_enabled():
                inspect(mean, state, masked, kept)
        else:
            with torch.no_grad():
                mean = reveal(state["tokens"], masked, kept, positions)
        state = {**state, "tokens": scatter_tokens(state["tokens"], positions, mean)}
    return state
