"""`marval-rl rewards check`: what it says of sound rewards, and which check finds which breach of the contract."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch

from marval_rl.cli import main as cli
from marval_rl.rewarding import contract

CHECKS = ["keywords", *contract.CHECKS]

REWARDS = """
import random

import numpy as np
import torch


def mean(images):
    return images.mean(dim=(1, 2, 3))


def differentiable(reward):
    reward.differentiable = True
    return reward


class Sound:
    differentiable = True

    def __init__(self, factor=1.0):
        self.factor = factor

    def __call__(self, *, images, **columns):
        return self.factor * (images**2).mean(dim=(1, 2, 3))


def plain(images, **columns):
    return mean(images).tolist()


async def plain_async(images, **columns):
    return mean(images).tolist()


def by_artist(images, artist, prompts, **columns):
    return [1.0 * (name == "Klee") + len(prompt) for name, prompt in zip(artist, prompts)]


def none_for_dark(images, **columns):
    return [None if value < 0.5 else value for value in mean(images).tolist()]


# Broken ones


def raises(images, **columns):
    raise OSError("no weights")


def squeezed(images, **columns):
    return mean(images).squeeze()


def changes_in_place(images, **columns):
    images -= 0.1
    return mean(images)


def ends_the_process(images, **columns):
    raise SystemExit(1)


def ends_later(images, **columns):
    if len(images) != 8:
        raise SystemExit(1)
    return mean(images)


def ranked(images, **columns):
    return mean(images).argsort().argsort().float()


def reversed_order(images, **columns):
    return mean(images).flip(0)


def nan_for_flat(images, **columns):
    return images.mean(dim=(1, 2, 3)) / images.std(dim=(1, 2, 3))


def seeds(images, **columns):
    torch.manual_seed(0)
    return mean(images) + torch.rand(1)


def seeds_numpy(images, **columns):
    np.random.seed(0)
    return mean(images)


@differentiable
def detached(images, **columns):
    return mean(images).detach()


@differentiable
def half_detached(images, **columns):
    return mean(images) + mean(images[:, :, ::2].detach())


@differentiable
def rounded(images, **columns):
    return (mean(images) * 1000).round()


@differentiable
def steep(images, **columns):
    return mean((images - images.detach()).abs().sqrt()) + mean(images)


@differentiable
async def async_detached(images, **columns):
    return mean(images).tolist()


# Sound, with something to know


def always_none(images, **columns):
    return [None] * len(images)


def constant(images, **columns):
    return [0.5] * len(images)


def noisy(images, **columns):
    generator.random()
    return [value + 0.1 * generator.random() for value in mean(images).tolist()]


def draws(images, **columns):
    random.random()
    return mean(images)


def one_size(images, **columns):
    if images.shape[2:] != (16, 16):
        raise ValueError("only 16x16")
    return mean(images)


@differentiable
def flat_for_dark(images, **columns):
    return (images.mean(dim=(1, 2, 3)) - 0.5).relu()


generator = random.Random(0)
network = torch.nn.BatchNorm2d(3)


def in_training(images, **columns):
    return mean(network(images[:, :, :1, :1]))  # of one image it cannot be computed


class InTraining:
    def __init__(self):
        self.network = torch.nn.Conv2d(3, 1, 8, 8)

    def __call__(self, images, **columns):
        return self.network(images).mean(dim=(1, 2, 3))


class InEvaluation(InTraining):
    def __init__(self):
        super().__init__()
        self.network.eval()
