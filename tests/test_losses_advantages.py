"""Rewards to advantages: of one reward by hand, of several against TRL's arithmetic, and what either order is for."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nan
from trl.trainer.utils import nanstd

from marval_rl.losses.advantages import (
    MULTI_OBJECTIVE_AGGREGATIONS,
    aggregate_advantages,
    group_advantages,
    group_std,
    weighted_sum,
)
from marval_rl.rewarding import RewardSet

WEIGHTS = [2.0, -0.5, 1.0]
GROUP = 4


def by_trl(components: Tensor, weights: list[float], num_generations: int, scale: str, aggregation: str) -> Tensor:
    """The lines of TRL 1.16's GRPOTrainer between the rewards and the advantages."""
    weights = torch.tensor(weights)
    unscorable = torch.isnan(components).all(dim=1)
    if aggregation == "sum_then_normalize":
        rewards = (components * weights.unsqueeze(0)).nansum(dim=1)
        rewards[unscorable] = nan
        means = torch.nanmean(rewards.view(-1, num_generations), dim=1).repeat_interleave(num_generations, dim=0)
        if scale in ("group", "none"):
            stds = nanstd(rewards.view(-1, num_generations), dim=1).repeat_interleave(num_generations, dim=0)
        else:
            stds = nanstd(rewards).expand_as(rewards)
        advantages = rewards - means
        if scale != "none":
            advantages = advantages / (stds + 1e-4)
    else:
        grouped = components.view(-1, num_generations, len(weights))
        means = torch.nanmean(grouped, dim=1, keepdim=True)
        normalized = (grouped - means) / (nanstd(grouped, dim=1, keepdim=True) + 1e-4)
        rewards = (normalized.view(-1, len(weights)) * weights.unsqueeze(0)).nansum(dim=1)
        rewards[unscorable] = nan
        advantages = (rewards - torch.nanmean(rewards)) / (nanstd(rewards).expand_as(rewards) + 1e-4)
    return torch.nan_to_num(advantages, nan=0.0)


@pytest.fixture
def components() -> Tensor:
    """Five groups of four by three rewards of very unlike scales, with gaps of every kind."""
    values = torch.randn(20, 3, generator=torch.Generator().manual_seed(3)) * torch.tensor([0.1, 30.0, 1.0])
    values += torch.tensor([0.0, 20.0, -5.0])
    values[1, 0] = values[2, 1] = nan
    values[4:8] = nan  # a group that no reward scored
    values[9] = nan  # a sample that none did
    values[13:16, 2] = nan  # one score of this reward in the group
    values[16:20, 0] = 1.0  # a reward that says the same of all
    return values


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize("aggregation", MULTI_OBJECTIVE_AGGREGATIONS)
def test_the_advantages_are_those_of_trl(components, scale, aggregation):
    expected = by_trl(components, WEIGHTS, GROUP, scale, aggregation)
    found, _ = aggregate_advantages(components, WEIGHTS, GROUP, scale, aggregation)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert found[4:8].abs().max() == 0 and found[9] == 0
    assert (found[[0, 1, 2, 3, 8, 10]] != 0).all()


@pytest.mark.parametrize("aggregation", MULTI_OBJECTIVE_AGGREGATIONS)
def test_one_reward_is_not_a_special_case(components, aggregation):
    first = components[:, :1]
    expected = by_trl(first, [1.0], GROUP, "group", aggregation)
    torch.testing.assert_close(
        aggregate_advantages(first, [1.0], GROUP, "group", aggregation)[0], expected, rtol=1e-5, atol=1e-5
    )


def test_normalized_first_the_scale_of_a_reward_does_not_matter(components):
    rescaled = components * torch.tensor([1.0, 1.0, 100.0])
    for aggregation, lowest, highest in (("normalize_then_sum", 0, 0.01), ("sum_then_normalize", 0.5, 10)):
        before, after = (
            aggregate_advantages(each, WEIGHTS, GROUP, aggregation=aggregation)[0] for each in (components, rescaled)
        )
        assert lowest <= (before - after).abs().max() <= highest


