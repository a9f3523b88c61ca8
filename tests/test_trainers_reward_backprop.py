"""Reward back-propagation on tiny students: whether it learns, and its gradient."""

from __future__ import annotations

from statistics import mean

import pytest
import torch
from tiny_models import tiny_student
from tiny_trainers import backprop_trainer, grey_student, logged
from torch import Tensor, nn

from marval_rl.models import MARModel
from marval_rl.trainers import rollout as rollout_module
from marval_rl.trainers.rollout import differentiable_rollout


def test_reward_backprop_raises_the_reward(tmp_path):
    trainer = backprop_trainer(tmp_path, grey_student(), max_steps=8, learning_rate=3e-3)
    trainer.train()
    rewards = logged(trainer, "reward")
    assert len(rewards) == 8 and mean(rewards[-3:]) > mean(rewards[:3]) + 0.15
    assert logged(trainer, "loss") == pytest.approx([-reward for reward in rewards], abs=1e-5)


LABELS = torch.tensor([0, 1, 2, 1])


def rollout_objective(student: MARModel) -> Tensor:
    """A smooth function of a rollout, the same noise and order each time."""
    torch.manual_seed(0)
    tokens = differentiable_rollout(student, LABELS, num_unmasking_steps=4)["tokens"]
    weights = torch.linspace(-1, 1, tokens.numel()).view_as(tokens)
    return (weights * tokens.tanh()).sum()


def rollout_gradient(student: MARModel) -> Tensor:
    """The gradient of the objective in all parameters that take one."""
    student.zero_grad()
    rollout_objective(student).backward()
    return torch.cat([p.grad.flatten() for p in student.parameters() if p.grad is not None])


def test_the_gradient_through_a_rollout_is_that_of_the_plain_one(monkeypatch):
    student = tiny_student(1)
    gradient = rollout_gradient(student)
    monkeypatch.setattr(rollout_module, "checkpoint", lambda reveal, *args, use_reentrant: reveal(*args))
    torch.testing.assert_close(gradient, rollout_gradient(student), rtol=1e-5, atol=1e-6)


def test_the_gradient_through_a_rollout_is_the_slope_of_its_objective(monkeypatch):
    student = tiny_student(1)
    gradient = rollout_gradient(student)
    direction = gradient / gradient.norm()
    parameters = [p for p in student.parameters() if p.grad is not None]
    start = nn.utils.parameters_to_vector(parameters).detach().clone()
    values = []
    with torch.no_grad():
        for step in (-1e-3, 1e-3):
            nn.utils.vector_to_parameters(start + step * direction, parameters)
            values.append(rollout_objective(student).item())
        nn.utils.vector_to_parameters(start, parameters)
    slope = (values[1] - values[0]) / 2e-3
    assert slope == pytest.approx(gradient.norm().item(), rel=3e-3)

    # Control: a gradient that is cut between the unmasking steps is another one.
    monkeypatch.setattr(
        rollout_module, "checkpoint", lambda reveal, tokens, *args, use_reentrant: reveal(tokens.detach(), *args)
    )
    assert (rollout_gradient(student) @ direction - slope).abs() > 0.01 * slope
