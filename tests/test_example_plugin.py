"""The example of a reward in a package of its own, installed and used by its name."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from marval_rl.cli import main as cli
from marval_rl.rewarding import RewardSet, load_reward

EXAMPLE = Path(__file__).parents[1] / "examples" / "reward_plugin"


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """A folder for sys.path with the package in it, installed by pip without the network."""
    source = shutil.copytree(EXAMPLE, tmp_path_factory.mktemp("source") / "plugin")  # a build leaves its files there
    target = tmp_path_factory.mktemp("site-packages")
    options = ["--quiet", "--disable-pip-version-check", "--no-index", "--no-deps", "--no-build-isolation"]
    subprocess.run([sys.executable, "-m", "pip", "install", *options, "--target", target, source], check=True)
    return target


@pytest.fixture
def on_path(installed, monkeypatch) -> None:
    monkeypatch.syspath_prepend(str(installed))


def test_the_installed_reward_is_found_by_its_name(on_path, installed, capsys):
    assert cli.main(["rewards", "list"]) == 0
    assert "symmetry_reward:Symmetry" in capsys.readouterr().out
    rewards = RewardSet(["symmetry"], reward_kwargs={"symmetry": {"sharpness": 2.0}})
    assert Path(sys.modules["symmetry_reward"].__file__).is_relative_to(installed)
    images = torch.zeros(2, 3, 4, 4)
    images[1, :, :, 0] = 1  # 2 of 4 columns differ from their mirror images
    scores = rewards.score(images, ["a", "b"], torch.tensor([0, 1]), ["a", "b"])
    assert scores.total.tolist() == [0.0, -1.0]


def test_without_the_package_the_name_is_unknown():
    with pytest.raises(ValueError, match="unknown reward 'symmetry'"):
        load_reward("symmetry")


def test_it_keeps_the_contract(on_path, capsys):
    assert cli.main(["rewards", "check", "symmetry", "--image_size", "8"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 12 and all(" ok " in line for line in lines)


def test_its_own_arguments_are_checked(on_path):
    with pytest.raises(ValueError, match=r"'symmetry' cannot be made with .*: ValueError: sharpness must be positive"):
        load_reward("symmetry", sharpness=0)
