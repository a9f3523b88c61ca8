"""Several rewards as one: names, weights, the sum, what is left out, and the gradient."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch
from simple_rewards import BATCH, Scaled, batch, brightness, constant

from marval_rl.errors import RewardError
from marval_rl.rewarding import RewardSet

# Names, weights and kwargs of a set


def test_equal_names_are_numbered_and_kwargs_find_them():
    kwargs = {"Scaled": {"factor": 2.0}, "Scaled_2": {"factor": 3.0}}
    rewards = RewardSet([Scaled, brightness, Scaled], reward_kwargs=kwargs)
    assert rewards.names == ["Scaled", "brightness", "Scaled_2"]
    assert [rewards.rewards[0].factor, rewards.rewards[2].factor] == [2.0, 3.0]


def test_a_numbered_name_does_not_collide_with_a_written_one():
    named = {name: constant([0.0] * BATCH) for name in ("a_2", "a", "also_a")}
    for name, reward in named.items():
        reward.name = "a" if name == "also_a" else name
    assert RewardSet(list(named.values())).names == ["a_2", "a", "a_3"]


def test_an_instance_is_called_by_its_class_or_by_its_name():
    named = Scaled()
    named.name = "my_scale"
    assert RewardSet([Scaled(), named]).names == ["Scaled", "my_scale"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([],), "a list of at least one reward, not \\[\\]"),
        (("classifier",), "must be a list of at least one reward, not 'classifier'"),
        (([brightness, Scaled], [1.0]), r"1 reward_weights for 2 reward_funcs \(brightness, Scaled\)"),
        (([brightness], [float("nan")]), "weight of reward 'brightness' must be a finite number, not nan"),
        (([brightness], ["much"]), "must be a finite number, not 'much'"),
        (([Scaled], None, {"Scale": {}}), r"names 'Scale', which is not a reward here .*; did you mean Scaled\?"),
        (([Scaled], None, {"Scaled": 2.0}), r"reward_kwargs\['Scaled'\] must map argument names to values, not 2.0"),
    ],
)
def test_a_set_that_does_not_fit_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        RewardSet(*arguments)


# Scoring


def test_the_total_is_the_weighted_sum():
    scores = RewardSet([brightness, constant([1, 2, 3])], [2.0, -1.0]).score(**batch())
    assert scores.total.tolist() == [-1.0, -1.5, -1.0]
    assert scores.components["brightness"].tolist() == [0.0, 0.25, 1.0]  # before weighting
    assert scores.total.dtype == torch.float32


def test_a_reward_sees_every_keyword_and_three_channels():
    seen = {}

    def spy(**arguments):
        seen.update(arguments)
        return [0.0] * BATCH

    given = batch(channels=1)
    RewardSet([spy]).score(**given, columns={"artist": ["x", "y", "z"]})
    assert sorted(seen) == ["artist", "class_labels", "class_names", "completions", "images", "prompts"]
    assert seen["completions"] is seen["images"] and seen["images"].dtype == torch.float32
    assert torch.equal(seen["images"], given["images"].repeat(1, 3, 1, 1))
    assert (seen["prompts"], seen["class_names"]) == (["a", "b", "c"], ["zero", "one", "two"])
    assert seen["artist"] == ["x", "y", "z"]


def test_none_leaves_a_sample_out_of_one_reward_only():
    scores = RewardSet([constant([1.0, None, None]), constant([10.0, 20.0, None])], [3.0, 1.0]).score(**batch())
    assert scores.total[:2].tolist() == [13.0, 20.0]
    assert scores.total[2].isnan()  # no reward spoke
    assert scores.components["reward"].isnan().tolist() == [False, True, True]


def test_none_for_all_gives_no_total():
    scores = RewardSet([constant([None] * BATCH)]).score(**batch())
    assert scores.total.isnan().all()


@pytest.mark.parametrize(
    "returned",
    [
        [True, 2, 3.5],
        (1.0, 2, 3.5),
        torch.tensor([1, 2, 3.5], dtype=torch.float64),
        [torch.tensor(1.0), 2, torch.tensor(3.5)],
        list(torch.tensor([1, 2, 3.5]).numpy()),
        [np.bool_(True), Fraction(2), np.float16(3.5)],
    ],
)
def test_numbers_of_every_kind_are_accepted(returned):
    assert RewardSet([constant(returned)]).score(**batch()).total.tolist() == [1.0, 2.0, 3.5]


def test_ctrl_c_in_a_reward_is_not_swallowed():
    def interrupted(**columns):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        RewardSet([interrupted]).score(**batch())


def test_scoring_works_in_inference_mode():
    with torch.inference_mode():
        assert RewardSet([brightness]).score(**batch()).total.tolist() == [0.0, 0.25, 1.0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": torch.zeros(3, 8, 8)}, r"shape \[B, 1 or 3, H, W\], not \[3, 8, 8\]"),
        ({"images": torch.zeros(3, 2, 8, 8)}, r"not \[3, 2, 8, 8\]"),
        ({"images": torch.full((3, 3, 8, 8), 1.5)}, "pixels must lie in 0..1, but they lie in 1.5..1.5"),
        ({"images": torch.full((3, 3, 8, 8), torch.nan)}, "lie in nan..nan"),
        ({"prompts": ["a"]}, "3 images but 1 prompts"),
        ({"class_labels": torch.zeros(4, dtype=torch.long)}, "3 images but 4 class_labels"),
        ({"class_names": []}, "3 images but 0 class_names"),
        ({"columns": {"images": [1, 2, 3]}}, "column must not be called images"),
    ],
)
def test_a_batch_that_does_not_fit_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        RewardSet([brightness]).score(**{**batch(), **change})


def test_a_parameter_of_another_name_is_a_column_of_the_data_set():
    def like_artist(images, artist, **columns):
        return [float(name == "Klee") for name in artist]

    rewards = RewardSet([like_artist])
    scores = rewards.score(**batch(), columns={"artist": ["Klee", "Marc", "Klee"]})
    assert scores.total.tolist() == [1.0, 0.0, 1.0]
    with pytest.raises(RewardError, match=r"'like_artist' raised TypeError: .*artist"):
        rewards.score(**batch())


# Gradients


def test_the_gradient_is_that_of_the_weighted_sum():
    given = batch()
    given["images"].requires_grad_()
    rewards = RewardSet([brightness, Scaled], [2.0, 1.0], {"Scaled": {"factor": 4.0}})
    rewards.score(**given, with_grad=True).total.sum().backward()
    pixels = 3 * 8 * 8
    torch.testing.assert_close(given["images"].grad, torch.full((BATCH, 3, 8, 8), (2.0 + 4.0) / pixels))


def test_the_gradient_of_a_sample_left_out_is_zero_and_not_nan():
    def bright_only(*, images, **columns):
        return [None if image.mean() < 0.1 else image.mean() for image in images]

    bright_only.differentiable = True
    given = batch()
    given["images"].requires_grad_()
    total = RewardSet([bright_only]).score(**given, with_grad=True).total
    total[1:].sum().backward()
    assert total[0].isnan()
    assert given["images"].grad[0].abs().sum() == 0 and given["images"].grad[1:].sum() == pytest.approx(2.0)


def test_a_set_is_differentiable_if_all_its_rewards_are():
    assert RewardSet([brightness, Scaled]).differentiable
    assert not RewardSet([brightness, constant([0.0] * BATCH)]).differentiable


def test_gradients_through_a_reward_without_them_are_refused():
    given = batch()
    given["images"].requires_grad_()
    with pytest.raises(ValueError, match="reward 'reward' is not differentiable"):
        RewardSet([brightness, constant([0.0] * BATCH)]).score(**given, with_grad=True)


def test_gradients_to_images_that_want_none_are_refused():
    with pytest.raises(ValueError, match="images that require gradients"):
        RewardSet([brightness]).score(**batch(), with_grad=True)
