"""Asynchronous rewards, and rewards that are written for TRL's GRPOTrainer."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import gc
import os
import threading
import time
import warnings

import pytest
import torch
from simple_rewards import BATCH, batch, brightness

from marval_rl.errors import RewardError
from marval_rl.rewarding import RewardSet

GREY = [0.0, 0.25, 1.0]  # of the batch


async def later(*, images, **columns):
    """Mean grey level, after a moment."""
    await asyncio.sleep(0)
    return [float(image.mean()) for image in images]


class Later:
    """The same as a class, with settings."""

    def __init__(self, factor: float = 1.0) -> None:
        self.factor = factor

    async def __call__(self, *, images, **columns):
        await asyncio.sleep(0)
        return self.factor * images.mean(dim=(1, 2, 3))


def trl_length(prompts, completions, **kwargs):
    """TRL's signature, with its arguments by position or keyword and what it passes on in kwargs."""
    assert len(prompts) == len(completions)
    return [float(completion.sum() > 1) for completion in completions]


async def trl_async(prompts, completions, **kwargs):
    await asyncio.sleep(0)
    return [None if prompt == "b" else float(len(prompt)) for prompt in prompts]


@pytest.mark.parametrize("reward", [later, Later, Later(), functools.partial(later, extra=1)])
def test_an_asynchronous_reward_scores(reward):
    assert RewardSet([reward]).score(**batch()).total.tolist() == GREY


def test_asynchronous_and_plain_rewards_keep_their_order_and_names():
    scores = RewardSet([Later, brightness, later], [1.0, 1.0, 10.0], {"Later": {"factor": 2.0}}).score(**batch())
    assert list(scores.components) == ["Later", "brightness", "later"]
    assert [values.tolist() for values in scores.components.values()] == [[0.0, 0.5, 2.0], GREY, GREY]
    assert scores.total.tolist() == [0.0, 3.25, 13.0]


def test_signatures_of_trl_work_unchanged():
    scores = RewardSet([trl_length, trl_async]).score(**batch(), columns={"solution": ["x", "y", "z"]})
    assert scores.components["trl_length"].tolist() == [0.0, 1.0, 1.0]
    assert scores.components["trl_async"].isnan().tolist() == [False, True, False]
    assert scores.total.tolist() == [1.0, 1.0, 2.0]


def test_asynchronous_rewards_wait_at_the_same_time():
    """Each of them waits for the other: one after the other, they would never end."""

    def partner(mine: str, other: str):
        async def reward(*, images, **columns):
            met[mine].set()
            await asyncio.wait_for(met[other].wait(), timeout=5)
            return [1.0] * len(images)

        return reward

    met = {"a": asyncio.Event(), "b": asyncio.Event()}
    scores = RewardSet([partner("a", "b"), partner("b", "a")]).score(**batch())
    assert scores.total.tolist() == [2.0] * BATCH


def test_rewards_work_inside_a_running_event_loop():
    async def cell_of_a_notebook():
        return RewardSet([later]).score(**batch()).total.tolist()

    assert asyncio.run(cell_of_a_notebook()) == GREY


def test_a_connection_is_kept_from_call_to_call():
    """An HTTP client belongs to one event loop, so all calls must come from the same one."""
    loops = []

    async def reward(*, images, **columns):
        loops.append(asyncio.get_running_loop())
        return [0.0] * len(images)

    rewards = RewardSet([reward])
    rewards.score(**batch())
    rewards.score(**batch())
    assert loops[0] is loops[1] and loops[0].is_running()


def test_gradients_pass_through_an_asynchronous_reward():
    reward = Later(3.0)
    reward.differentiable = True
    given = batch()
    given["images"].requires_grad_()
    RewardSet([reward]).score(**given, with_grad=True).total.sum().backward()
    torch.testing.assert_close(given["images"].grad, torch.full((BATCH, 3, 8, 8), 3.0 / (3 * 8 * 8)))


def test_nothing_is_recorded_without_need():
    """The mode is one of a thread, and the loop has another thread than the caller."""
    modes = []

    async def reward(*, images, **columns):
        modes.append(torch.is_grad_enabled())
        return images.mean(dim=(1, 2, 3))

    RewardSet([reward]).score(**batch())
    assert modes == [False]


# A batch whose images come in parts


def parts_of(given: dict, size: int) -> list[dict]:
    """The arguments of `batch()` in parts of so many images."""
    return [{name: values[start : start + size] for name, values in given.items()} for start in range(0, BATCH, size)]


def scores_in_parts(rewards: RewardSet, size: int, columns: dict[str, list] | None = None):
    scoring = rewards.in_parts()
    for index, part in enumerate(parts_of(batch(), size)):
        own = {name: values[index * size : (index + 1) * size] for name, values in (columns or {}).items()}
        scoring.add(**part, columns=own)
    return scoring.result()


@pytest.mark.parametrize("size", [1, 2, BATCH])
def test_parts_have_the_scores_of_the_batch(size):
    rewards, columns = RewardSet([Later, trl_async, brightness], [1.0, 2.0, 3.0]), {"solution": ["x", "y", "z"]}
    found, expected = scores_in_parts(rewards, size, columns), rewards.score(**batch(), columns=columns)
    torch.testing.assert_close(found.total, expected.total, rtol=0, atol=0)
    for name, values in expected.components.items():
        torch.testing.assert_close(found.components[name], values, rtol=0, atol=0, equal_nan=True)


