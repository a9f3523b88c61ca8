"""The diffusion process of the head: cosine schedule, training losses, one reverse step.

Follows the improved-DDPM process (Nichol & Dhariwal 2021, arXiv 2102.09672) as MAR uses it: the network predicts
the noise and, in a second half of its channels, where the log variance lies between its two bounds.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


def cosine_betas(num_timesteps: int) -> np.ndarray:
    """Betas of the cosine schedule, float64 [T] (arXiv 2102.09672, equation 17; clipped at 0.999)."""
    edges = np.cos((np.arange(num_timesteps + 1) / num_timesteps + 0.008) / 1.008 * math.pi / 2) ** 2
    return np.minimum(1 - edges[1:] / edges[:-1], 0.999)


def respaced_timesteps(num_timesteps: int, num_steps: int) -> np.ndarray:
    """The `num_steps` evenly spaced timesteps of a shorter chain, int64, ascending, both ends included."""
    if not 1 <= num_steps <= num_timesteps:
        raise ValueError(f"num_diffusion_steps {num_steps} is outside 1..{num_timesteps}")
    stride = 1.0 if num_steps == 1 else (num_timesteps - 1) / (num_steps - 1)
    # The stride is accumulated and rounded half to even, as in the official code: "25" depends on it (166.5 -> 166).
    position, steps = 0.0, []
    for _ in range(num_steps):
        steps.append(round(position))
        position += stride
    return np.array(steps, dtype=np.int64)


@dataclass(frozen=True)
class DiffusionSchedule:
    """A discrete Gaussian diffusion process, possibly respaced. All arrays are float64 [T] but `timesteps` (int64)."""

    timesteps: np.ndarray
    betas: np.ndarray
    alphas_cumprod: np.ndarray
    posterior_variance: np.ndarray
    posterior_log_variance_clipped: np.ndarray
    posterior_mean_coef1: np.ndarray
    posterior_mean_coef2: np.ndarray

    def __len__(self) -> int:
        return len(self.betas)

    def at(self, name: str, t: Tensor) -> Tensor:
        """Values of the array `name` at the indices t (any shape), float32 [..., 1], ready to scale channels."""
        return _on_device(self, name, t.device)[t].unsqueeze(-1)

    def alpha(self, t: Tensor) -> Tensor:
        """alpha_t = sqrt(abar_t), float32 [..., 1]."""
        return self.at("sqrt_alphas_cumprod", t)

    def sigma(self, t: Tensor) -> Tensor:
        """sigma_t = sqrt(1 - abar_t), float32 [..., 1]."""
        return self.at("sqrt_one_minus_alphas_cumprod", t)

    @property
    def sqrt_alphas_cumprod(self) -> np.ndarray:
        return np.sqrt(self.alphas_cumprod)

    @property
    def sqrt_one_minus_alphas_cumprod(self) -> np.ndarray:
        return np.sqrt(1 - self.alphas_cumprod)

    @property
    def log_betas(self) -> np.ndarray:
        return np.log(self.betas)

    def __hash__(self) -> int:
        return id(self)  # schedules are made once by `make_schedule` and shared

    def __eq__(self, other: object) -> bool:
        return self is other


@lru_cache(maxsize=256)
def _on_device(schedule: DiffusionSchedule, name: str, device: torch.device) -> Tensor:
    # Kept outside the module: buffers would be cast to bf16 with the weights and lost on the meta device.
    return torch.from_numpy(np.asarray(getattr(schedule, name))).float().to(device)


def forget_tensors() -> None:
    """Drop the tensors that are kept for each schedule and device: those made in a fake mode must not outlive it."""
    _on_device.cache_clear()


@lru_cache(maxsize=32)
def make_schedule(num_timesteps: int = 1000, num_steps: int | None = None) -> DiffusionSchedule:
    """The cosine process of `num_timesteps`, respaced to `num_steps` (None: all of them)."""
    all_alphas_cumprod = np.cumprod(1 - cosine_betas(num_timesteps))
    timesteps = respaced_timesteps(num_timesteps, num_timesteps if num_steps is None else num_steps)
    previous = np.concatenate([[1.0], all_alphas_cumprod[timesteps][:-1]])
    betas = 1 - all_alphas_cumprod[timesteps] / previous
    alphas_cumprod = np.cumprod(1 - betas)
    previous = np.concatenate([[1.0], alphas_cumprod[:-1]])
    variance = betas * (1 - previous) / (1 - alphas_cumprod)
    # The variance is 0 at index 0; its logarithm is replaced by the next one.
    clipped = variance if len(variance) == 1 else np.concatenate([variance[1:2], variance[1:]])
    return DiffusionSchedule(
        timesteps=timesteps,
        betas=betas,
        alphas_cumprod=alphas_cumprod,
        posterior_variance=variance,
        posterior_log_variance_clipped=np.log(np.maximum(clipped, np.finfo(np.float64).tiny)),
        posterior_mean_coef1=betas * np.sqrt(previous) / (1 - alphas_cumprod),
        posterior_mean_coef2=(1 - previous) * np.sqrt(1 - betas) / (1 - alphas_cumprod),
    )


def add_noise(schedule: DiffusionSchedule, x_start: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """x_t = alpha_t x_0 + sigma_t eps. x_start, noise [..., C]; t int64 [...]."""
    return schedule.alpha(t) * x_start + schedule.sigma(t) * noise


def predict_start(schedule: DiffusionSchedule, x_t: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """x_0 = (x_t - sigma_t eps) / alpha_t, the inverse of `add_noise`. Shapes as there."""
    return (x_t - schedule.sigma(t) * noise) / schedule.alpha(t)


def posterior(
    schedule: DiffusionSchedule, model_output: Tensor, x_t: Tensor, t: Tensor, clip_range: float | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, log variance and predicted x_0 of p(x_{t-1} | x_t), each [..., C]; model_output [..., 2C].

    clip_range clips the predicted x_0 to [-clip_range, clip_range]: for pixels, whose range is known. Near t = T an
    error of the predicted noise is multiplied by hundreds in x_0; only a long-trained network survives that unclipped.
    """
    noise, fraction = model_output.chunk(2, dim=-1)
    fraction = (fraction + 1) / 2
    low, high = schedule.at("posterior_log_variance_clipped", t), schedule.at("log_betas", t)
    log_variance = fraction * high + (1 - fraction) * low
    x_start = predict_start(schedule, x_t, noise, t)
    if clip_range is not None:
        x_start = x_start.clamp(-clip_range, clip_range)
    mean = schedule.at("posterior_mean_coef1", t) * x_start + schedule.at("posterior_mean_coef2", t) * x_t
    return mean, log_variance, x_start


