"""The reverse chain alone, and whole images."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from mar_reference import (
    CHAIN_TOLERANCE,
    GENERATION_TOLERANCE,
    WEIGHTS,
    golden,
    golden_facts,
    reference_model,
    relative_l2,
)
from torch import Tensor

from marval_rl.models import GenerationOutput, MARModel, diffusion, generate, generation
from marval_rl.models.chain import sample_chain
from marval_rl.models.diffusion import DiffusionSchedule, make_schedule, respaced_timesteps
from marval_rl.models.noise import GeneratorNoise

CHAIN_SEED, GENERATION_SEED = 111, 131
CHAINS = [(1.0, 1.0), (0.9, 1.0), (1.0, 3.0), (0.9, 3.0)]  # temperature, guidance scale
STORED_STATES = [0, 1, 50, 98, 99]  # after reverse steps 1, 2, 51, 99 and 100
GENERATIONS = {
    "lab.linear.cfg3.0.temp1.0.K6": {"guidance_scale": 3.0, "guidance_schedule": "linear", "temperature": 1.0},
    "lab.constant.cfg2.0.temp0.95.K6": {"guidance_scale": 2.0, "guidance_schedule": "constant", "temperature": 0.95},
    "lab.linear.cfg1.0.temp0.9.K6": {"guidance_scale": 1.0, "guidance_schedule": "linear", "temperature": 0.9},
    "nolab.linear.cfg1.0.temp0.9.K6": {"guidance_scale": 1.0, "guidance_schedule": "linear", "temperature": 0.9},
}


@pytest.fixture(scope="module")
def models():
    return {weights: reference_model(weights) for weights in WEIGHTS}


def chain(
    model: MARModel,
    temperature: float,
    scale: float,
    conditions: Tensor | None = None,
    schedule: DiffusionSchedule | None = None,
) -> Tensor:
    """All states [100, 5, C] of the figures' chain."""
    conditions = golden("sample")["z"] if conditions is None else conditions
    guided = scale != 1.0
    return sample_chain(
        model.diffloss,
        make_schedule(1000, 100) if schedule is None else schedule,
        conditions if guided else conditions[:5],
        GeneratorNoise(torch.Generator().manual_seed(CHAIN_SEED), "cpu"),
        scale if guided else None,
        temperature,
        model.config.clip_sample_range,
        return_trajectory=True,
    )


def generate_case(model: MARModel, case: str, **changes) -> GenerationOutput:
    figures = golden("generate")
    labels = None if case.startswith("nolab") else figures["labels"]
    settings = {"order": figures["order"], **GENERATIONS[case], **changes}
    return generate(
        model,
        labels,
        batch_size=2,
        num_unmasking_steps=6,
        num_diffusion_steps=25,
        generator=torch.Generator().manual_seed(GENERATION_SEED),
        return_steps=True,
        **settings,
    )


@torch.no_grad()
def chain_error(model: MARModel, name: str, states: Tensor) -> float:
    return relative_l2(states[-1], golden("sample")[f"{name}.out"][:5])


@pytest.mark.parametrize("guided", [False, True])
def test_noise_streams(guided):
    """If this fails, PyTorch's generator draws differently here, and the sampling tests below cannot pass."""
    streams = golden_facts()["noise_streams"]
    for name, seed, rows_of_step, length in (
        ("sample", CHAIN_SEED, [5], 100),
        ("generate", GENERATION_SEED, [2, 4, 4, 6, 8, 8], 25),
    ):
        expected = streams[f"{name}.{'guided' if guided else 'plain'}"]
        generator, draws = torch.Generator().manual_seed(seed), []
        for rows in rows_of_step:
            draws.append(torch.randn(rows, 16, generator=generator).flatten())
            draws += [torch.randn(rows * (1 + guided), 16, generator=generator).flatten() for _ in range(length)]
        stream = torch.cat(draws)
        assert len(stream) == expected["length"]
        torch.testing.assert_close(stream[:4], torch.tensor(expected["first"]))
        torch.testing.assert_close(stream[-4:], torch.tensor(expected["last"]))


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize(("temperature", "scale"), CHAINS)
@torch.no_grad()
def test_reverse_chain(models, weights, temperature, scale):
    name = f"{weights}.temp{temperature}.cfg{scale}"
    states = chain(models[weights], temperature, scale)
    assert len(states) == 100
    for state, expected in zip(states[STORED_STATES], golden("sample")[f"{name}.traj"], strict=True):
        assert relative_l2(state, expected) < CHAIN_TOLERANCE
    assert chain_error(models[weights], name, states) < CHAIN_TOLERANCE