"""


@pytest.fixture
def check(tmp_path, monkeypatch, capsys):
    """`check(attribute, *arguments)` -> (exit code, {check: (status, detail)}, the last line of stderr)."""
    (tmp_path / "mine.py").write_text(REWARDS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(contract, "TIMED_SECONDS", 0.0)

    def run(attribute: str, *arguments: str) -> tuple[int, dict[str, tuple[str, str]], str]:
        code = cli.main(["rewards", "check", f"mine.py:{attribute}", "--image_size", "16", *arguments])
        printed = capsys.readouterr()
        rows = {line[:16].strip(): (line[18:25].strip(), line[27:]) for line in printed.out.splitlines()}
        return code, rows, (printed.err.splitlines() or [""])[-1]

    return run


@pytest.mark.parametrize("reward", ["Sound", "plain", "plain_async", "none_for_dark"])
def test_a_sound_reward_passes_every_check(check, reward):
    code, rows, error = check(reward)
    assert (code, error) == (0, "")
    assert list(rows) == CHECKS
    assert {status for status, _ in rows.values()} == {"ok"}, rows


def test_the_table_explains_each_result(check):
    _, rows, _ = check("Sound", "--reward_kwargs", '{"factor": 4}')
    assert rows["keywords"][1] == "uses images"
    assert rows["black and white"][1] == "black scores 0, white 4"
    assert rows["sizes"][1] == "8x8, 33x47, 256x256 are scored too"
    assert rows["gradient"][1].endswith("of finite differences, relatively")
    assert "images/s at batch 1, " in rows["speed"][1] and rows["speed"][1].endswith("images/s at batch 32")
    _, rows, _ = check("none_for_dark")
    assert "left out (None)" in rows["scores"][1]
    assert rows["networks"] == ("ok", "no network was found")
    _, rows, _ = check("InEvaluation")
    assert rows["networks"] == ("ok", "network: in evaluation mode")


def test_without_a_gradient_it_prints_the_error_of_reward_backprop(check):
    _, rows, _ = check("plain")
    status, detail = rows["gradient"]
    assert status == "ok" and "reward_backprop would say: reward 'plain' is not differentiable" in detail


@pytest.mark.parametrize(
    ("reward", "failed", "detail"),
    [
        ("raises", "scores", "reward 'raises' raised OSError: no weights"),  # test_contract_violations.py has more
        ("changes_in_place", "scores", "reward 'changes_in_place' changed the images in place"),
        ("ends_the_process", "scores", "reward 'ends_the_process' raised SystemExit: 1"),
        ("ends_later", "batch", "reward 'ends_later' raised SystemExit: 1"),
        ("squeezed", "batch", "reward 'squeezed' returned a tensor of the shape [], not [1]"),
        ("ranked", "batch", "a score must not depend on the other images"),
        ("reversed_order", "batch", "a score must not depend on the other images"),
        ("nan_for_flat", "black and white", "reward 'nan_for_flat': the score of sample 0 is nan"),
        ("seeds", "random numbers", "it sets the global seed of torch: every rollout would draw the same noise"),
        ("seeds_numpy", "random numbers", "it sets the global seed of numpy"),
        ("detached", "gradient", "reward 'detached' declares itself differentiable, but no gradient leads"),
        ("async_detached", "gradient", "reward 'async_detached' declares itself differentiable, but no gradient"),
        ("half_detached", "gradient", "from finite differences: a part of the way is cut off or wrong"),
        ("rounded", "gradient", "declared differentiable, but the gradient is zero for every image"),
        ("steep", "gradient", "the gradient of sample 0 is not finite"),
    ],
)
def test_a_breach_is_found_and_explained(check, reward, failed, detail):
    code, rows, error = check(reward)
    assert code == 1
    assert rows[failed][0] == "fails" and detail in rows[failed][1], rows
    assert error.startswith(f"marval-rl: error: reward '{reward}' fails ") and failed in error
    assert f" of {len(rows)} checks" in error


@pytest.mark.parametrize(
    ("reward", "warned", "detail"),
    [
        ("always_none", "scores", "None for all 8 images: they would not train"),
        ("constant", "scores", "0.5 for all 8 images, which are different: nothing can be learned from that"),
        ("noisy", "repeatable", "a resumed run will go another way"),
        ("draws", "random numbers", "draws from the global random numbers of random"),
        ("in_training", "networks", "network: in training mode, with dropout and the batch's own statistics"),
        ("InTraining", "networks", "network: in training mode"),
        ("one_size", "sizes", "16x16 works, 8x8, 33x47, 256x256 not (8x8: reward 'one_size' raised ValueError: only"),
        ("flat_for_dark", "gradient", "the gradient is zero for "),
    ],
)
def test_harmless_deviations_are_warnings(check, reward, warned, detail):
    code, rows, _ = check(reward)
    assert rows[warned][0] == "warning" and detail in rows[warned][1], rows
    # Noise and the batch's statistics also make the score depend on the batch.
    assert code == (1 if reward in ("noisy", "in_training") else 0)


def test_without_scores_the_other_checks_are_left_out(check):
    _, rows, error = check("raises")
    assert list(rows) == ["keywords", "scores"]
    assert error.endswith("reward 'raises' fails 1 of 2 checks: scores")


def test_columns_and_prompts_come_from_a_file(check, capsys):
    Path("prompts.jsonl").write_text('{"prompt": "a", "artist": "Klee"}\n{"prompt": "four", "artist": "Marc"}\n')
    code, rows, _ = check("by_artist", "--prompts", "prompts.jsonl")
    assert code == 0 and rows["keywords"][1] == "uses images, artist, prompts (artist: of the data set)"
    assert rows["scores"] == ("ok", "8 from 2 to 4")
    code, rows, _ = check("by_artist")
    assert code == 1 and "raised TypeError" in rows["scores"][1] and "'artist'" in rows["scores"][1]
    assert cli.main(["rewards", "check", "--help"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "for a reward that needs the prompts, class names or columns of your data" in shown


def test_the_random_state_outlives_the_checks(check):
    torch.manual_seed(5)
    random.seed(5)
    np.random.seed(5)
    expected = torch.rand(1), random.random(), np.random.rand()
    torch.manual_seed(5)
    random.seed(5)
    np.random.seed(5)
    check("Sound")
    assert (torch.rand(1), random.random(), np.random.rand()) == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--image_size", "0"], "--image_size must be at least 1, not 0"),
        (["--prompts", "empty.txt"], "--prompts empty.txt is empty"),
        (["--reward_kwargs", '{"facto": 2}'], "'Sound' refuses its reward_kwargs: got an unexpected keyword argument"),
    ],
)
def test_wrong_arguments_are_refused(check, arguments, message):
    Path("empty.txt").write_text("")
    code, rows, error = check("Sound", *arguments)
    assert code == 2 and not rows and message in error
