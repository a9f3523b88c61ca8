"""The loop over unmasking steps, and the one-step student as a policy in it.

There is one loop, `unmask`. `generate` samples teacher and student with it, GRPO rolls out with exploration, and reward
back-propagation differentiates through it.

Letters in shapes: B images, L tokens per image, M tokens revealed in a step, C channels per token.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from marval_rl.models.config import MaskedConfig
from marval_rl.models.masked import MaskedModel
from marval_rl.models.unmasking import (
    gather_tokens,
    random_order,
    revealed_positions,
    scatter_tokens,
    unmasking_steps,
)

# What a network reveals: (tokens [B, L, C], tokens masked before, tokens masked after) -> [B, M, C].
Predict = Callable[[Tensor, int, int], Tensor]


class UnmaskedStep(NamedTuple):
    """One step of `unmask`."""

    number: int
    num_masked: int  # tokens masked before the step
    num_kept: int  # tokens still masked after it
    before: Tensor  # [B, L, C], the tokens before it
    mean: Tensor  # [B, M, C], what the network predicts for the tokens revealed
    revealed: Tensor  # [B, M, C], mean + policy_std * exploration
    tokens: Tensor  # [B, L, C], the tokens after it


def unmask(
    predict: Predict,
    order: Tensor,
    num_channels: int,
    num_unmasking_steps: int,
    *,
    exploration: Tensor | None = None,
    policy_std: float = 0.0,
    gradient_steps: Collection[int] = (),
) -> Iterator[UnmaskedStep]:
    """The loop over unmasking steps, from no token to all of them.

    Args:
        predict: The network.
        order: Unmasking order, int64 [B, L].
        num_channels: C.
        num_unmasking_steps: K; steps that reveal nothing (K > L) are left out.
        exploration: Standard normal noise [B, L, C]; None reveals what is predicted. With it a step is an action
            a_k = mean + policy_std * exploration of a Gaussian policy.
        policy_std: Standard deviation of that policy, in latent units.
        gradient_steps: Indices of the steps that take a gradient; the others reveal constants. Each is checkpointed, so
            memory holds the activations of one step and the tokens of all.
    """
    batch, length = order.shape
    tokens = torch.zeros(batch, length, num_channels, device=order.device)
    for index, (num_masked, num_kept) in enumerate(unmasking_steps(length, num_unmasking_steps)):
        if index in gradient_steps:
            mean = checkpoint(predict, tokens, num_masked, num_kept, use_reentrant=False)
        else:
            with torch.no_grad():
                mean = predict(tokens, num_masked, num_kept)
        positions = revealed_positions(order, num_masked, num_kept)  # [B, M]
        revealed = mean
        if exploration is not None:
            revealed = mean + policy_std * gather_tokens(exploration, positions)
        before, tokens = tokens, scatter_tokens(tokens, positions, revealed)
        yield UnmaskedStep(index, num_masked, num_kept, before, mean, revealed, tokens)


def student_mean(
    student: MaskedModel, inputs: Mapping[str, Tensor], tokens: Tensor, num_masked: int, num_kept: int
) -> Tensor:
    """mu_theta(z_k, s_k), the student's tokens [B, M, C] of one unmasking step; `partial` makes it a `Predict`.

    Args:
        student: The one-step student.
        inputs: class_labels [B], order [B, L] and noise z [B, L, C].
        tokens: [B, L, C]; only those unmasked before the step are read, so finished images serve for all steps.
        num_masked: Tokens masked before the step.
        num_kept: Tokens still masked after it.
    """
    asked = revealed_positions(inputs["order"], num_masked, num_kept)
    noise = gather_tokens(inputs["noise"], asked)
    return student.one_step(tokens, inputs["class_labels"], inputs["order"], num_masked, num_kept, noise, asked)[0]


def student_tokens(student: MaskedModel, inputs: Mapping[str, Tensor], num_unmasking_steps: int) -> Tensor:
    """Images of the one-step student, tokens [B, L, C], without a gradient; inputs as in `student_mean`."""
    with student.products(len(inputs["order"])):
        steps = unmask(
            partial(student_mean, student, inputs), inputs["order"], student.config.token_channels, num_unmasking_steps
        )
        return deque(steps, maxlen=1).pop().tokens  # no step is kept but the last


def draw_rollout_noise(
    num_groups: int,
    num_generations: int,
    config: MaskedConfig,
    generator: torch.Generator,
    share_order: bool = False,
    share_noise: bool = False,
) -> dict[str, Tensor]:
    """All that is random in the rollouts of N = num_groups x num_generations images; those of a group stand in a row.

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
