"""GSIM's gradient where everything is known: student, teacher and auxiliary network are Gaussians.

The student generates x_0 = mu + tau z, so x_t = alpha x_0 + sigma eps is Gaussian too and the auxiliary network can be
exact. Expectations over (z, eps) are Gauss-Hermite sums in float64: no sampling noise, tight tolerances.

What is minimised: the loss works on predicted clean tokens, x0_hat = (x_t + sigma^2 s) / alpha. So y is
k_t (s_theta - s_p) with k_t = sigma^2 / alpha, and the true objective is E_t E_{x_t ~ student}[d(k_t (s_theta - s_p))]:
score implicit matching with the distance d(k_t .), where k_t is a constant of each timestep.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor

from marval_rl.losses.gsim import denoising_loss, gsim_loss

Sampler = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Gaussian:
    """N(mean, std^2) for each channel."""

    mean: Tensor  # [C]
    std: Tensor  # [C]

    def frozen(self) -> Gaussian:
        return Gaussian(self.mean.detach(), self.std.detach())

    def predicted_start(self, x_t: Tensor, alpha: float) -> Tensor:
        """E[x_0 | x_t] of this distribution, by its exact score."""
        sigma2 = 1 - alpha**2
        score = -(x_t - alpha * self.mean) / (alpha**2 * self.std**2 + sigma2)
        return (x_t + sigma2 * score) / alpha


def quadrature(num_dims: int, num_nodes: int) -> tuple[Tensor, Tensor]:
    """Nodes [N, num_dims] and weights [N] of expectations under N(0, I), float64."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(num_nodes)
    weights = weights / weights.sum()
    grid = np.stack(np.meshgrid(*[nodes] * num_dims, indexing="ij"), axis=-1).reshape(-1, num_dims)
    products = np.prod(np.stack(np.meshgrid(*[weights] * num_dims, indexing="ij"), axis=-1), axis=-1).ravel()
    return torch.from_numpy(grid), torch.from_numpy(products)


def expected_gsim_loss(
    student: Gaussian, teacher: Gaussian, alphas: list[float], r: float, num_nodes: int, sign: float = 1.0
) -> Tensor:
    """E over t, z and eps of gsim_loss, with the auxiliary network exact for the student as it is now.

    gsim_loss takes a plain mean, so it is called on each node and the weights come after. sign -1 is the control: it
    turns the residual of the auxiliary network around.
    """
    channels = len(student.mean)
    nodes, weights = quadrature(2 * channels, num_nodes)
    z, eps = nodes.split(channels, dim=-1)
    x_start = student.mean + student.std * z
    auxiliary = student.frozen()
    total = torch.zeros((), dtype=torch.float64)
    for alpha in alphas:
        x_t = alpha * x_start + math.sqrt(1 - alpha**2) * eps
        auxiliary_start = auxiliary.predicted_start(x_t, alpha)
        teacher_start = teacher.predicted_start(x_t, alpha)
        seen = x_start if sign > 0 else 2 * auxiliary_start - x_start
        losses = torch.vmap(lambda *args: gsim_loss(*args, r)[0])(seen, auxiliary_start, teacher_start)
        total = total + (weights * losses).sum() / len(alphas)
    return total


def true_objective(student: Gaussian, teacher: Gaussian, alphas: list[float], r: float, num_nodes: int = 120) -> Tensor:
    """E_t E_{x_t ~ student}[sqrt(|k (s_theta - s_p)|^2 + r^2) - r], by quadrature over x_t itself."""
    nodes, weights = quadrature(len(student.mean), num_nodes)
    total = torch.zeros((), dtype=torch.float64)
    for alpha in alphas:
        sigma2 = 1 - alpha**2
        x_t = alpha * student.mean + (alpha**2 * student.std**2 + sigma2).sqrt() * nodes
        scores = [-(x_t - alpha * g.mean) / (alpha**2 * g.std**2 + sigma2) for g in (student, teacher)]
        gap = sigma2 / alpha * (scores[0] - scores[1])
        total = total + (weights * ((gap.square().sum(-1) + r**2).sqrt() - r)).sum() / len(alphas)
    return total


