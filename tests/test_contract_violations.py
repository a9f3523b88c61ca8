"""Broken rewards, each with the message that names the reward, and the sample and its value where there is one."""

from __future__ import annotations

import contextlib
import os

import numpy as np
import pytest
import torch
from simple_rewards import BATCH, batch, brightness, constant

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
        ([0.0, 10**400, 0.0], "returned what cannot be read as scores: int"),
        (torch.zeros(3, device="meta"), "returned what cannot be read as scores"),
        (np.zeros(3), r"returned a ndarray; it must be a list"),
        (0.5, r"returned a float; it must be a list of numbers \(or None\) or a tensor \[3\]"),
        (None, "returned a NoneType"),
        ((value for value in (1.0, 2.0, 3.0)), "returned a generator; it must be a list"),
        ({"score": 1.0}, "returned a dict"),
    ],
)
def test_values_that_are_not_scores_are_refused(returned, message):
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


def _by_torch(images):
    images.mul_(0.5)


def _by_numpy(images):
    pixels = images.cpu().numpy()
    pixels *= 255


def _by_data(images):
    images.data.clamp_(max=0.5)


def _by_detached_numpy(images):
    images.detach().numpy()[:] = 0


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("change", [_by_torch, _by_numpy, _by_data, _by_detached_numpy])
def test_changing_the_images_in_place_is_refused(change, asynchronous):
    def vandal(*, images, **columns):
        change(images)
        return [0.5] * len(images)

    async def vandal_async(**arguments):
        return vandal(**arguments)

    reward = vandal_async if asynchronous else vandal
    given = batch()
    with pytest.raises(RewardError, match=f"'{reward.__name__}' changed the images in place"):
        RewardSet([brightness, reward]).score(**given)
    assert torch.equal(given["images"], batch()["images"])


def test_what_a_reward_does_to_its_arguments_reaches_nobody_else():
    kept = []

    def vandal(*, images, completions, prompts, class_labels, class_names, artists, **columns):
        for earlier in kept:
            earlier.zero_()  # after its call, when nobody looks
        kept.append(images)
        prompts[0] = class_names[0] = "spoilt"
        class_labels.numpy()[:] = 9
        artists[0]["name"] = "spoilt"
        artists.pop()
        return [0.5] * len(images)

    seen = {}

    def witness(**arguments):
        seen.update(arguments)
        return [0.5] * BATCH

    given, columns = batch(), {"artists": [{"name": "Klee"}, {"name": "Marc"}, {"name": "Kirchner"}]}
    rewards = RewardSet([vandal, witness])
    for _ in range(2):
        rewards.score(**given, columns=columns)
        assert columns["artists"][0] == seen["artists"][0] == {"name": "Klee"} and len(seen["artists"]) == BATCH
        for arguments in (given, seen):
            assert torch.equal(arguments["images"], batch()["images"])
            assert (arguments["prompts"], arguments["class_names"]) == (batch()["prompts"], batch()["class_names"])
            assert arguments["class_labels"].tolist() == [0, 1, 2]


def test_a_column_that_cannot_be_copied_is_handed_on():
    with open(os.devnull) as stream:
        RewardSet([lambda handles, **columns: [0.0] * len(handles)]).score(**batch(), columns={"handles": [stream] * 3})


def test_scores_in_memory_that_a_reward_reuses():
    memory = torch.zeros(BATCH)

    def first(**columns):
        return memory.fill_(1.0)

    def second(**columns):
        return memory.fill_(2.0)

    scores = RewardSet([first, second]).score(**batch())
    memory.fill_(3.0)
    assert scores.by_reward().tolist() == [[1.0, 2.0]] * BATCH


def test_without_gradients_no_graph_is_kept():
    weight, given = torch.ones((), requires_grad=True), batch()
    given["images"].requires_grad_()

    def reward(*, images, **columns):
        with torch.enable_grad():
            return weight * images.mean(dim=(1, 2, 3))

    scores = RewardSet([reward]).score(**given)
    assert not scores.components["reward"].requires_grad and not scores.total.requires_grad


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda: torch.set_default_dtype(torch.float64), "default dtype .* from torch.float32 to torch.float64; give"),
        (lambda: torch.set_grad_enabled(True), "gradient mode .* from False to True; use `with torch.no_grad"),
        (lambda: os.chdir(os.pardir), "working directory of the whole process from .*; use absolute paths"),
        (lambda: torch.set_default_device("meta"), "default device .* from cpu to meta; give"),
    ],
)
def test_changes_of_process_state_are_refused_and_undone(change, message, tmp_path):
    def careless(*, images, **columns):
        change()
        return [0.5] * len(images)

    def ending(**columns):
        change()
        raise OSError

    with contextlib.chdir(tmp_path):
        for reward in (careless, ending):
            with pytest.raises(RewardError, match=message if reward is careless else "raised OSError"):
                RewardSet([reward]).score(**batch())
            assert torch.get_default_dtype() == torch.float32 and torch.is_grad_enabled()
            assert os.getcwd() == str(tmp_path) and torch.zeros(1).device.type == "cpu"


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("error", [SystemExit(3), GeneratorExit()])
def test_a_reward_that_ends_itself_does_not_end_the_run(error, asynchronous):
    def leaving(**columns):
        raise error

    async def leaving_async(**columns):
        raise error

    with pytest.raises(RewardError, match=f"raised {type(error).__name__}"):
        RewardSet([leaving_async if asynchronous else leaving]).score(**batch())


def test_a_false_claim_of_gradients_is_refused():
    def liar(*, images, **columns):
        return images.detach().mean(dim=(1, 2, 3))

    liar.differentiable = True
    given = batch()
    given["images"].requires_grad_()
    with pytest.raises(RewardError, match="'liar' declares itself differentiable, but no gradient leads"):
        RewardSet([liar]).score(**given, with_grad=True)
