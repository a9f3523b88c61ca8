"""Pretraining: losses of each row, gradients, three AdamW steps and the weight average.

The official code runs the head on all B * L positions and masks the loss; its rows are rep * (B * L) + b * L + l. Ours
runs it on the masked tokens only, so the figures are gathered to [R, B, M] first.
"""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from mar_reference import (
    WEIGHTS,
    assert_parity,
    decode_all,
    encode,
    golden,
    golden_facts,
    meets_parity,
    reference_model,
)
from torch import Tensor

from marval_rl.models import MARModel, patchify
from marval_rl.models.diffusion import add_noise, diffusion_losses
from marval_rl.models.unmasking import revealed_positions
from marval_rl.trainers.optimization import ExponentialMovingAverage, decay_groups
from marval_rl.trainers.pretrain import pretraining_loss

REPEATS, BATCH, TOKENS, CHANNELS = 4, 3, 16, 16


class Batch(NamedTuple):
    tokens: Tensor  # [B, L, C]
    class_labels: Tensor  # [B]
    order: Tensor  # [B, L]
    num_masked: int
    timesteps: Tensor  # [R, B, L]
    noise: Tensor  # [R, B, L, C]

    def masked_rows(self, rows: Tensor) -> Tensor:
        """[R, B, L, ...] -> [R, B, M, ...], the masked tokens in ascending position."""
        positions = revealed_positions(self.order, self.num_masked)
        return rows[:, torch.arange(BATCH).unsqueeze(1), positions]


@pytest.fixture(scope="module")
def batch():
    figures = golden("training")
    return Batch(
        patchify(figures["latent"], 1),
        figures["labels"],
        figures["order"],
        figures["num_masked"].item(),
        figures["t"].view(REPEATS, BATCH, TOKENS),
        figures["noise"].view(REPEATS, BATCH, TOKENS, CHANNELS),
    )


def loss_of(model: MARModel, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    return pretraining_loss(
        model,
        batch.tokens,
        batch.class_labels,
        batch.order,
        batch.num_masked,
        batch.masked_rows(batch.timesteps),
        batch.masked_rows(batch.noise),
    )


def elementwise_losses(model: MARModel, batch: Batch) -> tuple[Tensor, Tensor]:
    """mse and vb of all rows, [R, B, L], also of the visible tokens."""
    classes = model.embed_classes(batch.class_labels, BATCH)
    encoded = encode(model, batch.tokens, classes, batch.order, batch.num_masked)
    condition = decode_all(model, encoded, batch.order, batch.num_masked)
    x_t = add_noise(model.schedule, batch.tokens, batch.noise, batch.timesteps)
    output = model.diffloss(x_t, batch.timesteps, condition)
    return diffusion_losses(model.schedule, output, batch.tokens.expand_as(x_t), x_t, batch.noise, batch.timesteps)


@pytest.mark.parametrize("weights", WEIGHTS)
@torch.no_grad()
def test_losses_of_each_row(batch, weights):
    figures = golden("training")
    mse, vb = elementwise_losses(reference_model(weights), batch)
    assert (batch.timesteps == 0).any()  # where vb is a likelihood, not a divergence
    assert_parity(mse.flatten(), figures[f"{weights}.elem_mse"])
    assert_parity(vb.flatten(), figures[f"{weights}.elem_vb"])
    assert_parity((mse + vb).flatten(), figures[f"{weights}.elem_loss"])


@pytest.mark.parametrize("weights", WEIGHTS)
def test_loss_and_gradients(batch, weights):
    figures = golden("training")
    model = reference_model(weights)
    loss, metrics = loss_of(model, batch)
    assert_parity(loss.detach(), figures[f"{weights}.loss"])
    assert_parity((metrics["loss_mse"] + metrics["loss_vb"]).detach(), figures[f"{weights}.loss"])

    loss.backward()
    parameters = dict(sorted(model.named_parameters()))
    # -1 marks a parameter without a gradient: the null class, as no label is dropped here.
    norms = [-1.0 if p.grad is None else p.grad.norm().item() for p in parameters.values()]
    assert_parity(torch.tensor(norms), figures[f"{weights}.grad_l2_sorted"])
    assert [name for name, p in parameters.items() if p.grad is None] == ["fake_latent"]
    prefix = f"{weights}.grad."
    stored = {name.removeprefix(prefix): grad for name, grad in figures.items() if name.startswith(prefix)}
    assert len(stored) == 6
    for name, grad in stored.items():
        assert_parity(parameters[name].grad, grad)
    assert_parity(
        torch.nn.utils.get_total_norm([p.grad for p in parameters.values() if p.grad is not None]),
        figures[f"{weights}.grad_norm"],
    )


@pytest.mark.parametrize("weights", WEIGHTS)
def test_three_optimizer_steps_and_the_weight_average(batch, weights):
    figures = golden("training")
    model = reference_model(weights)
    average = ExponentialMovingAverage(model, 0.9, warmup=False)
    optimizer = torch.optim.AdamW(decay_groups(model, 0.02), lr=1e-3, betas=(0.9, 0.95), eps=1e-8)
    losses, norms = [], []
    for _ in range(3):
        loss, _ = loss_of(model, batch)
        optimizer.zero_grad()
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), 3.0))
        optimizer.step()
        average.update(model)
        losses.append(loss.detach())
    assert_parity(torch.stack(losses), figures[f"{weights}.step_losses"])
    assert_parity(torch.stack(norms), figures[f"{weights}.step_grad_norms"])
    for name in ("encoder_norm.bias", "mask_token", "z_proj.weight", "fake_latent"):
        assert_parity(model.get_parameter(name).detach(), figures[f"{weights}.after3.{name}"])
        assert_parity(average.module.get_parameter(name), figures[f"{weights}.ema3.{name}"])


def test_parameters_that_decay():
    model = reference_model("crc")
    decayed, others = decay_groups(model, 0.02)
    names = {parameter: name for name, parameter in model.named_parameters()}
    assert sorted(names[p] for p in decayed["params"]) == golden_facts()["decayed_parameters"]
    assert len(decayed["params"]) + len(others["params"]) == len(names)
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.02, 0.0)


@torch.no_grad()
def test_control_a_bound_scaled_by_a_thousandth_fails(batch):
    figures = golden("training")
    mse, vb = elementwise_losses(reference_model("crc"), batch)
    assert not meets_parity((mse + vb / 1000).flatten(), figures["crc.elem_loss"])


@torch.no_grad()
def test_control_the_other_end_of_the_order_fails(batch):
    figures = golden("training")
    loss, _ = loss_of(reference_model("crc"), batch._replace(order=batch.order.flip(1)))
    assert not meets_parity(loss, figures["crc.loss"])


def test_each_term_trains_its_own_half_of_the_output(batch):
    """The bound's gradient stops at the noise prediction, and the error knows nothing of the variance values."""
    model = reference_model("crc")
    mse, vb = elementwise_losses(model, batch)
    weight = model.diffloss.net.final_layer.linear.weight
    (from_bound,) = torch.autograd.grad(vb.sum(), weight, retain_graph=True)
    (from_error,) = torch.autograd.grad(mse.sum(), weight)
    assert from_bound[:CHANNELS].abs().max() == 0 < from_bound[CHANNELS:].abs().max()
    assert from_error[CHANNELS:].abs().max() == 0 < from_error[:CHANNELS].abs().max()
