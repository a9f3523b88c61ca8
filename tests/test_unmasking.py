"""Unmasking orders, schedules and the gathers behind them. The figures of the official code are in parity/."""

from __future__ import annotations

import pytest
import torch
from scipy import stats

from marval_rl.models.unmasking import (
    draw_num_masked,
    gather_tokens,
    guidance_scales,
    num_masked_after,
    random_order,
    revealed_positions,
    scatter_tokens,
    unmasking_steps,
    visible_positions,
)


def test_random_orders_are_uniform_permutations():
    order = random_order(6000, 3, generator=torch.Generator().manual_seed(0))
    assert torch.equal(order.sort(dim=1).values, torch.arange(3).expand(6000, 3))
    _, counts = order.unique(dim=0, return_counts=True)
    assert len(counts) == 6
    assert (counts - 1000).abs().max() < 130  # 4.5 standard deviations


@pytest.mark.parametrize("num_tokens", [1, 2, 16, 64])
@pytest.mark.parametrize("num_steps", [1, 2, 5, 16, 40])
def test_steps_reveal_every_token_once(num_tokens, num_steps):
    counts = num_masked_after(num_tokens, num_steps)
    assert len(counts) == num_steps
    assert counts[-1] == 0
    steps = unmasking_steps(num_tokens, num_steps)
    assert all(before > after for before, after in steps)
    assert steps[0][0] == num_tokens
    assert [after for _, after in steps[:-1]] == [before for before, _ in steps[1:]]
    assert len(steps) == min(num_tokens, num_steps)

    order = random_order(2, num_tokens, generator=torch.Generator().manual_seed(0))
    revealed = torch.cat([revealed_positions(order, before, after) for before, after in steps], dim=1)
    assert torch.equal(revealed.sort(dim=1).values, torch.arange(num_tokens).expand(2, -1))


def test_tokens_appear_from_the_end_of_the_order():
    order = torch.tensor([[2, 0, 3, 1]])
    assert visible_positions(order, 2).tolist() == [[1, 3]]
    assert revealed_positions(order, 2).tolist() == [[0, 2]]
    assert revealed_positions(order, 3, 1).tolist() == [[0, 3]]


def test_scatter_is_the_inverse_of_gather():
    tokens, positions = torch.randn(2, 5, 3), torch.tensor([[0, 4], [2, 3]])
    taken = gather_tokens(tokens, positions)
    assert torch.equal(taken[1], tokens[1, [2, 3]])
    written = scatter_tokens(tokens, positions, taken + 1)
    assert torch.equal(gather_tokens(written, positions), taken + 1)
    difference = (written != tokens).any(dim=-1)
    assert difference.sum(dim=1).tolist() == [2, 2]


def test_guidance_grows_with_the_share_of_revealed_tokens():
    assert guidance_scales(16, 4, 3.0, "constant") == [3.0] * 4
    scales = guidance_scales(16, 4, 3.0, "linear")
    assert scales == [1 + 2 * (16 - max(1, after)) / 16 for _, after in unmasking_steps(16, 4)]
    assert guidance_scales(16, 4, 1.0, "linear") == [1.0] * 4


def test_wrong_settings_are_named():
    with pytest.raises(ValueError, match="at least 1, not 0"):
        num_masked_after(16, 0)
    with pytest.raises(ValueError, match='"linear" or "constant", not "cosine"'):
        guidance_scales(16, 4, 2.0, "cosine")


# How many tokens a training step masks


@pytest.mark.parametrize(("ratio_min", "ratio_std"), [(0.7, 0.25), (0.05, 0.25), (0.3, 2.0)])
def test_ratios_follow_the_truncated_normal(ratio_min, ratio_std):
    generator = torch.Generator().manual_seed(0)
    num_tokens = 10**6  # so many that rounding up does not show
    ratios = [draw_num_masked(num_tokens, ratio_min, ratio_std, generator) / num_tokens for _ in range(2000)]
    expected = stats.truncnorm((ratio_min - 1) / ratio_std, 0, loc=1, scale=ratio_std)
    assert stats.kstest(ratios, expected.cdf).pvalue > 0.01
    assert min(ratios) >= ratio_min
    assert max(ratios) <= 1
    # Control: the same test tells a uniform, and a normal of another width.
    assert stats.kstest(ratios, stats.uniform(ratio_min, 1 - ratio_min).cdf).pvalue < 0.01 or ratio_std > 1
    wider = stats.truncnorm((ratio_min - 1) / (1.5 * ratio_std), 0, loc=1, scale=1.5 * ratio_std)
    assert stats.kstest(ratios, wider.cdf).pvalue < 0.01 or ratio_std > 1


def test_the_number_is_rounded_up():
    generator = torch.Generator().manual_seed(0)
    drawn = {draw_num_masked(16, 0.7, 0.25, generator) for _ in range(300)}
    assert drawn == {12, 13, 14, 15, 16}  # ceil(16 * 0.7) = 12


def test_at_least_one_token_is_masked_and_all_can_be():
    assert draw_num_masked(1, 0.05, 0.25) == 1
    assert draw_num_masked(64, 1.0, 0.25) == 64


def test_the_generator_decides():
    draws = [
        [draw_num_masked(10**6, 0.7, 0.25, torch.Generator().manual_seed(seed)) for _ in range(3)] for seed in (0, 0, 1)
    ]
    assert draws[0] == draws[1] != draws[2]


@pytest.mark.parametrize("ratio_min", [0.0, -0.1, 1.5])
def test_impossible_ratios_are_refused(ratio_min):
    with pytest.raises(ValueError, match=r"mask_ratio_min must lie in \(0, 1\]"):
        draw_num_masked(16, ratio_min, 0.25)
