"""MaskGen's head, its reverse chains, and whole generations."""

from __future__ import annotations

import pytest
import torch
from maskgen_reference import (
    GENERATION,
    LATENT_SCALE,
    STEPS,
    WEIGHTS,
    assert_close,
    facts,
    golden,
    reference_model,
    relative_l2,
)

from marval_rl.models import generate, generation
from marval_rl.models.chain import sample_chain
from marval_rl.models.diffusion import add_noise, diffusion_losses, make_schedule, posterior, reverse_step
from marval_rl.models.head import guide
from marval_rl.models.maskgen import model as maskgen
from marval_rl.models.noise import GeneratorNoise
from marval_rl.models.unmasking import guidance_scales, unmasking_steps

CASES = {  # schedule, guidance scale, temperature, K
    "linear.cfg3.0.temp1.0.K6": ("linear", 3.0, 1.0, 6),
    "constant.cfg2.0.temp0.95.K6": ("constant", 2.0, 0.95, 6),
    "linear.cfg1.0.temp0.9.K6": ("linear", 1.0, 0.9, 6),
    "linear.cfg4.5.temp1.05.K1": ("linear", 4.5, 1.05, 1),
    "constant.cfg3.0.temp1.0.K4": ("constant", 3.0, 1.0, 4),
    "linear.cfg2.0.temp1.0.K12": ("linear", 2.0, 1.0, 12),
}
SEED, SEEDED = 531, 533


@pytest.fixture(scope="module")
def models():
    return {weights: reference_model(weights) for weights in WEIGHTS}


def generated(model, case: str, seed: int = SEED, order=None, **changes):
    schedule, scale, temperature, steps = CASES[case]
    settings = {
        "num_unmasking_steps": steps,
        "guidance_scale": scale,
        "guidance_schedule": schedule,
        "temperature": temperature,
        **changes,
    }
    order = golden("transformer")["order"] if order is None else order
    generator = torch.Generator().manual_seed(seed)
    return generate(model, torch.arange(3), order=order, generator=generator, return_steps=True, **settings)


