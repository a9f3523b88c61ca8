"""MMD where it is known: closed forms of Gaussians, finite differences, and what must not change it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from marval_rl.losses.distribution import (
    KERNELS,
    RBF_SCALES,
    Kernel,
    RealFeatures,
    distribution_loss,
    median_distance,
)


def normal(count: int, dims: int, mean: float = 0.0, std: float = 1.0, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return mean + std * torch.randn(count, dims, generator=generator)


def rbf_expectation(shift: Tensor, variance: Tensor, median: float) -> Tensor:
    """E k(x, y) of the RBF mixture for x - y ~ N(shift, variance I): a Gaussian integral, once per bandwidth."""
    dims = len(shift)
    parts = []
    for scale in RBF_SCALES:
        width = (scale * median) ** 2
        parts.append(
            (width / (width + variance)) ** (dims / 2) * (-shift.square().sum() / (2 * (width + variance))).exp()
        )
    return torch.stack(parts).mean()


def mmd(generated: Tensor, real: Tensor, kernel: Kernel) -> Tensor:
    """MMD^2 of two sets, as one class."""
    pairs = kernel(real, real)
    constant = (pairs.sum() - pairs.diagonal().sum()) / (len(real) * (len(real) - 1))
    return distribution_loss(generated, zeros(len(generated)), RealFeatures({0: real}, kernel, {0: constant}))


def zeros(count: int) -> Tensor:
    return torch.zeros(count, dtype=torch.long)


@pytest.mark.parametrize("name", KERNELS)
def test_two_sets_of_one_distribution_are_at_0_on_average(name):
    """The estimate is unbiased: over many draws its mean is 0 within its own error. A biased one has the diagonal."""
    kernel = Kernel(name, median=1.4)
    draws = torch.stack([mmd(normal(6, 3, seed=i), normal(7, 3, seed=1000 + i), kernel) for i in range(800)])
    error = float(draws.std() / len(draws) ** 0.5)
    assert abs(float(draws.mean())) < 3 * error
    moved = torch.stack([mmd(normal(6, 3, seed=i) + 1, normal(7, 3, seed=1000 + i), kernel) for i in range(800)])
    assert float(moved.mean()) > 10 * error


def test_mmd_of_gaussians_is_the_closed_form():
    mean, std = torch.tensor([0.8, -0.3]), torch.tensor(0.6)
    kernel = Kernel("rbf", median=1.5)
    draws = torch.stack(
        [mmd(mean + std * normal(40, 2, seed=i), normal(50, 2, seed=900 + i), kernel) for i in range(900)]
    )
    zero = torch.zeros(2)
    expected = (
        rbf_expectation(zero, 2 * std**2, 1.5)
        + rbf_expectation(zero, torch.tensor(2.0), 1.5)
        - 2 * rbf_expectation(mean, 1 + std**2, 1.5)
    )
    error = float(draws.std() / 30)
    assert error < 0.02 * float(expected)
    assert float(draws.mean()) == pytest.approx(float(expected), abs=3 * error)


def test_the_gradient_is_that_of_the_closed_form():
    """d/d(mean, std) of MMD^2 for x = mean + std z, against autograd of the Gaussian integral."""
    mean = torch.tensor([0.8, -0.3], requires_grad=True)
    std = torch.tensor(0.6, requires_grad=True)
    kernel = Kernel("rbf", median=1.5)
    noise, real = normal(4000, 2, seed=1), normal(4000, 2, seed=2)
    estimated = torch.autograd.grad(mmd(mean + std * noise, real, kernel), (mean, std))
    closed = rbf_expectation(torch.zeros(2), 2 * std**2, 1.5) - 2 * rbf_expectation(mean, 1 + std**2, 1.5)
    for found, expected in zip(estimated, torch.autograd.grad(closed, (mean, std)), strict=True):
        torch.testing.assert_close(found, expected, rtol=0.05, atol=0.004)


@pytest.mark.parametrize("name", KERNELS)
def test_the_gradient_equals_finite_differences(name):
    real = RealFeatures.of(normal(20, 3, seed=3), torch.arange(20) % 2, name)
    labels = torch.tensor([0, 1, 0, 0, 1, 1])
    x = normal(6, 3, seed=5).requires_grad_()

    def loss(features: Tensor) -> Tensor:
        return distribution_loss(features, labels, real)

    gradient = torch.autograd.grad(loss(x), x)[0]
    step = 1e-2
    for index in [(0, 0), (1, 2), (4, 1)]:
        moved = torch.zeros_like(x)
        moved[index] = step
        difference = float(loss(x.detach() + moved) - loss(x.detach() - moved)) / (2 * step)
        assert float(gradient[index]) == pytest.approx(difference, rel=0.03, abs=2e-4)


def test_the_constant_is_that_of_the_real_images():
    features, real = normal(9, 4, seed=1), normal(12, 4, mean=0.3, seed=2)
    held = RealFeatures.of(real, zeros(12))
    assert float(distribution_loss(features, zeros(9), held)) == pytest.approx(
        float(mmd(features, real, held.kernel)), abs=1e-6
    )


def test_classes_do_not_mix():
    """Each class is compared with its own real images: swapping them is noticed, another class's images are not."""
    real = torch.cat([normal(30, 2, mean=0, seed=1), normal(30, 2, mean=6, seed=2)])
    labels = torch.arange(2).repeat_interleave(30)
    held = RealFeatures.of(real, labels)
    images = torch.cat([normal(10, 2, mean=0, seed=3), normal(10, 2, mean=6, seed=4)])
    own = torch.arange(2).repeat_interleave(10)
    right = distribution_loss(images, own, held)
    swapped = distribution_loss(images, own.flip(0), held)
    assert float(swapped) > float(right) + 0.5
    x = images.clone().requires_grad_()
    first = distribution_loss(x[:10], own[:10], held)
    both = distribution_loss(x, own, held)
    gradient = torch.autograd.grad(first, x)[0][:10]
    torch.testing.assert_close(torch.autograd.grad(both, x)[0][:10], gradient / 2)  # a mean over twice the images