@torch.no_grad()
def test_control_a_chain_at_a_wrong_temperature_fails(models):
    states = chain(models["stable"], 1.0, 1.0)
    assert chain_error(models["stable"], "stable.temp0.9.cfg1.0", states) > 100 * CHAIN_TOLERANCE


@torch.no_grad()
def test_control_a_chain_with_the_guidance_halves_swapped_fails(models):
    labelled, null = golden("sample")["z"].chunk(2)
    states = chain(models["stable"], 1.0, 3.0, torch.cat([null, labelled]))
    assert chain_error(models["stable"], "stable.temp1.0.cfg3.0", states) > 100 * CHAIN_TOLERANCE


@torch.no_grad()
def test_control_a_chain_that_feeds_timesteps_one_off_fails(models):
    schedule = make_schedule(1000, 100)
    shifted = replace(schedule, timesteps=(schedule.timesteps - 1).clip(min=0))
    states = chain(models["stable"], 1.0, 1.0, schedule=shifted)
    assert chain_error(models["stable"], "stable.temp1.0.cfg1.0", states) > 2 * CHAIN_TOLERANCE


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("case", GENERATIONS)
def test_generation(models, weights, case):
    figures, prefix = golden("generate"), f"{weights}.{case}"
    output = generate_case(models[weights], case)
    assert relative_l2(output.latents, figures[f"{prefix}.out"]) < GENERATION_TOLERANCE
    scales = torch.tensor([step.guidance_scale for step in output.steps])
    torch.testing.assert_close(scales, figures[f"{prefix}.cfg_iter"])
    counts = [step.condition.shape[0] * step.condition.shape[1] for step in output.steps]
    assert counts == figures[f"{prefix}.n_pred"].tolist()
    conditions = torch.cat([step.condition.flatten(0, 1) for step in output.steps])
    assert relative_l2(conditions, figures[f"{prefix}.z_concat"]) < GENERATION_TOLERANCE
    revealed = torch.cat([step.revealed.flatten(0, 1) for step in output.steps])
    assert relative_l2(revealed, figures[f"{prefix}.sampled_concat"]) < GENERATION_TOLERANCE


@pytest.mark.parametrize(
    ("case", "changes"),
    [
        ("lab.linear.cfg1.0.temp0.9.K6", {"temperature": 1.0}),
        ("lab.linear.cfg3.0.temp1.0.K6", {"guidance_schedule": "constant"}),
        ("lab.linear.cfg3.0.temp1.0.K6", {"guidance_scale": 2.9}),
        ("lab.linear.cfg1.0.temp0.9.K6", {"order": "reversed"}),
    ],
)
def test_control_a_generation_with_one_wrong_setting_fails(models, case, changes):
    if changes.get("order") == "reversed":
        changes = {"order": golden("generate")["order"].flip(1)}
    output = generate_case(models["stable"], case, **changes)
    assert relative_l2(output.latents, golden("generate")[f"stable.{case}.out"]) > 5 * GENERATION_TOLERANCE


def test_control_one_respaced_timestep_off_by_one_fails(models, monkeypatch):
    """One of the 25 timesteps at 167 instead of 166: its position is 166.5, and halves round to even."""
    case = "lab.linear.cfg1.0.temp0.9.K6"
    timesteps = respaced_timesteps(1000, 25)
    timesteps[4] += 1
    monkeypatch.setattr(diffusion, "respaced_timesteps", lambda *_: timesteps)
    uncached = make_schedule.__wrapped__
    monkeypatch.setattr(generation, "make_schedule", uncached)
    error = relative_l2(generate_case(models["stable"], case).latents, golden("generate")[f"stable.{case}.out"])
    assert error > GENERATION_TOLERANCE