@pytest.mark.parametrize("weights", WEIGHTS)
@torch.no_grad()
def test_head(models, weights):
    figures, head = golden("diffloss"), models[weights].diffloss
    assert_close(head.net.time_embed(figures["t"]), figures[f"{weights}.time_embed"])
    assert_close(head(figures["x"], figures["t"], figures["c"]), figures[f"{weights}.out"])
    doubled = figures["x2"][:8].repeat(2, 1)
    for scale in (1.0, 2.5):
        expected = figures[f"{weights}.cfg{scale}"]
        output = guide(head(doubled, figures["t2"], figures["c2"]), scale)
        assert_close(output, expected[:8])
        assert_close(output[:, :16], expected[8:, :16])
    schedule = make_schedule(1000)
    x_t = add_noise(schedule, figures["x_start"], figures["noise"], figures["t"])
    assert_close(x_t, figures["x_t"])
    output = head(x_t, figures["t"], figures["c"])
    mse, vb = diffusion_losses(schedule, output, figures["x_start"], x_t, figures["noise"], figures["t"])
    assert_close(mse, figures[f"{weights}.train_mse"])
    assert_close(vb, figures[f"{weights}.train_vb"])
    assert_close(mse + vb, figures[f"{weights}.train_loss"])


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("index", [99, 98, 50, 3, 1, 0])
@pytest.mark.parametrize("scale", [1.0, 3.0])
@torch.no_grad()
def test_single_reverse_steps(models, weights, index, scale):
    figures, schedule, head = golden("diffloss"), make_schedule(1000, 100), models[weights].diffloss
    t = torch.full((16,), int(schedule.timesteps[index]))
    x_t, rows = (figures["x2"], 16) if scale == 1.0 else (figures["x2"][:8], 8)
    output = head(x_t.repeat(16 // rows, 1), t, figures["c2"])
    output = output if scale == 1.0 else guide(output, scale)
    mean, log_variance, start = posterior(schedule, output, x_t, torch.full((rows,), index))
    sample = reverse_step(schedule, output, x_t, index, figures["step_noise"][:rows], temperature=0.9)
    found = {"mean": mean, "log_variance": log_variance, "pred_xstart": start, "sample_temp0.9": sample}
    for name, value in found.items():
        assert_close(value, figures[f"{weights}.step{index}.cfg{scale}.{name}"][:rows], STEPS)


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize(
    ("file", "scale", "temperature"),
    [
        *(("sample", scale, temperature) for scale, temperature in ((1.0, 1.0), (3.0, 1.0), (3.0, 0.9))),
        *(
            ("sample_more", scale, temperature)
            for scale, temperature in ((1.0, 1.0), (3.0, 1.0), (3.0, 0.9), (1.0, 0.9), (1.7, 1.1))
        ),
    ],
)
@torch.no_grad()
def test_reverse_chains(models, weights, file, scale, temperature):
    figures = golden(file)
    states = sample_chain(
        models[weights].diffloss,
        make_schedule(1000, 100),
        figures["z"],
        GeneratorNoise(torch.Generator().manual_seed(530), "cpu"),
        None if scale == 1.0 else scale,
        temperature,
        return_trajectory=True,
    )
    rows = 6 if scale == 1.0 else 3
    name = f"{weights}.cfg{scale}.temp{temperature}"
    assert_close(states[-1], figures[f"{name}.out"][:rows], 2e-4 if file == "sample" else STEPS)
    if file == "sample_more":
        for number, expected in zip(figures["traj_numbers"].tolist(), figures[f"{name}.traj"], strict=True):
            assert_close(states[number - 1][:3], expected, STEPS)


def test_noise_streams():
    """If this fails, PyTorch's generator draws differently here, and the sampling tests cannot pass."""
    for key, scale, rows in (("uncond", 1, [6]), ("cfg", 2, [3])):
        assert torch.equal(drawn(530, rows, scale), golden("sample_more")[f"noise_stream_{key}"])
    rows = [3, 3, 6, 6, 9, 9]
    stored = golden("generate_more")
    assert torch.equal(drawn(SEED, rows, 1), stored["noise_stream.linear.cfg1.0.temp0.9.K6"])
    assert torch.equal(drawn(SEED, rows, 2), stored["noise_stream.linear.cfg3.0.temp1.0.K6"])


def drawn(seed: int, rows_of_step: list[int], halves: int) -> torch.Tensor:
    generator, draws = torch.Generator().manual_seed(seed), []
    for rows in rows_of_step:
        draws.append(torch.randn(rows, 16, generator=generator).flatten())
        draws += [torch.randn(rows * halves, 16, generator=generator).flatten() for _ in range(100)]
    return torch.cat(draws)


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("case", CASES)
def test_generation(models, weights, case):
    figures, prefix = golden("generate_more"), f"{weights}.{case}"
    output = generated(models[weights], case)
    assert_close(output.latents / LATENT_SCALE, figures[f"{prefix}.out"], GENERATION)
    scales = torch.tensor([step.guidance_scale for step in output.steps])
    torch.testing.assert_close(scales, figures[f"{prefix}.cfg_iter"].float())
    counts = [step.condition.shape[0] * step.condition.shape[1] for step in output.steps]
    assert counts == figures[f"{prefix}.n_pred"].tolist()
    conditions = torch.cat([step.condition.flatten(0, 1) for step in output.steps])
    assert_close(conditions, figures[f"{prefix}.z_concat"], GENERATION)
    revealed = torch.cat([step.revealed.flatten(0, 1) for step in output.steps])
    assert_close(revealed, figures[f"{prefix}.sampled_concat"], GENERATION)
    earlier = f"{weights}.{case.removesuffix('.K6')}.out"
    if earlier in golden("generate"):
        assert_close(output.latents / LATENT_SCALE, golden("generate")[earlier], GENERATION)


@pytest.mark.parametrize("weights", WEIGHTS)
def test_generation_from_seeds_with_one_score_for_all(weights):
    model, figures = reference_model(weights), golden("generate_more")
    model.prompts.scores = None  # the configuration's own, 6.5
    output = generated(model, "linear.cfg3.0.temp1.0.K6", SEEDED, figures["seeded.order"])
    assert_close(output.latents / LATENT_SCALE, figures[f"{weights}.seeded.float_score.out"], GENERATION)


@pytest.mark.parametrize(("length", "scale", "key"), [(32, 3.0, "reveal_L32_cfg3.0"), (12, 3.0, "reveal_tiny")])
def test_reveal_tables(length, scale, key):
    """With more steps than tokens the official code raises; ours leaves out the steps that reveal nothing."""
    for steps, expected in facts()[key].items():
        revealed = [before - after for before, after in unmasking_steps(length, int(steps))]
        assert revealed == [count for count in expected["revealed"] if count]
        shown = [s for s, count in zip(expected["cfg"], expected["revealed"], strict=True) if count]
        assert guidance_scales(length, int(steps), scale, "linear") == pytest.approx(shown, abs=1e-6)


def rolled(model):
    prompts = model.prompts
    prompts.tokens = torch.cat([prompts.tokens[:-1].roll(1, 0), prompts.tokens[-1:]])
    return {}


def higher_score(model):
    model.prompts.scores = model.prompts.scores + 1
    return {}


CONTROLS = {
    "same": (lambda model: {}, 0),
    "temperature .9": (lambda model: {"temperature": 0.9}, 0.05),
    "guidance 2.5": (lambda model: {"guidance_scale": 2.5}, 0.05),
    "constant": (lambda model: {"guidance_schedule": "constant"}, 0.05),
    "text rolled": (rolled, 0.05),
    "order reversed": (lambda model: {"order": golden("transformer")["order"].flip(1)}, 0.05),
    "aesthetic + 1": (higher_score, 0.05),
}


@pytest.mark.parametrize("control", CONTROLS)
def test_control_a_mistake_moves_a_generation_as_far_as_the_official_one(control):
    model = reference_model("stable")
    change, tolerance = CONTROLS[control]
    case = "linear.cfg3.0.temp1.0.K6"
    output = generated(model, case, **change(model))
    error = relative_l2(output.latents / LATENT_SCALE, golden("generate_more")[f"stable.{case}.out"])
    if control == "same":
        assert error < GENERATION
    else:
        assert error > 10 * GENERATION
        assert error == pytest.approx(facts()["controls_generate"][control], rel=tolerance)


def test_control_a_generation_that_is_not_divided_by_the_scale_fails(models):
    case = "linear.cfg3.0.temp1.0.K6"
    error = relative_l2(generated(models["stable"], case).latents, golden("generate_more")[f"stable.{case}.out"])
    assert error == pytest.approx(facts()["controls"]["generate: not divided by the scale factor"], rel=0.01)


def test_control_a_linear_guidance_that_reaches_the_full_scale_fails(models, monkeypatch):
    full = [1 + (s - 1) * 12 / 11 for s in guidance_scales(12, 6, 3.0, "linear")]
    monkeypatch.setattr(generation, "guidance_scales", lambda *_: full)
    case = "linear.cfg3.0.temp1.0.K6"
    error = relative_l2(
        generated(models["stable"], case).latents / LATENT_SCALE, golden("generate_more")[f"stable.{case}.out"]
    )
    expected = facts()["controls"]["generate: linear guidance reaching the full scale (x L/(L-1))"]
    assert error == pytest.approx(expected, rel=0.05)


def test_control_noise_that_both_halves_of_a_guided_step_share_fails(models, monkeypatch):
    """The official code draws for the guided half, too, and does not use it: without that the stream is another."""
    draw = GeneratorNoise.normal
    monkeypatch.setattr(
        GeneratorNoise, "normal", lambda self, rows, channels, num_unused_rows=0: draw(self, rows, channels)
    )
    case = "linear.cfg3.0.temp1.0.K6"
    error = relative_l2(
        generated(models["stable"], case).latents / LATENT_SCALE, golden("generate_more")[f"stable.{case}.out"]
    )
    assert error == pytest.approx(facts()["controls"]["generate: step noise shared by both halves"], rel=0.05)


def test_control_an_empty_prompt_without_its_score_fails(monkeypatch):
    model = reference_model("stable")

    def without_score(labels, batch_size, drop_mask=None):
        prompts = model.prompts
        scores = prompts.scores_of(labels, batch_size, 6.5, torch.device("cpu"))
        labels = labels if drop_mask is None else labels.masked_fill(drop_mask, 3)
        text, pooled = prompts.tokens[labels], prompts.pooled[labels]
        micro = maskgen.score_embedding(scores, 32)
        micro = micro if drop_mask is None else micro.masked_fill(drop_mask.unsqueeze(1), 0)
        return model.text_emb(text), model.text_pooled_emb(torch.cat([pooled, micro], dim=1))

    monkeypatch.setattr(model, "embed_text", without_score)
    case = "linear.cfg3.0.temp1.0.K6"
    error = relative_l2(generated(model, case).latents / LATENT_SCALE, golden("generate_more")[f"stable.{case}.out"])
    expected = facts()["controls"]["generate: null text without micro-condition"]
    assert error == pytest.approx(expected, rel=0.05)
