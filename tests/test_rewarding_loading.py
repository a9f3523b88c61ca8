"""Where a reward is found, and how a spec that leads nowhere is answered."""

from __future__ import annotations

import re
from importlib.metadata import EntryPoint, EntryPoints
from pathlib import Path

import pytest
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
        (brightness, {"factor": 2}, r"'brightness' is no class, so it takes no reward_kwargs \(given: factor\)"),
    ],
)
def test_kwargs_that_do_not_fit_are_refused(spec, kwargs, message):
    with pytest.raises(ValueError, match=message):
        load_reward(spec, **kwargs)


def test_the_library_never_imports_the_shipped_rewards_by_name():
    sources = (ROOT / "marval_rl").rglob("*.py")
    assert not [path for path in sources if re.search(r"^\s*(from|import) rewards\b", path.read_text(), re.MULTILINE)]