def test_the_order_of_the_images_does_not_matter():
    held = RealFeatures.of(normal(40, 3, seed=1), torch.arange(40) % 4)
    x, labels = normal(16, 3, seed=2), torch.arange(16) % 4
    shuffled = torch.randperm(16, generator=torch.Generator().manual_seed(0))
    loss, other = (distribution_loss(x[order], labels[order], held) for order in (torch.arange(16), shuffled))
    torch.testing.assert_close(loss, other)


def test_recent_images_stand_in_for_a_larger_batch():
    """The expected gradient with a queue is that of a batch of the size of both: shown on the mean of many draws."""
    held = RealFeatures.of(normal(200, 1, seed=1), torch.zeros(200, dtype=torch.long))
    std = torch.tensor(0.7)

    def gradient(seed: int, batch: int, queue: int) -> float:
        spread = std.clone().requires_grad_()  # the repulsion is what drives it
        recent = std * normal(queue, 1, seed=5000 + seed)
        label = torch.zeros(batch + queue, dtype=torch.long)
        loss = distribution_loss(spread * normal(batch, 1, seed=seed), label[:batch], held, recent, label[batch:])
        return float(torch.autograd.grad(loss, spread)[0])

    alone = torch.tensor([gradient(seed, 24, 0) for seed in range(300)])
    queued = torch.tensor([gradient(seed, 4, 20) for seed in range(300)])
    error = float((alone.var() / 300 + queued.var() / 300).sqrt())
    assert float(queued.mean()) == pytest.approx(float(alone.mean()), abs=3 * error)
    assert float(queued.std()) > float(alone.std())


def test_an_image_alone_of_its_class_is_left_out_unless_there_are_recent_ones():
    held = RealFeatures.of(normal(40, 2, seed=1), torch.arange(40) % 2)
    x = torch.tensor([[2.0, 0.0], [1.0, 1.0], [0.5, 0.5]], requires_grad=True)
    labels = torch.tensor([1, 0, 0])
    assert torch.equal(distribution_loss(x, labels, held), distribution_loss(x[1:], labels[1:], held))
    alone = distribution_loss(x[:1], labels[:1], held)
    assert float(alone) == 0 and torch.equal(torch.autograd.grad(alone, x)[0], torch.zeros(3, 2))
    assert float(distribution_loss(x[:1], labels[:1], held, x[1:], torch.tensor([1, 0]))) != 0


def test_invalid_values_are_refused_by_name():
    with pytest.raises(ValueError, match="cosine"):
        Kernel("cosine")
    with pytest.raises(ValueError, match="class 1 has 1 real image"):
        RealFeatures.of(normal(5, 2), torch.tensor([0, 0, 0, 0, 1]))
    with pytest.raises(ValueError, match="features differ"):
        median_distance({0: torch.ones(4, 2)})


def test_a_bandwidth_is_the_median_within_classes():
    x = torch.tensor([[0.0], [1.0], [10.0], [13.0], [16.0]])
    assert median_distance({0: x[:2], 1: x[2:]}) == 3.0
