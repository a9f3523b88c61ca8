"""The code in docs/rewards.md is run as it stands."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import torch
import yaml
from simple_rewards import batch, register

from marval_rl.rewarding import RewardSet, loading
from marval_rl.rewarding.contract import CHECKS

ROOT = Path(__file__).parents[1]


def fenced(language: str) -> list[str]:
    """The code blocks of docs/rewards.md in one language."""
    text = (ROOT / "docs" / "rewards.md").read_text()
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def test_the_ten_line_plug_in_of_the_docs_runs_with_its_recipe(tmp_path, monkeypatch):
    plug_in = fenced("python")[0]
    lines = [line for line in plug_in.splitlines() if line and not line.startswith("#")]
    assert len(lines) <= 10
    (tmp_path / "my_rewards.py").write_text(plug_in)
    monkeypatch.chdir(tmp_path)
    recipe = yaml.safe_load(fenced("yaml")[0])
    assert recipe.pop("eval_reward_funcs") == ["held_out_classifier"]
    # The classifier itself has tests of its own; here another class stands in for it.
    register(monkeypatch, classifier="simple_rewards:Scaled")
    recipe["reward_kwargs"]["classifier"] = {}

    rewards = RewardSet(**recipe)
    assert rewards.names == ["classifier", "Boldness"] and rewards.differentiable
    given = batch()
    given["images"].requires_grad_()
    scores = rewards.score(**given, with_grad=True)
    boldness = torch.tensor([-0.35, -0.1, -0.65])  # target .35 against grey levels 0, .25 and 1
    torch.testing.assert_close(scores.components["Boldness"].detach(), boldness)
    torch.testing.assert_close(scores.total.detach(), torch.tensor([0.0, 0.25, 1.0]) + 0.5 * boldness)
    scores.total.sum().backward()
    assert given["images"].grad.abs().sum() > 0


def test_the_functions_of_the_docs_run(tmp_path):
    (tmp_path / "functions.py").write_text("\n".join(fenced("python")[1:]))
    names = ["brightness", "inkiness", "patient_brightness", "bright_digits_only"]
    scores = RewardSet([f"{tmp_path}/functions.py:{name}" for name in names]).score(**batch())
    for name in names[:3]:
        assert scores.components[name].tolist() == [0.0, 0.25, 1.0], name
    assert scores.components["bright_digits_only"].isnan().tolist() == [True, False, False]


def test_the_entry_point_group_is_the_documented_one():
    [snippet] = fenced("toml")
    assert list(tomllib.loads(snippet)["project"]["entry-points"]) == [loading.ENTRY_POINT_GROUP]


def test_the_table_of_the_docs_lists_the_checks_that_are_made():
    table = re.search(r"rewards check my_rewards.*?\n(.*?)```", (ROOT / "docs" / "rewards.md").read_text(), re.DOTALL)
    assert [line[:16].strip() for line in table[1].splitlines()] == ["keywords", *CHECKS]