def finite_difference(function: Callable[[Tensor], Tensor], at: Tensor, step: float = 1e-4) -> Tensor:
    """Gradient by central differences of fourth order."""
    gradient = torch.zeros_like(at)
    for i in range(len(at)):
        e = torch.zeros_like(at)
        e[i] = step
        near, far = function(at + e) - function(at - e), function(at + 2 * e) - function(at - 2 * e)
        gradient[i] = (8 * near - far) / (12 * step)
    return gradient


def vector(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def student_of(theta: Tensor) -> Gaussian:
    """theta = (mean [C], log std [C])."""
    mean, log_std = theta.chunk(2)
    return Gaussian(mean, log_std.exp())


def gsim_gradient(theta: Tensor, teacher: Gaussian, alphas: list[float], r: float, num_nodes: int, sign: float = 1.0):
    theta = theta.clone().requires_grad_(True)
    (gradient,) = torch.autograd.grad(expected_gsim_loss(student_of(theta), teacher, alphas, r, num_nodes, sign), theta)
    return gradient


@pytest.mark.parametrize("r", [1e-5, 0.3])
@pytest.mark.parametrize("alphas", [[0.9], [0.3], [0.95, 0.6, 0.2]])
def test_mean_shift_has_the_closed_form(r, alphas):
    """With equal variances y = sigma^2 (mu - mu_p) / v is constant, and d'(y) sigma^2 / v is the gradient."""
    student, teacher = Gaussian(vector(0.5, -0.2), vector(0.7, 0.7)), Gaussian(vector(0.1, 0.4), vector(0.7, 0.7))
    mean_gradient = gsim_gradient(torch.cat([student.mean, student.std.log()]), teacher, alphas, r, num_nodes=4)[:2]
    expected = torch.zeros(2, dtype=torch.float64)
    for alpha in alphas:
        factor = (1 - alpha**2) / (alpha**2 * 0.49 + 1 - alpha**2)
        y = factor * (student.mean - teacher.mean)
        expected += factor * y / (y.square().sum() + r**2).sqrt() / len(alphas)
    torch.testing.assert_close(mean_gradient, expected, rtol=1e-10, atol=0)


@pytest.mark.parametrize(
    ("theta", "teacher"),
    [
        (vector(0.3, math.log(0.6)), Gaussian(vector(-0.1), vector(1.1))),  # narrower than the teacher
        (vector(-0.5, math.log(1.5)), Gaussian(vector(0.2), vector(0.8))),  # wider
        (vector(0.0, math.log(0.5)), Gaussian(vector(0.0), vector(1.0))),  # same mean: only the variance is wrong
    ],
)
def test_gradient_is_that_of_the_true_objective_in_one_dimension(theta, teacher):
    alphas, r = [0.9, 0.5], 0.5
    expected = finite_difference(lambda at: true_objective(student_of(at), teacher, alphas, r), theta)
    gradient = gsim_gradient(theta, teacher, alphas, r, num_nodes=80)
    assert expected.abs().max() > 0.05
    torch.testing.assert_close(gradient, expected, rtol=1e-6, atol=1e-8)


def test_gradient_is_that_of_the_true_objective_in_two_dimensions():
    """The norm couples the channels, so this is not two copies of the case above."""
    theta = vector(0.3, -0.4, math.log(0.7), math.log(1.2))
    teacher = Gaussian(vector(0.0, 0.1), vector(1.0, 0.9))
    expected = finite_difference(lambda at: true_objective(student_of(at), teacher, [0.7], 0.5, 80), theta)
    gradient = gsim_gradient(theta, teacher, [0.7], 0.5, num_nodes=26)
    assert (expected.abs() > 0.01).all()
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("r", [1e-5, 0.5])
def test_gradient_vanishes_at_the_optimum(r):
    teacher = Gaussian(vector(0.2, -0.3), vector(0.8, 1.3))
    theta = torch.cat([teacher.mean, teacher.std.log()])
    assert gsim_gradient(theta, teacher, [0.9, 0.4], r, num_nodes=6).abs().max() < 1e-8


def test_descent_finds_the_teacher():
    teacher = Gaussian(vector(0.6), vector(0.9))
    theta = vector(-0.4, math.log(0.4))
    for _ in range(300):
        theta = theta - 0.1 * gsim_gradient(theta, teacher, [0.8, 0.4], 0.3, num_nodes=20)
    torch.testing.assert_close(theta, vector(0.6, math.log(0.9)), rtol=0, atol=1e-3)


def test_control_the_wrong_sign_is_not_the_gradient():
    theta, teacher = vector(0.3, math.log(0.6)), Gaussian(vector(-0.1), vector(1.1))
    expected = finite_difference(lambda at: true_objective(student_of(at), teacher, [0.7], 0.5), theta)
    wrong = gsim_gradient(theta, teacher, [0.7], 0.5, num_nodes=40, sign=-1.0)
    assert (wrong - expected).norm() > 0.2 * expected.norm()


def test_value_and_metric_by_hand():
    """One token of two channels: y = (3, 4), |y| = 5; the auxiliary network is (1, 2) away from the student's token."""
    x_start = torch.tensor([[1.0, 1.0]])
    auxiliary = torch.tensor([[2.0, 3.0]])
    teacher = torch.tensor([[-1.0, -1.0]])
    loss, metrics = gsim_loss(x_start, auxiliary, teacher, r=1e-5)
    assert loss.item() == pytest.approx(5 - (3 * 1 + 4 * 2) / 5, rel=1e-4)
    assert metrics["score_gap"].item() == pytest.approx(5, rel=1e-4)


def test_the_distance_is_taken_of_each_token_and_averaged():
    torch.manual_seed(0)
    x_start, auxiliary, teacher = torch.randn(3, 2, 4, 5, 6).unbind()
    loss, _ = gsim_loss(x_start, auxiliary, teacher)
    tokens = zip(x_start.view(-1, 6), auxiliary.view(-1, 6), teacher.view(-1, 6), strict=True)
    flat = [gsim_loss(*token)[0] for token in tokens]
    torch.testing.assert_close(loss, torch.stack(flat).mean())


def test_several_draws_broadcast_over_one_student_token():
    torch.manual_seed(0)
    x_start, draws = torch.randn(5, 6), torch.randn(2, 4, 5, 6)
    loss, _ = gsim_loss(x_start, draws[0], draws[1])
    torch.testing.assert_close(loss, gsim_loss(x_start.expand(4, 5, 6), draws[0], draws[1])[0])


def test_equal_predictions_give_finite_gradients():
    x_start = torch.randn(4, 6, requires_grad=True)
    prediction = 2 * x_start
    loss, metrics = gsim_loss(x_start, prediction, prediction)
    loss.backward()
    assert loss.item() == 0
    assert metrics["score_gap"].item() == 0
    assert x_start.grad.abs().max() == 0


def test_denoising_loss_of_a_constant_is_smallest_at_the_mean_noise():
    """Predicting the mean is the best a constant can do; the loss left is the noise's variance."""
    noise = torch.randn(1000, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    constant = noise.mean(dim=0).clone().requires_grad_(True)
    loss = denoising_loss(constant.expand_as(noise), noise)
    loss.backward()
    assert constant.grad.abs().max() < 1e-12
    assert loss.item() == pytest.approx(noise.var(dim=0, unbiased=False).mean().item())
    assert denoising_loss(noise, noise).item() == 0


def test_denoising_loss_is_smallest_at_the_exact_score():
    """For x_0 ~ N(m, s^2) the optimum is eps_hat = -sigma score; the gradient there is zero in expectation."""
    student, alpha = Gaussian(vector(0.3), vector(0.6)), 0.8
    sigma = math.sqrt(1 - alpha**2)
    nodes, weights = quadrature(2, 4)
    x_t = alpha * (student.mean + student.std * nodes[:, :1]) + sigma * nodes[:, 1:]
    exact = (x_t - alpha * student.predicted_start(x_t, alpha)) / sigma

    def loss_at(slope: Tensor, offset: Tensor) -> Tensor:
        rows = torch.vmap(denoising_loss)(exact * slope + offset, nodes[:, 1:])
        return (weights * rows).sum()

    at = (vector(1.0).requires_grad_(True), vector(0.0).requires_grad_(True))
    for gradient in torch.autograd.grad(loss_at(*at), at):
        assert gradient.abs().item() < 1e-12
    assert loss_at(vector(1.1), vector(0.0)) > loss_at(vector(1.0), vector(0.0)) < loss_at(vector(1.0), vector(0.1))
