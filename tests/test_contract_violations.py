"""Broken rewards, each with the message that names the reward, and the sample and its value where there is one."""

from __future__ import annotations

import pytest
import torch
from simple_rewards import batch, constant

from marval_rl.errors import RewardError
from marval_rl.rewarding import RewardSet


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ([1.0, 2.0], "'reward' returned 2 scores for 3 images"),
        (torch.zeros(2), r"'reward' returned a tensor of the shape \[2\], not \[3\]"),
        (torch.zeros(3, 1), r"shape \[3, 1\], not \[3\]"),
        (torch.tensor(1.0), r"shape \[\], not \[3\]"),
        (torch.zeros(3, dtype=torch.complex64), "returned complex numbers"),
        ([0.0, float("nan"), 0.0], "'reward': the score of sample 1 is nan"),
        ([0.0, None, float("nan")], "the score of sample 2 is nan"),
        ([0.0, 0.0, float("-inf")], "the score of sample 2 is -inf"),
        (torch.tensor([0.0, 0.0, torch.nan]), "the score of sample 2 is nan"),
        (torch.tensor([torch.inf, 0.0, 0.0]), "the score of sample 0 is inf"),
        ([0.0, 1e300, 0.0], "the score of sample 1 is inf in float32"),
        ([0.0, "good", 0.0], r"the score of sample 1 is 'good' \(str\), not a number or None"),
        ([0.0, torch.zeros(2), 0.0], "the score of sample 1 is tensor"),
        (0.5, r"returned a float; it must be a list of numbers \(or None\) or a tensor \[3\]"),
        (None, "returned a NoneType"),
        ((value for value in (1.0, 2.0, 3.0)), "returned a generator; it must be a list"),
        ({"score": 1.0}, "returned a dict"),
    ],
)
def test_what_is_no_score_is_refused(returned, message):
    with pytest.raises(RewardError, match=message):
        RewardSet([constant(returned)]).score(**batch())


def test_the_reward_to_blame_is_named_among_others():
    sound, broken = constant([0.0] * 3), constant([0.0, 0.0, float("inf")])
    with pytest.raises(RewardError, match="reward 'reward_2': the score of sample 2 is inf"):
        RewardSet([sound, broken, sound]).score(**batch())


def test_a_reward_that_raises_is_named_and_its_error_chained():
    def faulty(**columns):
        raise KeyError("lost")

    with pytest.raises(RewardError, match="reward 'faulty' raised KeyError: 'lost'") as caught:
        RewardSet([faulty]).score(**batch())
    assert isinstance(caught.value.__cause__, KeyError)


def test_changing_the_images_in_place_is_refused():
    def vandal(*, images, **columns):
        return images.mul_(0.5).mean(dim=(1, 2, 3))

    with pytest.raises(RewardError, match="'vandal' changed the images in place"):
        RewardSet([vandal]).score(**batch())


def test_a_false_claim_of_gradients_is_refused():
    def liar(*, images, **columns):
        return images.detach().mean(dim=(1, 2, 3))

    liar.differentiable = True
    given = batch()
    given["images"].requires_grad_()
    with pytest.raises(RewardError, match="'liar' declares itself differentiable, but no gradient leads"):
        RewardSet([liar]).score(**given, with_grad=True)
