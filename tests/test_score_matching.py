"""Which gradients flow where when a student is distilled, and what the three networks are asked."""

from __future__ import annotations

import pytest
import torch
from tiny_models import tiny_model, tiny_student

from marval_rl.models.diffusion import predict_start
from marval_rl.models.mar import new_head
from marval_rl.trainers import score_matching
from marval_rl.trainers.score_matching import Contexts, GSIMArguments, ScoreMatching, frozen
from marval_rl.trainers.student_networks import StudentNetworks

BATCH, NUM_MASKED = 6, 3


@pytest.fixture
def networks():
    student = tiny_student(1)
    auxiliary = new_head(student.config)
    auxiliary.load_state_dict(tiny_model(2).diffloss.state_dict())
    return StudentNetworks(student, auxiliary)


@pytest.fixture
def teacher():
    return tiny_model(3)


@pytest.fixture
def contexts() -> Contexts:
    generator = torch.Generator().manual_seed(4)
    tokens = torch.randn(BATCH, 4, 4, generator=generator)
    order = torch.rand(BATCH, 4, generator=generator).argsort(dim=1)
    return Contexts(tokens, torch.tensor([0, 1, 2, 0, 1, 2]), order, NUM_MASKED)


def matching_of(teacher, guidance_scale: float = 1.7) -> ScoreMatching:
    args = GSIMArguments(guidance_scale=guidance_scale, min_timestep=200, max_timestep=800, timestep_draws=2)
    return ScoreMatching(teacher, args)


def touched(module: torch.nn.Module) -> set[str]:
    return {name for name, p in module.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}


def test_the_student_loss_trains_the_student_alone(networks, teacher, contexts):
    loss, _, sample = matching_of(teacher).student_loss(networks, contexts)
    loss.backward()
    untouched = {name for name, _ in networks.student.named_parameters()} - touched(networks.student)
    assert untouched == {"fake_latent"}  # the student is never asked for the null class
    assert all(p.grad is None for p in networks.auxiliary.parameters())
    assert all(p.grad is None for p in teacher.parameters())
    assert all(p.requires_grad for p in networks.auxiliary.parameters())
    assert not any(tensor.requires_grad for tensor in sample.values())


def test_the_auxiliary_loss_trains_the_auxiliary_network_alone(networks, teacher, contexts):
    matching = matching_of(teacher)
    matching.auxiliary_loss(networks, matching.sample(networks, contexts)).backward()
    assert touched(networks.auxiliary) == {name for name, _ in networks.auxiliary.named_parameters()}
    assert all(p.grad is None for p in networks.student.parameters())
    assert all(p.grad is None for p in teacher.parameters())


def loss_with(matching, networks, contexts) -> torch.Tensor:
    torch.manual_seed(5)
    return matching.student_loss(networks, contexts)[0]


def test_the_gradient_flows_through_the_inputs_of_the_frozen_networks(networks, teacher, contexts):
    """Against finite differences in the last bias of the student's head, which changes its tokens and nothing else."""
    matching, bias = matching_of(teacher), networks.student.diffloss.net.final_layer.linear.bias
    loss_with(matching, networks, contexts).backward()
    step = 1e-2
    for channel in range(networks.student.config.token_channels):
        losses = []
        for sign in (1, -1):
            with torch.no_grad():
                bias[channel] += sign * step
            losses.append(loss_with(matching, networks, contexts).item())
            with torch.no_grad():
                bias[channel] -= sign * step
        assert bias.grad[channel].item() == pytest.approx((losses[0] - losses[1]) / (2 * step), rel=2e-2, abs=1e-3)


def test_control_frozen_networks_with_detached_inputs_give_another_gradient(networks, teacher, contexts, monkeypatch):
    matching, bias = matching_of(teacher), networks.student.diffloss.net.final_layer.linear.bias
    loss_with(matching, networks, contexts).backward()
    right = bias.grad.clone()
    bias.grad = None
    original = score_matching.gsim_loss
    monkeypatch.setattr(
        score_matching,
        "gsim_loss",
        lambda x, auxiliary, teacher, r: original(x, auxiliary.detach(), teacher.detach(), r),
    )
    loss_with(matching, networks, contexts).backward()
    assert (bias.grad - right).norm() > 0.1 * right.norm()


@pytest.mark.parametrize("guidance_scale", [1.0, 1.7])
def test_what_the_networks_are_asked(networks, teacher, contexts, monkeypatch, guidance_scale):
    """The auxiliary network sees the student's own condition, the teacher its own, guided; all at the same x_t."""
    seen = {}
    add_noise, gsim_loss = score_matching.add_noise, score_matching.gsim_loss

    def recorded_noise(schedule, x_start, noise, t):
        seen["x_t"], seen["t"] = add_noise(schedule, x_start, noise, t), t
        return seen["x_t"]

    def recorded_loss(*args):
        seen["x_start"], seen["auxiliary"], seen["teacher"] = args[:3]
        return gsim_loss(*args)

    monkeypatch.setattr(score_matching, "add_noise", recorded_noise)
    monkeypatch.setattr(score_matching, "gsim_loss", recorded_loss)
    _, _, sample = matching_of(teacher, guidance_scale).student_loss(networks, contexts)

    tokens, labels, order, num_masked = contexts
    x_t, t, channels = seen["x_t"], seen["t"], tokens.shape[-1]
    assert x_t.shape == (2, BATCH, NUM_MASKED, channels)
    assert t.min() >= 200 and t.max() <= 800 and t.unique().numel() > 10
    torch.testing.assert_close(seen["x_start"], sample["x_start"])

    own = networks.student(tokens, labels, order, num_masked).condition
    torch.testing.assert_close(sample["condition"], own.detach())
    auxiliary_noise = networks.auxiliary(x_t, t, own)[..., :channels]
    torch.testing.assert_close(seen["auxiliary"], predict_start(teacher.schedule, x_t, auxiliary_noise, t))

    labelled = teacher(tokens, labels, order, num_masked, noisy_tokens=x_t, timesteps=t).model_output
    null = teacher(tokens, None, order, num_masked, noisy_tokens=x_t, timesteps=t).model_output
    teacher_noise = (null + guidance_scale * (labelled - null))[..., :channels]
    expected = predict_start(teacher.schedule, x_t, teacher_noise, t)
    torch.testing.assert_close(seen["teacher"], expected, rtol=1e-4, atol=1e-4)


def test_frozen_restores_only_the_parameters_it_froze():
    module = torch.nn.Linear(2, 2)
    module.bias.requires_grad_(False)
    with pytest.raises(RuntimeError), frozen(module):
        assert not module.weight.requires_grad
        raise RuntimeError
    assert module.weight.requires_grad
    assert not module.bias.requires_grad


@pytest.mark.parametrize("timestep_range", [(-1, 5), (5, 4), (0, 1000)])
def test_timesteps_outside_the_process_are_refused(teacher, timestep_range):
    with pytest.raises(ValueError, match="min_timestep and max_timestep"):
        ScoreMatching(teacher, GSIMArguments(min_timestep=timestep_range[0], max_timestep=timestep_range[1]))