def test_rewards_that_tie_as_a_sum_are_distinguished_when_normalized_first():
    # GDPO's example: (0, 2) and (1, 1) have one sum, and yet the second image is the better one by both means.
    components = torch.tensor([[0.0, 2.0], [1.0, 1.0], [0.0, 0.0], [0.0, 1.0]])
    summed, _ = aggregate_advantages(components, [1.0, 1.0], 4)
    normalized, _ = aggregate_advantages(components, [1.0, 1.0], 4, aggregation="normalize_then_sum")
    assert summed[0] == summed[1]
    assert normalized[1] > normalized[0] + 0.2


def test_the_metrics_are_of_the_weighted_sums(components):
    _, summed = aggregate_advantages(components, WEIGHTS, GROUP)
    _, normalized = aggregate_advantages(components, WEIGHTS, GROUP, aggregation="normalize_then_sum")
    expected = weighted_sum(components, WEIGHTS).nanmean()
    for metrics in (summed, normalized):
        torch.testing.assert_close(metrics["reward"], expected)
        assert metrics["frac_reward_zero_std"] == 0
    assert summed["reward_std"] == normalized["reward_std"]


def test_a_group_without_differences_counts_as_such():
    components = torch.tensor([[1.0, 5.0]] * 2 + [[1.0, 2.0], [2.0, 1.0]] + [[0.0, 1.0], [0.0, 2.0]])
    _, summed = aggregate_advantages(components, [1.0, 1.0], 2)
    _, normalized = aggregate_advantages(components, [1.0, 0.5], 2, aggregation="normalize_then_sum")
    assert float(summed["frac_reward_zero_std"]) == pytest.approx(2 / 3)  # 1 + 2 = 2 + 1
    assert float(normalized["frac_reward_zero_std"]) == pytest.approx(1 / 3)


def test_what_a_set_of_rewards_returns_can_be_aggregated():
    def brightness(*, images, **columns):
        return images.mean(dim=(1, 2, 3))

    def picky(*, images, **columns):
        return [3.0, None, 1.0, None]

    rewards = RewardSet([brightness, picky], [1.0, 2.0])
    images = torch.tensor([0.1, 0.2, 0.3, 0.5])[:, None, None, None].expand(4, 3, 2, 2)
    names = ["a"] * 4
    scores = rewards.score(images, names, torch.zeros(4, dtype=torch.long), names)
    expected = torch.tensor([[0.1, 3.0], [0.2, nan], [0.3, 1.0], [0.5, nan]])
    torch.testing.assert_close(scores.by_reward(), expected, equal_nan=True)
    torch.testing.assert_close(scores.total, weighted_sum(expected, [1.0, 2.0]))
    torch.testing.assert_close(scores.total, torch.tensor([6.1, 0.2, 2.3, 0.5]))


def test_wrong_arguments_name_the_remedy(components):
    with pytest.raises(ValueError, match="must be one of sum_then_normalize, normalize_then_sum, not 'gdpo'"):
        aggregate_advantages(components, WEIGHTS, GROUP, aggregation="gdpo")
    for aggregation in MULTI_OBJECTIVE_AGGREGATIONS:
        with pytest.raises(ValueError, match="20 rewards do not divide into groups of 3"):
            aggregate_advantages(components, WEIGHTS, 3, aggregation=aggregation)
        with pytest.raises(ValueError, match="scale_rewards must be one of"):
            aggregate_advantages(components, WEIGHTS, GROUP, "std", aggregation)


# One reward


def test_advantages_of_hand_made_groups():
    rewards = torch.tensor([1.0, 3.0, 10.0, 10.0, 0.0, 4.0])  # groups (1, 3), (10, 10), (0, 4)
    advantages, metrics = group_advantages(rewards, 2)
    first, last = 1 / (math.sqrt(2) + 1e-4), 2 / (math.sqrt(8) + 1e-4)  # standard deviations are unbiased
    torch.testing.assert_close(advantages, torch.tensor([-first, first, 0.0, 0.0, -last, last]))
    assert metrics["reward"].item() == pytest.approx(28 / 6)
    assert metrics["reward_std"].item() == pytest.approx((math.sqrt(2) + 0 + math.sqrt(8)) / 3)
    assert metrics["frac_reward_zero_std"].item() == pytest.approx(1 / 3)


