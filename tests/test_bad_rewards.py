"""Rewards that break their contract in a run, each with its one line on stderr."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from tiny_recipes import read_lines, training_lines

REWARDS = """
import torch


def raises(images, **columns):
    raise KeyError("no such thing")


def some_left_out(images, **columns):
    return [None if index % 3 == 0 else float(image.mean()) for index, image in enumerate(images)]


def plain(images, **columns):
    return images.mean(dim=(1, 2, 3))


def cut_off(images, **columns):
    return images.mean(dim=(1, 2, 3)).detach()


def some_left_out_with_a_slope(images, **columns):
    return [None if index % 3 == 0 else image.mean() for index, image in enumerate(images)]


def ink_in_place(images, **columns):
    pixels = images.cpu().numpy()
    pixels *= 255
    return pixels.astype("uint8").mean(axis=(1, 2, 3)).tolist()


def seeds(images, **columns):
    torch.manual_seed(0)
    return images.mean(dim=(1, 2, 3))


cut_off.differentiable = some_left_out_with_a_slope.differentiable = True
"""


@pytest.fixture
def rewards(tmp_path) -> str:
    """The path of a file of rewards."""
    path = tmp_path / "rewards.py"
    path.write_text(REWARDS)
    return str(path)


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        ("raises", "reward 'raises' raised KeyError: 'no such thing'"),
        ("ink_in_place", "reward 'ink_in_place' changed the images in place"),
    ],
)
def test_a_reward_that_breaks_its_contract(train, rewards, complaint, reward, message):
    assert message in complaint(1, train(reward_funcs=f"{rewards}:{reward}"))


def test_a_reward_that_seeds_does_not_change_the_training(train, rewards, tmp_path):
    """The anchor draws its noise after the rewards, from torch's global generator."""
    weights = []
    for reward in ("plain", "seeds"):
        folder = tmp_path / reward
        settings = {"gsim_weight": 1.0, "auxiliary_warmup_steps": 0, "auxiliary_updates": 1, "eval_strategy": "steps"}
        judged = {"reward_funcs": f"{rewards}:{reward}", "eval_reward_funcs": f"{rewards}:{reward}", "eval_steps": 1}
        assert train(output_dir=folder, **settings, **judged) == 0
        weights.append(load_file(folder / "final" / "model.safetensors"))
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_a_reward_may_leave_samples_out(train, rewards, tmp_path):
    assert train(reward_funcs=f"{rewards}:some_left_out") == 0
    lines = training_lines(tmp_path / "run")
    assert len(lines) == 2 and all(0 < line["rewards/some_left_out/mean"] < 1 for line in lines[:1])


def test_reward_backprop_with_a_reward_that_has_no_slope(train, rewards, complaint):
    line = complaint(2, train(recipe="reward_backprop", reward_funcs=f"{rewards}:plain"))
    assert "reward_backprop needs differentiable rewards" in line and "plain" in line and "method grpo" in line


def test_reward_backprop_with_a_reward_that_is_cut_off(train, rewards, complaint):
    line = complaint(1, train(recipe="reward_backprop", reward_funcs=f"{rewards}:cut_off"))
    assert "reward 'cut_off' declares itself differentiable, but no gradient leads from its scores" in line


def test_reward_backprop_with_a_reward_that_leaves_samples_out(train, rewards, tmp_path):
    assert train(recipe="reward_backprop", reward_funcs=f"{rewards}:some_left_out_with_a_slope") == 0
    lines = training_lines(tmp_path / "run")
    assert [line["loss"] for line in lines] == pytest.approx([-line["reward"] for line in lines], abs=1e-5)
    weights = load_file(tmp_path / "run" / "final" / "model.safetensors")
    assert all(torch.isfinite(value).all() for value in weights.values())


def test_a_reward_file_that_is_not_there(train, tmp_path, complaint):
    line = complaint(2, train(reward_funcs=f"{tmp_path / 'nowhere.py'}:plain"))
    assert str(tmp_path / "nowhere.py") in line


def test_a_reward_that_is_missing_from_its_file(train, rewards, complaint):
    line = complaint(2, train(reward_funcs=f"{rewards}:plane"))
    assert "plane" in line and "plain" in line


def test_a_dry_run_says_what_is_missing(train, tmp_path, capsys):
    assert train("--dry_run", model=tmp_path / "nowhere") == 0
    assert f"missing: no model at {tmp_path / 'nowhere'}" in capsys.readouterr().out


def test_a_failed_run_can_be_started_again(train, rewards, tmp_path, complaint):
    assert complaint(2, train(class_groups="parity"))
    assert train() == 0
    assert read_lines(tmp_path / "run")
