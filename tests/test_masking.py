"""How many tokens a pretraining step masks."""

from __future__ import annotations

import pytest
import torch
from scipy import stats

from marval_rl.trainers.masking import draw_num_masked


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