def diffusion_losses(
    schedule: DiffusionSchedule, model_output: Tensor, x_start: Tensor, x_t: Tensor, noise: Tensor, t: Tensor
) -> tuple[Tensor, Tensor]:
    """The two terms of MAR's loss for each token (arXiv 2406.11838; variational bound of arXiv 2102.09672, equation 4).

    Args:
        model_output: [..., 2C]. x_start, x_t, noise: [..., C]. t: int64 [...].

    Returns:
        (mse, vb), each [...]: squared error of the noise, mean over channels; variational bound in bits a channel. The
        bound trains the variance only: its gradient does not reach the noise prediction. The loss is their plain sum.
    """
    channels = x_start.shape[-1]
    predicted_noise = model_output[..., :channels]
    mse = (noise - predicted_noise).square().mean(dim=-1)

    frozen = torch.cat([predicted_noise.detach(), model_output[..., channels:]], dim=-1)
    mean, log_variance, _ = posterior(schedule, frozen, x_t, t)
    true_mean = schedule.at("posterior_mean_coef1", t) * x_start + schedule.at("posterior_mean_coef2", t) * x_t
    true_log_variance = schedule.at("posterior_log_variance_clipped", t)
    kl = 0.5 * (
        log_variance
        - true_log_variance
        - 1
        + (true_log_variance - log_variance).exp()
        + (true_mean - mean).square() * (-log_variance).exp()
    )
    nll = -_discretized_log_likelihood(x_start, mean, 0.5 * log_variance)
    bits = torch.where(t == 0, nll.mean(dim=-1), kl.mean(dim=-1)) / math.log(2)
    return mse, bits


def _discretized_log_likelihood(x: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    """log-probability of x under a Gaussian cut into bins of half-width 1/255 with open tails beyond +-0.999."""

    def cdf(value: Tensor) -> Tensor:  # the tanh approximation of the reference implementation
        return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (value + 0.044715 * value.pow(3))))

    centered, inverse_scale = x - mean, (-log_scale).exp()
    upper, lower = cdf(inverse_scale * (centered + 1 / 255)), cdf(inverse_scale * (centered - 1 / 255))
    mass = torch.where(x < -0.999, upper, torch.where(x > 0.999, 1 - lower, upper - lower))
    return mass.clamp(min=1e-12).log()


def reverse_step(
    schedule: DiffusionSchedule,
    model_output: Tensor,
    x_t: Tensor,
    index: int,
    noise: Tensor,
    temperature: float = 1.0,
    clip_range: float | None = None,
) -> Tensor:
    """One ancestral step x_t -> x_{t-1} at respaced `index`; no noise is added at index 0. x_t, noise [N, C].

    As `posterior` has it, with what depends on the index alone computed once, in float64.
    """
    c = reverse_constants(schedule)[index]
    eps, fraction = model_output.chunk(2, dim=-1)
    if clip_range is None:
        mean = torch.add(x_t * c.mean_of_x, eps, alpha=-c.mean_of_noise)
    else:
        x_start = torch.add(x_t * c.start_of_x, eps, alpha=-c.start_of_noise).clamp_(-clip_range, clip_range)
        mean = torch.add(x_t * c.mean_of_x_t, x_start, alpha=c.mean_of_start)
    if index == 0:
        return mean
    std = (fraction * c.half_log_range).add_(c.log_middle).exp_()
    return torch.addcmul(mean, std, noise, value=temperature)


class ReverseConstants(NamedTuple):
    """The numbers of a reverse step; e is the noise prediction and v the variance value of the network.

    x_0 = start_of_x x_t - start_of_noise e, and mean = mean_of_start x_0 + mean_of_x_t x_t, which is mean_of_x x_t -
    mean_of_noise e where nothing is clipped; log std = log_middle + half_log_range v.
    """

    start_of_x: float
    start_of_noise: float
    mean_of_start: float
    mean_of_x_t: float
    mean_of_x: float
    mean_of_noise: float
    log_middle: float
    half_log_range: float


@lru_cache(maxsize=32)
def reverse_constants(schedule: DiffusionSchedule) -> list[ReverseConstants]:
    """Of each step of the chain."""
    alpha, sigma = schedule.sqrt_alphas_cumprod, schedule.sqrt_one_minus_alphas_cumprod
    of_start, of_x_t = schedule.posterior_mean_coef1, schedule.posterior_mean_coef2
    low, high = schedule.posterior_log_variance_clipped, schedule.log_betas
    columns = [1 / alpha, sigma / alpha, of_start, of_x_t, of_start / alpha + of_x_t, of_start * sigma / alpha]
    columns += [(low + high) / 4, (high - low) / 4]  # of the deviation, half of the variance's logarithm
    return [ReverseConstants(*row) for row in np.stack(columns, axis=1).tolist()]
