"""Reward back-propagation on tiny students: whether it learns, and its gradient."""

from __future__ import annotations

from collections.abc import Collection
from functools import partial
from statistics import mean
from typing import Any

import pytest
import torch
from tiny_models import tiny_student
from tiny_trainers import backprop_trainer, grey_student, logged
from torch import Tensor, nn

from marval_rl.models import MARModel, sampling
from marval_rl.models.sampling import student_mean, unmask
from marval_rl.models.unmasking import random_order, unmasking_steps
from marval_rl.trainers import reward_backprop as backprop_module
from marval_rl.trainers.reward_backprop import RewardBackpropTrainer


def test_reward_backprop_raises_the_reward(tmp_path):
    trainer = backprop_trainer(tmp_path, grey_student(), max_steps=8, learning_rate=3e-3)
    trainer.train()
    rewards = logged(trainer, "reward")
    assert len(rewards) == 8 and mean(rewards[-3:]) > mean(rewards[:3]) + 0.15
    assert logged(trainer, "loss") == pytest.approx([-reward for reward in rewards], abs=1e-5)


LABELS = torch.tensor([0, 1, 2, 1])


def generate(student: MARModel, num_unmasking_steps: int, gradient_steps: Collection[int]) -> dict[str, Tensor]:
    """Images of these labels, with a gradient through some unmasking steps."""
    length, channels = student.config.num_tokens, student.config.token_channels
    inputs = {
        "class_labels": LABELS,
        "order": random_order(len(LABELS), length),
        "noise": torch.randn(len(LABELS), length, channels),
    }
    predict = partial(student_mean, student, inputs)
    *_, last = unmask(predict, inputs["order"], channels, num_unmasking_steps, gradient_steps=gradient_steps)
    return {**inputs, "tokens": last.tokens}


def rollout_objective(student: MARModel) -> Tensor:
    """A smooth function of a rollout, the same noise and order each time."""
    torch.manual_seed(0)
    tokens = generate(student, 4, range(4))["tokens"]
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
    monkeypatch.setattr(sampling, "checkpoint", lambda predict, *args, use_reentrant: predict(*args))
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
        sampling, "checkpoint", lambda predict, tokens, *args, use_reentrant: predict(tokens.detach(), *args)
    )
    assert (rollout_gradient(student) @ direction - slope).abs() > 0.01 * slope


def steps_with_gradient(trainer: RewardBackpropTrainer, monkeypatch) -> list[list[int]]:
    """Trains; returns the unmasking steps of each update whose means took a gradient."""
    seen: list[list[int]] = []

    def recording(*args: Any, gradient_steps: list[int]) -> Any:
        seen.append(sorted(gradient_steps))
        return unmask(*args, gradient_steps=gradient_steps)

    with monkeypatch.context() as patch:
        patch.setattr(backprop_module, "unmask", recording)
        trainer.train()
    return seen


def test_the_gradient_may_run_through_the_last_or_random_steps(tmp_path, monkeypatch):
    settings = {"num_unmasking_steps": 4, "max_steps": 8, "learning_rate": 1e-4}
    chosen = {
        mode: steps_with_gradient(
            backprop_trainer(tmp_path / mode, grey_student(), **settings, backprop_steps=mode), monkeypatch
        )
        for mode in ("all", "last", "random")
    }
    assert chosen["all"] == [[0, 1, 2, 3]] * 8
    assert chosen["last"] == [[3]] * 8
    assert len({step for (step,) in chosen["random"]}) > 1


def test_steps_without_a_gradient_are_constants():
    """With the last step alone, the gradient is that of its tokens given all the others."""
    student = grey_student()
    torch.manual_seed(0)
    tokens = generate(student, 4, [3])["tokens"]
    (partial,) = torch.autograd.grad(tokens.square().sum(), student.mask_token)
    torch.manual_seed(0)
    rollout = generate(student, 4, [])
    assert not rollout["tokens"].requires_grad
    mean = student_mean(student, rollout, rollout["tokens"], *unmasking_steps(4, 4)[3])
    (expected,) = torch.autograd.grad(mean.square().sum(), student.mask_token)
    torch.testing.assert_close(partial, expected)


def test_a_divergence_holds_the_student_near_its_start(tmp_path):
    settings = {"max_steps": 8, "learning_rate": 3e-3}
    free = backprop_trainer(tmp_path / "free", grey_student(), **settings, beta=1e-6)
    held = backprop_trainer(tmp_path / "held", grey_student(), **settings, beta=1.0)
    for trainer in (free, held):
        trainer.train()
        assert logged(trainer, "kl")[0] == pytest.approx(0, abs=1e-6)
    assert 0 < logged(held, "kl")[-1] < 0.5 * logged(free, "kl")[-1]


def test_memory_grows_with_a_step_and_not_with_their_number():
    """What autograd keeps for K unmasking steps: their states, and not the activations of each."""

    def kept_bytes(num_unmasking_steps: int) -> int:
        kept: dict[int, int] = {}

        def keep(tensor: Tensor) -> Tensor:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        student = tiny_student(1, image_size=16)  # 64 tokens
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            result = generate(student, num_unmasking_steps, range(num_unmasking_steps))
            total = sum(kept.values())
        assert result["tokens"].requires_grad
        return total

    states = len(LABELS) * 64 * (4 * 4 + 3 * 8)  # tokens in float32, and positions as int64 a few times over
    assert kept_bytes(32) - kept_bytes(4) < 28 * 2 * states


def test_a_choice_of_steps_that_cannot_be_is_refused(tmp_path):
    with pytest.raises(ValueError, match='must be one of all, last, random, not "first"'):
        backprop_trainer(tmp_path, grey_student(), backprop_steps="first")
    with pytest.raises(ValueError, match=r"num_backprop_steps 3 is outside 1\.\.2"):
        backprop_trainer(tmp_path, grey_student(), backprop_steps="last", num_backprop_steps=3)