def test_an_asynchronous_reward_works_on_a_part_before_the_next_is_there():
    """And a plain one is asked once, for all of them."""
    begun, asked = threading.Event(), []

    async def early(*, images, **columns):
        begun.set()
        return [0.0] * len(images)

    def plain(*, images, solution, **columns):
        asked.append((len(images), solution))
        return [0.0] * len(images)

    scoring = RewardSet([early, plain]).in_parts()
    first, second = parts_of(batch(), 2)
    scoring.add(**first, columns={"solution": ["x", "y"]})
    assert begun.wait(timeout=5) and not asked
    scoring.add(**second, columns={"solution": ["z"]})
    scoring.result()
    assert asked == [(3, ["x", "y", "z"])]


def test_an_error_in_a_part_comes_with_the_result():
    async def faulty(*, images, **columns):
        if len(images) == 1:
            raise ConnectionError("no answer")
        return [0.0] * len(images)

    scoring = RewardSet([faulty]).in_parts()
    for part in parts_of(batch(), 2):
        scoring.add(**part)
    with pytest.raises(RewardError, match="reward 'faulty' raised ConnectionError: no answer"):
        scoring.result()


def test_what_a_reward_changes_early_in_the_process_is_refused_and_undone(tmp_path):
    changed = threading.Event()

    async def careless(*, images, **columns):
        os.chdir("/")
        changed.set()
        return [0.0] * len(images)

    with contextlib.chdir(tmp_path):
        scoring = RewardSet([careless]).in_parts()
        scoring.add(**batch())
        assert changed.wait(timeout=5)
        with pytest.raises(RewardError, match="'careless' changed the working directory"):
            scoring.result()
        assert os.getcwd() == str(tmp_path)


def test_what_has_not_been_answered_is_given_up_where_the_caller_fails():
    begun, given_up = threading.Event(), threading.Event()

    async def endless(*, images, **columns):
        begun.set()
        try:
            await asyncio.sleep(60)
        finally:
            given_up.set()

    with pytest.raises(KeyboardInterrupt), RewardSet([endless]).in_parts() as scoring:
        scoring.add(**batch())
        assert begun.wait(timeout=5)
        raise KeyboardInterrupt
    assert given_up.wait(timeout=5)


@pytest.mark.filterwarnings("error")
def test_a_missing_argument_is_an_asynchronous_rewards_error_too():
    async def wants_more(*, images, artist, **columns):
        return [0.0] * len(images)

    with pytest.raises(RewardError, match="reward 'wants_more' raised TypeError"):
        scores_in_parts(RewardSet([wants_more]), 2)


# What goes wrong


async def raises(**columns):
    await asyncio.sleep(0)
    raise ConnectionError("no answer")


async def too_few(*, images, **columns):
    return [0.0]


async def not_a_number(*, images, **columns):
    return [0.0, 0.0, float("nan")]


async def vandal(*, images, **columns):
    return images.mul_(0.5).mean(dim=(1, 2, 3))


async def given_up(**columns):
    raise asyncio.CancelledError("took too long")


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        (raises, "reward 'raises' raised ConnectionError: no answer"),
        (too_few, "reward 'too_few' returned 1 scores for 3 images"),
        (not_a_number, "reward 'not_a_number': the score of sample 2 is nan"),
        (vandal, "reward 'vandal' changed the images in place"),
        (given_up, "reward 'given_up' raised CancelledError: took too long"),
    ],
)
def test_a_broken_asynchronous_reward_is_named(reward, message):
    with pytest.raises(RewardError, match=message):
        RewardSet([brightness, later, reward]).score(**batch())
    assert RewardSet([later]).score(**batch()).total.tolist() == GREY  # the loop lives on


def test_the_others_have_ended_when_an_error_comes():
    ended = []

    async def slow(*, images, **columns):
        await asyncio.sleep(0.05)
        ended.append(True)
        return [0.0] * len(images)

    with pytest.raises(RewardError, match="'raises'"):
        RewardSet([slow, raises]).score(**batch())
    assert ended


def test_an_exit_in_an_asynchronous_reward_is_its_error():
    async def leaves(**columns):
        raise SystemExit(3)

    with pytest.raises(RewardError, match="reward 'leaves' raised SystemExit: 3"):
        RewardSet([leaves]).score(**batch())
    assert RewardSet([later]).score(**batch()).total.tolist() == GREY


def test_a_plain_reward_that_raises_leaves_nothing_unawaited():
    def faulty(**columns):
        raise KeyError("lost")

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with pytest.raises(RewardError, match="'faulty'"):
            RewardSet([later, faulty]).score(**batch())
        gc.collect()
    assert not caught, [str(warning.message) for warning in caught]


def test_two_threads_may_score_at_the_same_time():
    results = []
    threads = [
        threading.Thread(target=lambda: results.append(RewardSet([later]).score(**batch()).total.tolist()))
        for _ in range(8)
    ]
    start = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=10)
    assert results == [GREY] * 8 and time.monotonic() - start < 10
