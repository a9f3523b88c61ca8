"""Where a reward is found, and how a spec that leads nowhere is answered."""

from __future__ import annotations

import functools
import importlib
import re
import sys
from importlib.metadata import EntryPoint, EntryPoints
from pathlib import Path

import pytest
import torch
from simple_rewards import BATCH, Scaled, batch, brightness, register

from marval_rl.rewarding import RewardSet, list_rewards, load_reward, loading

ROOT = Path(__file__).parents[1]


def test_a_callable_is_taken_as_it_is():
    assert load_reward(brightness) is brightness


def test_a_class_is_instantiated_with_its_kwargs():
    assert load_reward(Scaled, factor=3.0).factor == 3.0


def test_a_file_and_its_attribute(tmp_path, monkeypatch):
    call = "    def __call__(self, *, images, **columns): return [0.5] * len(images)"
    (tmp_path / "mine.py").write_text(f"class Half:\n{call}\n")
    monkeypatch.chdir(tmp_path)
    for spec in ("mine.py:Half", f"{tmp_path}/mine.py:Half"):
        assert RewardSet([spec]).score(**batch()).total.tolist() == [0.5] * BATCH


def test_two_files_of_one_name_are_two_rewards(tmp_path):
    for folder, value in (("a", 1.0), ("b", 2.0)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "mine.py").write_text(f"def f(*, images, **columns): return [{value}] * len(images)\n")
    rewards = RewardSet([f"{tmp_path}/a/mine.py:f", f"{tmp_path}/b/mine.py:f"])
    scores = rewards.score(**batch())
    assert rewards.names == ["f", "f_2"]
    assert [scores.components[name][0].item() for name in rewards.names] == [1.0, 2.0]


def _score(spec: str) -> float:
    return RewardSet([spec]).score(**batch()).total[0].item()


@pytest.mark.parametrize("statement", ["from helpers import value", "from .helpers import value"])
def test_a_file_imports_what_lies_beside_it(statement, tmp_path, monkeypatch):
    """Two folders, each with its own helpers; the import path of the process stays as it was."""
    for folder, value in (("a", 1.0), ("b", 2.0)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "helpers.py").write_text(f"value = {value}\n")
        (tmp_path / folder / "mine.py").write_text(
            f"{statement}\ndef f(*, images, **columns): return [value] * len(images)\n"
        )
    path, finders = list(sys.path), list(sys.meta_path)
    rewards = RewardSet([f"{tmp_path}/a/mine.py:f", f"{tmp_path}/b/mine.py:f", f"{tmp_path}/a/mine.py:f"])
    scores = rewards.score(**batch())
    assert [scores.components[name][0].item() for name in rewards.names] == [1.0, 2.0, 1.0]
    assert (sys.path, sys.meta_path) == (path, finders) and "helpers" not in sys.modules
    monkeypatch.chdir(tmp_path / "a")
    assert _score("mine.py:f") == 1.0


def test_a_module_of_the_current_folder_does_not_lend_its_helpers(tmp_path, monkeypatch):
    for folder, value in (("a", 1.0), ("b", 2.0)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "lent_helpers.py").write_text(f"value = {value}\n")
        (tmp_path / folder / "lending.py").write_text(
            "from lent_helpers import value\ndef f(*, images, **columns): return [value] * len(images)\n"
        )
    monkeypatch.chdir(tmp_path / "a")
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert _score("lending:f") == 1.0
    assert _score(f"{tmp_path}/b/lending.py:f") == 2.0
    assert sys.modules["lent_helpers"].value == 1.0


def test_a_class_imports_what_lies_beside_it_when_it_is_made(tmp_path):
    (tmp_path / "helpers.py").write_text("value = 1.0\n")
    (tmp_path / "mine.py").write_text(
        "class Late:\n    def __init__(self):\n        from helpers import value\n        self.value = value\n"
        "    def __call__(self, *, images, **columns): return [self.value] * len(images)\n"
    )
    assert _score(f"{tmp_path}/mine.py:Late") == 1.0


@pytest.mark.parametrize("name", ["random", "numpy", "timm", "colorsys"])
def test_a_file_called_as_an_installed_module_shadows_nothing(name, tmp_path, monkeypatch):
    monkeypatch.delitem(sys.modules, "colorsys", raising=False)
    (tmp_path / f"{name}.py").write_text(
        f"import {name}\ndef f(*, images, **columns): return [float('{tmp_path}' in {name}.__file__)] * len(images)\n"
    )
    assert _score(f"{tmp_path}/{name}.py:f") == 0.0
    assert str(tmp_path) not in importlib.import_module(name).__file__


@pytest.mark.parametrize(
    "source", ["raise SystemExit(2)", "from argparse import *\nArgumentParser().parse_args(['-x'])"]
)
def test_a_file_that_ends_the_process_is_refused(source, tmp_path):
    (tmp_path / "script.py").write_text(source)
    with pytest.raises(ValueError, match=r"script\.py cannot be imported: SystemExit: 2"):
        load_reward(f"{tmp_path}/script.py:f")


def test_settings_that_a_file_changes_for_the_process_are_restored(tmp_path):
    (tmp_path / "script.py").write_text(
        "import os, torch\ntorch.set_grad_enabled(False)\ntorch.set_default_dtype(torch.float64)\nos.chdir('/')\n"
        "def f(*, images, **columns): return images.mean(dim=(1, 2, 3))\n"
    )
    before = Path.cwd()
    assert _score(f"{tmp_path}/script.py:f") == 0.0
    assert torch.is_grad_enabled() and torch.get_default_dtype() == torch.float32 and Path.cwd() == before


