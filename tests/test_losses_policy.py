"""Log-probabilities, divergence and the clipped loss against hand computations and torch.distributions."""

from __future__ import annotations

import math

import pytest
import torch
from torch.distributions import Independent, Normal, kl_divergence

from marval_rl.losses.advantages import group_weights
from marval_rl.losses.policy import action_kl, action_log_prob, policy_loss

SIGMA = 0.15


def gaussians(batch: int = 5, tokens: int = 3, channels: int = 4):
    """actions, means and reference means, [B, M, C]."""
    generator = torch.Generator().manual_seed(0)
    means = torch.randn(batch, tokens, channels, generator=generator)
    actions = means + SIGMA * torch.randn(means.shape, generator=generator)
    return actions, means, means + 0.1 * torch.randn(means.shape, generator=generator)


def one_action_loss(log_prob, old_log_prob, advantages, **settings):
    """`policy_loss` of images with a single unmasking step: all arguments [B]."""
    return policy_loss(log_prob.unsqueeze(1), old_log_prob.unsqueeze(1), advantages, **settings)


@pytest.mark.parametrize("sigma", [0.05, SIGMA, 1.0, 2.0])
def test_log_prob_is_that_of_independent_normals(sigma):
    actions, means, _ = gaussians()
    expected = Independent(Normal(means, sigma), 2).log_prob(actions)
    torch.testing.assert_close(action_log_prob(actions, means, sigma), expected, rtol=1e-5, atol=1e-4)


def test_log_prob_gradient_is_the_standardised_residual():
    actions, means, _ = gaussians()
    means.requires_grad_(True)
    action_log_prob(actions, means, SIGMA).sum().backward()
    torch.testing.assert_close(means.grad, (actions - means.detach()) / SIGMA**2)


def test_log_prob_of_half_precision_is_computed_in_float32():
    actions, means, _ = gaussians()
    half = action_log_prob(actions.bfloat16(), means.bfloat16(), SIGMA)
    assert half.dtype == torch.float32
    expected = Independent(Normal(means.bfloat16().float(), SIGMA), 2).log_prob(actions.bfloat16().float())
    torch.testing.assert_close(half, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("sigma", [0.05, SIGMA, 1.0])
def test_kl_is_that_of_independent_normals(sigma):
    _, means, reference = gaussians()
    expected = kl_divergence(Independent(Normal(means, sigma), 2), Independent(Normal(reference, sigma), 2))
    torch.testing.assert_close(action_kl(means, reference, sigma), expected)


def test_kl_gradient_is_the_mean_difference():
    """A k3 estimate with detached actions, or a KL of the policy with itself, would be flat here."""
    _, means, reference = gaussians()
    means.requires_grad_(True)
    action_kl(means, reference, SIGMA).sum().backward()
    assert means.grad.abs().min() > 0
    torch.testing.assert_close(means.grad, (means.detach() - reference) / SIGMA**2)


def test_kl_vanishes_with_its_gradient_where_the_policies_agree():
    _, means, _ = gaussians()
    means.requires_grad_(True)
    kl = action_kl(means, means.detach(), SIGMA)
    kl.sum().backward()
    assert kl.abs().max() == 0
    assert means.grad.abs().max() == 0


def test_before_the_first_update_the_ratio_is_one_and_the_gradient_is_the_vanilla_one():
    actions, means, _ = gaussians()
    advantages = torch.tensor([1.5, -0.5, 0.0, 2.0, -1.0])
    means.requires_grad_(True)
    log_prob = action_log_prob(actions, means, SIGMA)
    loss, metrics = one_action_loss(log_prob, log_prob.detach(), advantages)
    assert metrics["ratio"].item() == 1.0
    assert metrics["clip_ratio/region_mean"].item() == 0.0
    assert loss.item() == pytest.approx(-advantages.mean().item(), abs=1e-7)
    (gradient,) = torch.autograd.grad(loss, means, retain_graph=True)
    (vanilla,) = torch.autograd.grad(-(advantages * log_prob).mean(), means)
    assert vanilla.abs().max() > 0
    torch.testing.assert_close(gradient, vanilla)


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "slope", "clipped"),
    [
        # within the range: -rho A, slope -A
        (1.0, 2.0, -2.0, -2.0, None),
        (1.1, 2.0, -2.2, -2.0, None),
        (0.95, -2.0, 1.9, 2.0, None),
        # good action, already much likelier: nothing more to gain
        (1.5, 2.0, -2.0 * 1.3, 0.0, "high"),
        # good action that became unlikely: keep pulling
        (0.5, 2.0, -1.0, -2.0, None),
        # bad action, already much less likely
        (0.5, -2.0, 2.0 * 0.9, 0.0, "low"),
        # bad action that became likely: keep pushing
        (1.5, -2.0, 3.0, 2.0, None),
        # nothing to learn, however far away
        (1.5, 0.0, 0.0, 0.0, None),
    ],
)
def test_clipping_by_hand(ratio, advantage, loss, slope, clipped):
    """Clip range 0.9 .. 1.3. slope is d loss / d rho."""
    old = torch.tensor([-3.0])
    log_prob = (old + math.log(ratio)).requires_grad_(True)
    actual, metrics = one_action_loss(log_prob, old, torch.tensor([advantage]), epsilon_low=0.1, epsilon_high=0.3)
    actual.backward()
    assert actual.item() == pytest.approx(loss, rel=1e-5)
    assert log_prob.grad.item() / ratio == pytest.approx(slope, rel=1e-5)  # d rho / d log pi = rho
    assert metrics["ratio"].item() == pytest.approx(ratio, rel=1e-5)
    assert metrics["clip_ratio/low_mean"].item() == (clipped == "low")
    assert metrics["clip_ratio/high_mean"].item() == (clipped == "high")
    assert metrics["clip_ratio/region_mean"].item() == (clipped is not None)