def test_advantages_ignore_the_scale_and_offset_of_a_group():
    rewards = torch.randn(8, generator=torch.Generator().manual_seed(0))
    plain, _ = group_advantages(rewards, 8)
    moved, _ = group_advantages(100 * rewards + 7, 8)
    torch.testing.assert_close(plain, moved, rtol=1e-3, atol=1e-3)
    assert plain.mean().item() == pytest.approx(0, abs=1e-6)
    assert plain.std().item() == pytest.approx(1, abs=1e-3)


def test_there_is_one_standard_deviation_unbiased_and_within_groups():
    rewards = torch.tensor([1.0, 3.0, 10.0, 10.0, math.nan, 4.0, math.nan, math.nan])
    expected = torch.tensor([math.sqrt(2), 0.0, 0.0, math.nan])
    torch.testing.assert_close(group_std(rewards, 2), expected, equal_nan=True)
    _, metrics = group_advantages(rewards, 2)
    torch.testing.assert_close(metrics["reward_std"], expected[:3].mean())


def test_scale_by_the_batch_keeps_the_order_of_groups_spread():
    rewards = torch.tensor([1.0, 3.0, 10.0, 10.0])
    advantages, _ = group_advantages(rewards, 2, "batch")
    expected = torch.tensor([-1.0, 1.0, 0.0, 0.0]) / (rewards.std() + 1e-4)
    torch.testing.assert_close(advantages, expected)


def test_scale_none_only_centres():
    advantages, _ = group_advantages(torch.tensor([1.0, 3.0, 10.0, 14.0]), 2, "none")
    torch.testing.assert_close(advantages, torch.tensor([-1.0, 1.0, -2.0, 2.0]))


@pytest.mark.parametrize("scale_rewards", ["group", "batch", "none"])
def test_a_sample_without_reward_is_left_out(scale_rewards):
    rewards = torch.tensor([1.0, math.nan, 3.0, 2.0, 2.0, 5.0])
    advantages, metrics = group_advantages(rewards, 3, scale_rewards)
    group, batch = math.sqrt(2), torch.tensor([1.0, 3.0, 2.0, 2.0, 5.0]).std().item()
    divisor = {"group": group + 1e-4, "batch": batch + 1e-4, "none": 1.0}[scale_rewards]
    assert advantages[:3].tolist() == pytest.approx([-1 / divisor, 0.0, 1 / divisor], rel=1e-5)
    assert advantages.isfinite().all()
    assert metrics["reward"].item() == pytest.approx(13 / 5)


@pytest.mark.parametrize("scale_rewards", ["group", "batch", "none"])
def test_a_group_without_any_reward_is_left_out(scale_rewards):
    rewards = torch.tensor([math.nan, math.nan, 1.0, 3.0])
    advantages, metrics = group_advantages(rewards, 2, scale_rewards)
    alone, _ = group_advantages(rewards[2:], 2, scale_rewards)
    assert advantages[:2].tolist() == [0.0, 0.0]
    torch.testing.assert_close(advantages[2:], alone)
    assert metrics["reward"].item() == 2.0
    assert metrics["reward_std"].item() == pytest.approx(math.sqrt(2))
    assert metrics["frac_reward_zero_std"].item() == 0.0


def test_a_group_with_a_single_reward_has_nothing_to_compare():
    advantages, metrics = group_advantages(torch.tensor([math.nan, 5.0, 1.0, 3.0]), 2)
    assert advantages[:2].tolist() == [0.0, 0.0]
    assert metrics["frac_reward_zero_std"].item() == 0.5


def test_advantages_refuse_invalid_arguments():
    with pytest.raises(ValueError, match='one of group, batch, none, not "std"'):
        group_advantages(torch.zeros(4), 2, "std")
    with pytest.raises(ValueError, match="5 rewards do not divide into groups of 2"):
        group_advantages(torch.zeros(5), 2)