class _Judge:
    def helpful(self, **columns):
        return [0.0] * BATCH


@pytest.mark.parametrize(
    ("callables", "names"),
    [
        ([functools.partial(brightness), functools.partial(functools.partial(Scaled(2.0)))], ["brightness", "Scaled"]),
        ([functools.partial(brightness), brightness], ["brightness", "brightness_2"]),
        ([lambda **columns: [0.0], lambda **columns: [0.0]], ["lambda", "lambda_2"]),
        ([_Judge().helpful, _Judge().helpful], ["helpful", "helpful_2"]),
    ],
)
def test_names_of_callables(callables, names):
    assert RewardSet(callables).names == names


def test_a_partial_is_as_differentiable_as_the_function_it_wraps():
    assert RewardSet([functools.partial(brightness)]).differentiable


def test_a_module_and_its_attribute(tmp_path, monkeypatch):
    (tmp_path / "module_with_reward.py").write_text("def f(*, images, **columns): return [2] * len(images)\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert RewardSet(["module_with_reward:f"]).score(**batch()).total.tolist() == [2.0] * BATCH


def test_an_entry_point_by_its_name(monkeypatch):
    register(monkeypatch, scaled="simple_rewards:Scaled")
    assert load_reward("scaled", factor=2.0).factor == 2.0


def test_the_shipped_rewards_are_registered():
    listing = {name: (target, description) for name, target, description in list_rewards()}
    assert listing["classifier"][0] == "marval_rl.rewards.classifier:Classifier"
    assert listing["classifier"][1].startswith("How well the image shows its class")
    assert listing["held_out_classifier"][0] == "marval_rl.rewards.classifier:HeldOutClassifier"


def test_the_list_survives_a_plug_in_that_cannot_be_imported(monkeypatch):
    register(monkeypatch, scaled="simple_rewards:Scaled", broken="no_such_package:Reward")
    broken, scaled = list_rewards()
    assert broken[:2] == ("broken", "no_such_package:Reward") and "No module named 'no_such_package'" in broken[2]
    assert scaled == ("scaled", "simple_rewards:Scaled", "Mean grey level, times a factor.")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("scalde", r"unknown reward 'scalde'; did you mean scaled\?; registered: broken, scaled, twice"),
        ("broken", r"'broken' \(no_such_package:Reward\) cannot be imported: ModuleNotFoundError"),
        ("nowhere.py:f", "file 'nowhere.py' does not exist"),
        ("{folder}/mine.py:brightnes", r"has no 'brightnes'; did you mean brightness\?"),
        ("{folder}/typo.py:f", "typo.py cannot be imported: SyntaxError"),
        ("no_such_package.scores:f", "no_such_package.scores cannot be imported: ModuleNotFoundError"),
        ("math:no_such_reward", "math has no 'no_such_reward'"),
        ("math:", "must look like path/file.py:attribute"),
        ("{folder}/mine.py:NUMBER", "'NUMBER' is not callable but a int"),
        ("{folder}/mine.py:NoCall", "'NoCall' is not callable but a NoCall; give its class a __call__ method"),
        ("{folder}/mine.py:no_columns", r"signature \(images\), but is called by keyword with .* end with \*\*columns"),
    ],
)
def test_a_spec_that_leads_nowhere_is_answered_clearly(spec, message, monkeypatch, tmp_path):
    register(monkeypatch, scaled="simple_rewards:Scaled", broken="no_such_package:Reward", twice="a:B")
    (tmp_path / "typo.py").write_text("def f(:\n")
    (tmp_path / "mine.py").write_text(
        "NUMBER = 3\nclass NoCall: pass\ndef brightness(**columns): return []\ndef no_columns(images): return []\n"
    )
    with pytest.raises(ValueError, match=message):
        load_reward(spec.format(folder=tmp_path))


def test_a_name_registered_by_two_packages_is_refused(monkeypatch):
    points = EntryPoints(EntryPoint("same", target, loading.ENTRY_POINT_GROUP) for target in ("a:B", "c:D"))
    monkeypatch.setattr(loading, "entry_points", lambda *, group: points)
    with pytest.raises(ValueError, match="'same' is registered more than once: a:B, c:D"):
        load_reward("same")


@pytest.mark.parametrize(
    ("spec", "kwargs", "message"),
    [
        (Scaled, {"facto": 2}, r"'Scaled' refuses its reward_kwargs: .*'facto'; it takes \(factor: 'float' = 1.0\)"),
        (Scaled, {"factor": -1}, "'Scaled' cannot be made with {'factor': -1}: ValueError: factor must not"),
        (brightness, {"factor": 2}, r"'brightness' is not a class, so it takes no reward_kwargs \(given: factor\)"),
    ],
)
def test_kwargs_that_do_not_fit_are_refused(spec, kwargs, message):
    with pytest.raises(ValueError, match=message):
        load_reward(spec, **kwargs)


def test_the_library_never_imports_the_shipped_rewards_by_name():
    sources = (ROOT / "marval_rl").rglob("*.py")
    assert not [path for path in sources if re.search(r"^\s*(from|import) rewards\b", path.read_text(), re.MULTILINE)]
