"""Generalised score implicit matching: the loss that turns a MAR teacher into a one-step student.

MARVAL (arXiv 2511.15190) applies the score implicit matching of Luo et al. (2024, arXiv 2410.16794) to the diffusion
head. Scores are written as predicted clean tokens: s = (alpha x0_hat - x_t) / sigma^2, so a difference of scores is
alpha / sigma^2 times a difference of x0_hat. Dropping that factor is the weighting of timesteps that trained best here.
"""

from __future__ import annotations

import torch
from torch import Tensor


def gsim_loss(
    x_start: Tensor, auxiliary_start: Tensor, teacher_start: Tensor, r: float = 1e-5
) -> tuple[Tensor, dict[str, Tensor]]:
    """L = E[-d'(y)^T (s_phi(x_t) - grad log p_t(x_t | x0)) + d(y)] with y = s_phi(x_t) - s_p(x_t).

    d(y) = sqrt(|y|^2 + r^2) - r. With phi the exact score of the student's distribution the gradient in theta is that
    of E_{x_t ~ student}[d(s_theta - s_p)] (arXiv 2410.16794, theorem 3.1). At y = 0 it vanishes.

    Args:
        x_start: x0 = g_theta(z, c), the student's tokens, [..., C], with gradient.
        auxiliary_start: x0_hat of the auxiliary network at x_t = alpha_t x0 + sigma_t eps, [..., C]; the gradient flows
            through x_t, not into the auxiliary network's parameters.
        teacher_start: x0_hat of the guided teacher at the same x_t, [..., C], likewise.
        r: Softening of the pseudo-Huber distance, in units of a token.

    Returns:
        The mean loss over tokens, and metrics: `score_gap`, the mean of |y|.
    """
    y = auxiliary_start - teacher_start
    norm = (y.square().sum(dim=-1, keepdim=True) + r**2).sqrt()
    distance = norm.squeeze(-1) - r
    loss = distance - (y / norm * (auxiliary_start - x_start)).sum(dim=-1)
    return loss.mean(), {"score_gap": distance.detach().mean()}


def denoising_loss(predicted_noise: Tensor, noise: Tensor) -> Tensor:
    """Denoising score matching in its noise form, mean |eps_hat - eps|^2 over everything. Both [..., C]."""
    return torch.nn.functional.mse_loss(predicted_noise, noise)
