"""MaskGen's pretraining: losses of each row, gradients, AdamW steps with the official groups, the weight average.

As with MAR, the official code runs the head on all B * L positions and masks the loss; ours on the masked ones.
"""

from __future__ import annotations

import pytest
import torch
from maskgen_reference import (
    GRADIENT,
    LATENT_SCALE,
    WEIGHTS,
    all_conditions,
    assert_close,
    facts,
    golden,
    order_of,
    reference_model,
    relative_l2,
)
from torch import Tensor

from marval_rl.models import patchify
from marval_rl.models.diffusion import add_noise, diffusion_losses
from marval_rl.models.maskgen.codec import TATiTokCodec
from marval_rl.models.maskgen.model import MaskGenModel
from marval_rl.models.unmasking import arccos_num_masked, revealed_positions
from marval_rl.trainers.optimization import ExponentialMovingAverage, decay_groups
from marval_rl.trainers.pretrain import pretraining_loss

REPEATS, BATCH, TOKENS, CHANNELS = 4, 3, 12, 16
LABELS = torch.arange(BATCH)


def inputs_of(name: str) -> tuple[Tensor, Tensor, int, Tensor, Tensor]:
    """Tokens [B, L, C], order, number of masked tokens, timesteps [R, B, L] and noise [R, B, L, C] of a file."""
    figures = golden(name)
    order, num_masked = order_of(figures["mask"])
    tokens = figures["target"] if name == "training" else figures["latents"]
    return (
        tokens,
        order,
        num_masked,
        figures["t"].view(REPEATS, BATCH, TOKENS),
        figures["noise"].view(REPEATS, BATCH, TOKENS, CHANNELS),
    )


def loss_of(model: MaskGenModel, name: str) -> Tensor:
    tokens, order, num_masked, timesteps, noise = inputs_of(name)
    rows = (slice(None), torch.arange(BATCH).unsqueeze(1), revealed_positions(order, num_masked))
    return pretraining_loss(model, tokens, LABELS, order, num_masked, timesteps[rows], noise[rows])[0]


def elementwise(model: MaskGenModel, name: str) -> tuple[Tensor, Tensor, Tensor]:
    """z, mse and vb of all rows, also of the known tokens."""
    tokens, order, num_masked, timesteps, noise = inputs_of(name)
    z = all_conditions(model, tokens, LABELS, order, num_masked)
    x_t = add_noise(model.schedule, tokens, noise, timesteps)
    output = model.diffloss(x_t, timesteps, z)
    return z, *diffusion_losses(model.schedule, output, tokens.expand_as(x_t), x_t, noise, timesteps)


def test_the_draws():
    figures = golden("training_full")
    mean, log_variance = figures["moments"].float().chunk(2, dim=1)
    latents = (mean + (0.5 * log_variance).exp() * figures["posterior_noise"]) * LATENT_SCALE
    assert_close(patchify(latents, 1), figures["latents"])
    codec = TATiTokCodec(torch.nn.Identity(), LATENT_SCALE)  # moments only
    torch.manual_seed(535)
    assert_close(codec.from_moments(figures["moments"]), latents)
    num_masked = facts()["training.num_masked"]
    assert int(figures["mask"][0].sum()) == arccos_num_masked(TOKENS, figures["mask_u"].item()) == num_masked
    hidden = torch.zeros(BATCH, TOKENS).scatter(1, figures["order"][:, :num_masked], 1.0)
    assert torch.equal(hidden, figures["mask"].float())


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("name", ["training", "training_full"])
@torch.no_grad()
def test_losses_of_each_row(weights, name):
    figures = golden(name)
    z, mse, vb = elementwise(reference_model(weights), name)
    assert_close((mse + vb).flatten(), figures[f"{weights}.elem_loss"])
    if name == "training_full":
        assert_close(z, figures[f"{weights}.z"])
        assert_close(mse.flatten(), figures[f"{weights}.elem_mse"])
        assert_close(vb.flatten(), figures[f"{weights}.elem_vb"])
    assert_close(loss_of(reference_model(weights), name), figures[f"{weights}.loss"])


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("name", ["training", "training_full"])
def test_gradients(weights, name):
    figures, model = golden(name), reference_model(weights)
    loss_of(model, name).backward()
    parameters = dict(sorted(model.named_parameters()))
    norms = torch.tensor([-1.0 if p.grad is None else p.grad.norm().item() for p in parameters.values()])
    assert_close(norms, figures[f"{weights}.grad_l2_sorted"], GRADIENT)
    zero = [name for name, norm in zip(parameters, norms.tolist(), strict=True) if norm == 0]
    assert zero == sorted(facts()["training.grad_zero"])
    total = torch.nn.utils.get_total_norm([p.grad for p in parameters.values()])
    assert_close(total, figures[f"{weights}.grad_norm"], GRADIENT)
    prefix = f"{weights}.grad."
    stored = {key.removeprefix(prefix): grad for key, grad in figures.items() if key.startswith(prefix)}
    assert len(stored) == (14 if name == "training_full" else 0)
    for key, grad in stored.items():
        assert_close(parameters[key].grad, grad, GRADIENT)


def test_parameters_that_decay():
    model = reference_model("crc")
    decayed, others = decay_groups(model, 0.02)
    names = {parameter: name for name, parameter in model.named_parameters()}
    assert [names[p] for p in decayed["params"]] == sorted(facts()["decay"], key=list(names.values()).index)
    assert {names[p] for p in others["params"]} == set(facts()["no_decay"])


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize(("name", "decay"), [("training", 0.0), ("training_full", 0.02)])
def test_three_optimizer_steps(weights, name, decay):
    figures, model = golden(name), reference_model(weights)
    optimizer = torch.optim.AdamW(decay_groups(model, decay), lr=1e-3, betas=(0.9, 0.95), eps=1e-8)
    average, losses, norms = None, [], []
    for _ in range(3):
        loss = loss_of(model, name)
        optimizer.zero_grad()
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0))
        optimizer.step()
        losses.append(loss.detach())
        if average is None:  # the official average begins as a copy of the first step's result
            average = ExponentialMovingAverage(model, 0.999)
        else:
            average.update(model)
    assert_close(torch.stack(losses), figures[f"{weights}.step_losses"], GRADIENT)
    if name == "training":
        return
    assert_close(torch.stack(norms), figures[f"{weights}.step_grad_norms"], GRADIENT)
    for kind, module in (("after3", model), ("ema3", average.module)):
        prefix = f"{weights}.{kind}."
        stored = {key.removeprefix(prefix): value for key, value in figures.items() if key.startswith(prefix)}
        assert len(stored) == 15
        for key, value in stored.items():
            assert_close(module.get_parameter(key).detach(), value, GRADIENT)


@torch.no_grad()
def test_control_the_other_end_of_the_order_fails():
    tokens, order, num_masked, timesteps, noise = inputs_of("training_full")
    order = order.flip(1)
    rows = (slice(None), torch.arange(BATCH).unsqueeze(1), revealed_positions(order, num_masked))
    model = reference_model("crc")
    loss, _ = pretraining_loss(model, tokens, LABELS, order, num_masked, timesteps[rows], noise[rows])
    assert relative_l2(loss, golden("training_full")["crc.loss"]) > 100 * GRADIENT
