"""The diffusion head: forward, guidance, single reverse steps and training losses."""

from __future__ import annotations

import pytest
import torch
from mar_reference import WEIGHTS, assert_parity, golden, meets_parity, reference_model
from torch import Tensor

from marval_rl.models.diffusion import add_noise, diffusion_losses, make_schedule, posterior, reverse_step
from marval_rl.models.head import guide, timestep_embedding

CHANNELS = 16
STEP_INDICES = (99, 98, 50, 3, 1, 0)


@pytest.fixture(scope="module")
def heads():
    return {weights: reference_model(weights).diffloss for weights in WEIGHTS}


def guided_output(head: torch.nn.Module, timesteps: Tensor, scale: float) -> Tensor:
    """Guided model output [8, 2C]; the figures' conditions hold the labels first, the null class second."""
    figures = golden("head")
    x = figures["x2"][:8].repeat(2, 1)  # both halves see the first half's tokens
    return guide(head(x, timesteps, figures["c2"]), scale)


def test_timestep_embedding():
    # Angles reach 999, where neighbouring float32 numbers lie 6e-5 apart.
    assert_parity(timestep_embedding(golden("head")["t"]), golden("head")["timestep_embedding_256"], scale=10)


@pytest.mark.parametrize("weights", WEIGHTS)
@torch.no_grad()
def test_forward(heads, weights):
    figures, head = golden("head"), heads[weights]
    assert_parity(head.net.time_embed(figures["t"]), figures[f"{weights}.time_embed"])
    assert_parity(head(figures["x"], figures["t"], figures["c"]), figures[f"{weights}.out"])


@pytest.mark.parametrize("weights", WEIGHTS)
@torch.no_grad()
def test_several_draws_of_one_condition_broadcast(heads, weights):
    figures, head = golden("head"), heads[weights]
    output = head(figures["x"].repeat(3, 1, 1), figures["t"].repeat(3, 1), figures["c"])
    assert output.shape == (3, 8, 2 * CHANNELS)
    for draw in output:
        assert_parity(draw, figures[f"{weights}.out"])


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("scale", [1.0, 3.0])
@torch.no_grad()
def test_guidance(heads, weights, scale):
    expected = golden("head")[f"{weights}.cfg{scale}"]
    output = guided_output(heads[weights], golden("head")["t2"], scale)
    assert_parity(output, expected[:8])
    assert_parity(output[:, :CHANNELS], expected[8:, :CHANNELS])


@pytest.mark.parametrize("weights", WEIGHTS)
@torch.no_grad()
def test_control_guidance_with_the_halves_swapped_fails(heads, weights):
    figures = golden("head")
    outputs = heads[weights](figures["x2"][:8].repeat(2, 1), figures["t2"], figures["c2"])
    labelled, null = outputs.chunk(2)
    assert meets_parity(guide(torch.cat([labelled, null]), 3.0), figures[f"{weights}.cfg3.0"][:8])
    assert not meets_parity(guide(torch.cat([null, labelled]), 3.0), figures[f"{weights}.cfg3.0"][:8])


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("index", STEP_INDICES)
@pytest.mark.parametrize("scale", [1.0, 3.0])
@torch.no_grad()
def test_single_reverse_steps(heads, weights, index, scale):
    figures, schedule = golden("head"), make_schedule(1000, 100)
    timesteps = torch.full((16,), int(schedule.timesteps[index]))
    if scale == 1.0:
        x_t, output = figures["x2"], heads[weights](figures["x2"], timesteps, figures["c2"])
    else:
        x_t, output = figures["x2"][:8], guided_output(heads[weights], timesteps, scale)
    rows = len(x_t)
    prefix = f"{weights}.step{index}.cfg{scale}"
    expected = {
        key: figures[f"{prefix}.{key}"][:rows] for key in ("mean", "log_variance", "pred_xstart", "sample_temp0.9")
    }
    mean, log_variance, x_start = posterior(schedule, output, x_t, torch.full((rows,), index))
    sample = reverse_step(schedule, output, x_t, index, figures["step_noise"][:rows], temperature=0.9)
    # x_0 = (x_t - sigma eps) / alpha is a difference of large numbers where alpha is nearly 0.
    size = expected["pred_xstart"].abs().max()
    assert_parity(log_variance, expected["log_variance"])
    assert_parity(x_start, expected["pred_xstart"], size)
    assert_parity(mean, expected["mean"], size)
    assert_parity(sample, expected["sample_temp0.9"], size)


@torch.no_grad()
def test_control_a_wrong_temperature_fails_in_a_single_step(heads):
    figures, schedule = golden("head"), make_schedule(1000, 100)
    output = heads["crc"](figures["x2"], torch.full((16,), int(schedule.timesteps[50])), figures["c2"])
    sample = reverse_step(schedule, output, figures["x2"], 50, figures["step_noise"], temperature=1.0)
    assert not meets_parity(sample, figures["crc.step50.cfg1.0.sample_temp0.9"])


@torch.no_grad()
def test_control_a_step_one_index_off_fails(heads):
    figures, schedule = golden("head"), make_schedule(1000, 100)
    output = heads["crc"](figures["x2"], torch.full((16,), int(schedule.timesteps[50])), figures["c2"])
    mean, _, _ = posterior(schedule, output, figures["x2"], torch.full((16,), 51))
    assert not meets_parity(mean, figures["crc.step50.cfg1.0.mean"])


@pytest.mark.parametrize("weights", WEIGHTS)
@torch.no_grad()
def test_training_losses(heads, weights):
    figures, schedule = golden("head"), make_schedule(1000)
    x_start, noise, t = figures["x_start"], figures["noise"], figures["t"]
    assert x_start.abs().max() > 1  # the likelihood at t = 0 has open tails
    x_t = add_noise(schedule, x_start, noise, t)
    assert_parity(x_t, figures["x_t"])
    mse, vb = diffusion_losses(schedule, heads[weights](x_t, t, figures["c"]), x_start, x_t, noise, t)
    assert_parity(mse, figures[f"{weights}.train_mse"])
    assert_parity(vb, figures[f"{weights}.train_vb"])
    assert_parity(mse + vb, figures[f"{weights}.train_loss"])
    assert not meets_parity(mse + vb / 1000, figures[f"{weights}.train_loss"])  # control
