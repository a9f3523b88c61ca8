"""The algebra of the diffusion process."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.distributions import Normal, kl_divergence

from marval_rl.models.diffusion import (
    add_noise,
    diffusion_losses,
    make_schedule,
    posterior,
    predict_start,
    respaced_timesteps,
    reverse_step,
)


def draws(count: int, channels: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, count, channels, generator=generator).unbind()


def test_alpha_and_sigma_share_the_unit_circle():
    schedule, t = make_schedule(1000), torch.arange(1000)
    torch.testing.assert_close(schedule.alpha(t).square() + schedule.sigma(t).square(), torch.ones(1000, 1))
    assert (schedule.alpha(t).diff(dim=0) < 0).all()
    assert schedule.alpha(torch.zeros(2, 5, dtype=torch.int64)).shape == (2, 5, 1)


def test_predict_start_inverts_add_noise():
    schedule, t = make_schedule(1000), torch.arange(0, 1000, 100)
    x_start, noise = draws(len(t))
    x_t = add_noise(schedule, x_start, noise, t)
    torch.testing.assert_close(predict_start(schedule, x_t, noise, t), x_start, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("num_steps", [1000, 100, 25, 2])
def test_posterior_is_bayes_rule(num_steps):
    """From the prior N(alpha' x_0, 1 - abar') of x_{t-1} and the likelihood N(sqrt(1 - beta) x_{t-1}, beta) of x_t."""
    schedule = make_schedule(1000, num_steps)
    abar = np.concatenate([[1.0], schedule.alphas_cumprod])
    for index in range(1, num_steps):
        prior_variance, beta = 1 - abar[index], schedule.betas[index]
        precision = 1 / prior_variance + (1 - beta) / beta
        on_start = math.sqrt(abar[index]) / prior_variance / precision
        on_x_t = math.sqrt(1 - beta) / beta / precision
        assert schedule.posterior_variance[index] == pytest.approx(1 / precision, rel=1e-9)
        assert schedule.posterior_log_variance_clipped[index] == pytest.approx(-math.log(precision), rel=1e-9)
        assert schedule.posterior_mean_coef1[index] == pytest.approx(on_start, rel=1e-9)
        assert schedule.posterior_mean_coef2[index] == pytest.approx(on_x_t, rel=1e-9)


def test_a_respaced_process_passes_through_the_same_noise_levels():
    full, short = make_schedule(1000), make_schedule(1000, 20)
    np.testing.assert_allclose(short.alphas_cumprod, full.alphas_cumprod[short.timesteps], rtol=1e-6)


@pytest.mark.parametrize("num_steps", [0, -1, 1001])
def test_impossible_respacings_are_refused(num_steps):
    with pytest.raises(ValueError, match=f"num_diffusion_steps {num_steps} is outside 1..1000"):
        respaced_timesteps(1000, num_steps)


def test_one_step_of_a_perfect_model_is_the_start():
    """With the true noise the mean at index 0 is x_0 itself, and nothing is added."""
    schedule = make_schedule(1000, 100)
    x_start, noise = draws(4)
    x_t = add_noise(schedule, x_start, noise, torch.zeros(4, dtype=torch.int64))
    output = torch.cat([noise, torch.zeros_like(noise)], dim=-1)
    torch.testing.assert_close(reverse_step(schedule, output, x_t, 0, 1e6 * noise), x_start, rtol=1e-4, atol=1e-4)


def test_variance_values_run_between_the_two_bounds():
    schedule, t = make_schedule(1000), torch.tensor([5, 500, 999])
    x_t, noise = draws(3)
    for value, bound in ((-1.0, "posterior_log_variance_clipped"), (1.0, "log_betas")):
        output = torch.cat([noise, torch.full_like(noise, value)], dim=-1)
        _, log_variance, _ = posterior(schedule, output, x_t, t)
        torch.testing.assert_close(log_variance, schedule.at(bound, t).expand(3, 3))


def test_clipping_keeps_the_predicted_start_in_its_range():
    schedule = make_schedule(1000, 100)
    x_t, noise = draws(4)
    output, t = torch.cat([noise, torch.zeros_like(noise)], dim=-1), torch.full((4,), 98)
    _, log_variance, free = posterior(schedule, output, x_t, t)
    mean, same_log_variance, clipped = posterior(schedule, output, x_t, t, clip_range=1.0)
    assert free.abs().max() > 1
    assert torch.equal(clipped, free.clamp(-1, 1))
    assert torch.equal(same_log_variance, log_variance)
    coefficients = (schedule.at(f"posterior_mean_coef{i}", t) for i in (1, 2))
    torch.testing.assert_close(mean, sum(c * x for c, x in zip(coefficients, (clipped, x_t), strict=True)))
    step = reverse_step(schedule, output, x_t, 98, noise, 0.0, clip_range=1.0)
    torch.testing.assert_close(step, mean)


def test_temperature_scales_the_added_noise():
    schedule = make_schedule(1000, 100)
    x_t, noise = draws(4)
    output = torch.cat([noise, torch.zeros_like(noise)], dim=-1)
    cold, half, full = (reverse_step(schedule, output, x_t, 50, noise, temperature) for temperature in (0.0, 0.5, 1.0))
    torch.testing.assert_close(half - cold, (full - cold) / 2)
    assert (full - cold).abs().max() > 0.01


def test_the_bound_is_the_divergence_of_the_two_posteriors_in_bits():
    schedule, t = make_schedule(1000), torch.tensor([1, 20, 400, 999])
    x_start, noise = draws(4)
    x_t = add_noise(schedule, x_start, noise, t)
    generator = torch.Generator().manual_seed(1)
    output = torch.cat([noise + 0.1, torch.randn(4, 3, generator=generator)], dim=-1)
    mse, vb = diffusion_losses(schedule, output, x_start, x_t, noise, t)
    torch.testing.assert_close(mse, torch.full((4,), 0.01))

    mean, log_variance, _ = posterior(schedule, output, x_t, t)
    true_mean = schedule.at("posterior_mean_coef1", t) * x_start + schedule.at("posterior_mean_coef2", t) * x_t
    true_std = (0.5 * schedule.at("posterior_log_variance_clipped", t)).exp()
    divergence = kl_divergence(Normal(true_mean, true_std.expand(4, 3)), Normal(mean, (0.5 * log_variance).exp()))
    torch.testing.assert_close(vb, divergence.mean(dim=-1) / math.log(2), rtol=1e-4, atol=1e-6)


def test_the_bound_at_timestep_0_is_the_likelihood_of_a_bin():
    """Exact cdf instead of its tanh approximation, so the tolerance is loose; x_0 = 2 lies in the open tail."""
    schedule = make_schedule(1000)
    x_start = torch.tensor([[0.3, -0.5, 2.0]])
    noise = torch.tensor([[0.5, -1.0, 0.2]])
    t = torch.zeros(1, dtype=torch.int64)
    x_t = add_noise(schedule, x_start, noise, t)
    output = torch.cat([noise + 0.3, torch.ones_like(noise)], dim=-1)
    _, vb = diffusion_losses(schedule, output, x_start, x_t, noise, t)
    mean, log_variance, _ = posterior(schedule, output, x_t, t)
    model = Normal(mean, (0.5 * log_variance).exp())
    mass = model.cdf(x_start + 1 / 255) - model.cdf(x_start - 1 / 255)
    mass[0, 2] = 1 - model.cdf(x_start - 1 / 255)[0, 2]
    assert vb.item() == pytest.approx(-mass.log2().mean().item(), rel=0.02)