def test_clip_shares_are_means_over_entries():
    ratios = torch.tensor([0.5, 0.5, 2.0, 1.0])
    advantages = torch.tensor([-1.0, 1.0, 1.0, 1.0])
    _, metrics = one_action_loss(ratios.log(), torch.zeros(4), advantages)
    assert metrics["clip_ratio/low_mean"].item() == 0.25
    assert metrics["clip_ratio/high_mean"].item() == 0.25
    assert metrics["clip_ratio/region_mean"].item() == 0.5
    assert metrics["ratio"].item() == pytest.approx(1.0)


@pytest.mark.parametrize("advantage", [1.0, 0.0, -1.0])
@pytest.mark.parametrize("log_ratio", [200.0, -200.0])
def test_a_policy_that_ran_away_gives_no_nan(log_ratio, advantage):
    """exp(200) is infinite in float32, and infinity times a clipped gradient of 0, or an advantage of 0, is NaN."""
    log_prob = torch.tensor([log_ratio], requires_grad=True)
    loss, metrics = one_action_loss(log_prob, torch.zeros(1), torch.tensor([advantage]))
    loss.backward()
    assert loss.isfinite()
    assert log_prob.grad.isfinite().all()
    assert all(value.isfinite() for value in metrics.values())


def test_a_mean_takes_the_log_prob_and_the_kl_by_the_size_of_the_action():
    actions, means, reference = gaussians()
    size = actions[0].numel()
    policy, reference_policy = (Independent(Normal(mean, SIGMA), 2) for mean in (means, reference))
    log_prob, kl = action_log_prob(actions, means, SIGMA, "mean"), action_kl(means, reference, SIGMA, "mean")
    torch.testing.assert_close(log_prob * size, policy.log_prob(actions), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(kl * size, kl_divergence(policy, reference_policy))
    # One beta weighs both alike: the gradient's ratio of KL to log-probability is that of the sums.
    means.requires_grad_(True)
    gradients = [
        [
            torch.autograd.grad(part, means, retain_graph=True)[0]
            for part in (
                action_log_prob(actions, means, SIGMA, reduction).sum(),
                action_kl(means, reference, SIGMA, reduction).sum(),
            )
        ]
        for reduction in ("sum", "mean")
    ]
    for summed, averaged in zip(*gradients, strict=True):
        torch.testing.assert_close(averaged * size, summed)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: action_log_prob(*gaussians()[:2], SIGMA, "none"), 'reduction must be one of sum, mean, not "none"'),
        (lambda: action_kl(*gaussians()[:2], SIGMA, "none"), 'reduction must be one of sum, mean, not "none"'),
        (
            lambda: policy_loss(torch.zeros(2, 1), torch.zeros(2, 1), torch.zeros(2), loss_type="ppo"),
            'loss_type must be one of grpo, cispo, not "ppo"',
        ),
    ],
)
def test_the_losses_refuse_invalid_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_cispo_never_silences_an_action():
    """Its gradient is min(rho, 1 + eps_high) A of the log-probability, beyond the clip range too."""
    old = torch.zeros(4)
    log_prob = torch.tensor([0.5, 2.0, 0.5, 2.0]).log().requires_grad_(True)
    advantages = torch.tensor([1.0, 1.0, -1.0, -1.0])
    loss, metrics = one_action_loss(log_prob, old, advantages, epsilon_high=0.3, loss_type="cispo")
    loss.backward()
    torch.testing.assert_close(log_prob.grad * 4, torch.tensor([-0.5, -1.3, 0.5, 1.3]))
    assert metrics["clip_ratio/high_mean"].item() == 0.25 and metrics["clip_ratio/low_mean"].item() == 0.0


def test_cispo_and_grpo_have_one_gradient_before_the_first_update():
    advantages = torch.tensor([1.5, -0.5, 0.0])
    gradients = []
    for loss_type in ("grpo", "cispo"):
        log_prob = torch.randn(3, 4, generator=torch.Generator().manual_seed(0)).requires_grad_(True)
        policy_loss(log_prob, log_prob.detach(), advantages, loss_type=loss_type)[0].backward()
        gradients.append(log_prob.grad)
    torch.testing.assert_close(*gradients)


def test_groups_without_a_preference_are_dropped_from_the_mean():
    advantages = torch.tensor([1.0, -1.0, 0.0, 0.0, 2.0, -2.0])
    weights = group_weights(advantages, 2)
    assert weights.tolist() == [1.5, 1.5, 0.0, 0.0, 1.5, 1.5]
    log_prob = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))
    old = torch.zeros(6, 3)
    kept = [0, 1, 4, 5]
    dropped, _ = policy_loss(log_prob, old, advantages, weights=weights)
    alone, _ = policy_loss(log_prob[kept], old[kept], advantages[kept])
    torch.testing.assert_close(dropped, alone)
    assert group_weights(torch.zeros(4), 2).tolist() == [0.0] * 4
