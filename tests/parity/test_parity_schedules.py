"""The diffusion process and the unmasking schedules."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
from mar_reference import golden, golden_facts

from marval_rl.models.diffusion import make_schedule
from marval_rl.models.unmasking import guidance_scales, unmasking_steps

PROCESSES = {"train1000": 1000, "100": 100, "50": 50, "25": 25}
ARRAYS = (
    "betas",
    "alphas_cumprod",
    "posterior_variance",
    "posterior_log_variance_clipped",
    "posterior_mean_coef1",
    "posterior_mean_coef2",
)


@pytest.mark.parametrize("name", PROCESSES)
def test_process_arrays(name):
    schedule = make_schedule(1000, PROCESSES[name])
    assert len(schedule) == PROCESSES[name]
    for array in ARRAYS:
        expected = golden("schedules")[f"{name}.{array}"].numpy()
        np.testing.assert_allclose(getattr(schedule, array), expected, rtol=1e-12, atol=0, err_msg=array)
    np.testing.assert_array_equal(schedule.timesteps, golden("schedules")[f"{name}.timesteps"].numpy())


def test_the_full_process_is_the_default():
    assert make_schedule(1000).betas.tobytes() == make_schedule(1000, 1000).betas.tobytes()


@pytest.mark.parametrize("name", PROCESSES)
def test_betas_are_equal_to_the_last_bit(name):
    expected = golden_facts()["betas"][name]
    betas = make_schedule(1000, PROCESSES[name]).betas
    assert betas.sum() == pytest.approx(expected["sum"], rel=1e-14)
    assert np.square(betas).sum() == pytest.approx(expected["sum_of_squares"], rel=1e-14)
    assert hashlib.sha256(betas.astype("<f8").tobytes()).hexdigest() == expected["sha256"]


def test_respaced_steps_round_half_to_even():
    timesteps = make_schedule(1000, 25).timesteps
    assert (timesteps[4], timesteps[20]) == (166, 832)  # 4 and 20 strides of 999 / 24 are 166.5 and 832.5


def test_control_a_chain_one_timestep_off_has_other_betas():
    figures = golden("schedules")
    off_by_one = np.maximum(figures["100.timesteps"].numpy() - 1, 0)
    alphas_cumprod = figures["train1000.alphas_cumprod"].numpy()[off_by_one]
    betas = 1 - alphas_cumprod[1:] / alphas_cumprod[:-1]
    assert not np.allclose(betas, figures["100.betas"].numpy()[1:], rtol=1e-3, atol=0)
    assert not np.allclose(betas, make_schedule(1000, 100).betas[1:], rtol=1e-3, atol=0)


@pytest.mark.parametrize("num_steps", [64, 256, 32, 16, 8, 1, 300])
def test_tokens_revealed_and_guidance_of_each_unmasking_step(num_steps):
    expected = golden_facts()["unmasking_of_256_tokens"][str(num_steps)]
    # The official code also runs the iterations that reveal nothing; ours leaves them out.
    official = [
        (revealed, scale)
        for revealed, scale in zip(expected["revealed"], expected["linear_guidance_2.9"], strict=True)
        if revealed
    ]
    assert len(expected["revealed"]) == num_steps
    steps = unmasking_steps(256, num_steps)
    assert [before - after for before, after in steps] == [revealed for revealed, _ in official]
    scales = guidance_scales(256, num_steps, 2.9, "linear")
    np.testing.assert_allclose(scales, [scale for _, scale in official], rtol=1e-6)
    assert guidance_scales(256, num_steps, 2.9, "constant") == [2.9] * len(official)
