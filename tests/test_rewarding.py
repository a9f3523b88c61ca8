"""The reward protocol: what can be loaded, what is summed, and how each breach of the contract is answered."""

from __future__ import annotations

import re
import tomllib
from importlib.metadata import EntryPoint, EntryPoints
from pathlib import Path

import pytest
import torch
import yaml

from marval_rl.errors import RewardError
from marval_rl.rewarding import RewardSet, list_rewards, load_reward, loading

ROOT = Path(__file__).parents[1]
BATCH = 3


def brightness(*, images, **columns):
    """Mean grey level."""
    return images.mean(dim=(1, 2, 3))


brightness.differentiable = True


def constant(value):
    """A reward that returns `value`, whatever the images."""

    def reward(*, images, **columns):
        return value

    return reward


class Scaled:
    """Mean grey level, times a factor."""

    differentiable = True

    def __init__(self, factor: float = 1.0) -> None:
        if factor < 0:
            raise ValueError("factor must not be negative")
        self.factor = factor

    def __call__(self, *, images, **columns):
        return self.factor * images.mean(dim=(1, 2, 3))


def batch(channels: int = 3) -> dict:
    grey = torch.tensor([0.0, 0.25, 1.0])
    return {
        "images": grey[:, None, None, None].expand(BATCH, channels, 8, 8).clone(),
        "prompts": ["a", "b", "c"],
        "class_labels": torch.tensor([0, 1, 2]),
        "class_names": ["zero", "one", "two"],
    }


@pytest.fixture
def registered(monkeypatch):
    """Stand-ins for the registered rewards."""

    def register(**targets: str) -> None:
        group = loading.ENTRY_POINT_GROUP
        points = EntryPoints(EntryPoint(name, target, group) for name, target in targets.items())
        monkeypatch.setattr(loading, "entry_points", lambda *, group: points.select(group=group))

    return register


# Finding a reward


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


def test_an_entry_point_by_its_name(registered):
    registered(scaled=f"{__name__}:Scaled")
    assert load_reward("scaled", factor=2.0).factor == 2.0


def test_the_shipped_rewards_are_registered():
    listing = {name: (target, description) for name, target, description in list_rewards()}
    assert listing["classifier"][0] == "rewards.classifier:Classifier"
    assert listing["classifier"][1].startswith("How well the image shows its class")
    assert listing["held_out_classifier"][0] == "rewards.classifier:HeldOutClassifier"


def test_the_list_survives_a_plug_in_that_cannot_be_imported(registered):
    registered(scaled=f"{__name__}:Scaled", broken="no_such_package:Reward")
    broken, scaled = list_rewards()
    assert broken[:2] == ("broken", "no_such_package:Reward") and "No module named 'no_such_package'" in broken[2]
    assert scaled == ("scaled", f"{__name__}:Scaled", "Mean grey level, times a factor.")


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
def test_a_spec_that_leads_nowhere_is_answered_clearly(spec, message, registered, tmp_path):
    registered(scaled=f"{__name__}:Scaled", broken="no_such_package:Reward", twice="a:B")
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
        (([Scaled], None, {"Scale": {}}), r"names 'Scale', which is no reward here \(Scaled\); did you mean Scaled\?"),
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
    ],
)
def test_numbers_of_every_kind_are_accepted(returned):
    assert RewardSet([constant(returned)]).score(**batch()).total.tolist() == [1.0, 2.0, 3.5]


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
        ({"score": 1.0}, "returned a dict"),
    ],
)
def test_what_is_no_score_is_refused(returned, message):
    with pytest.raises(RewardError, match=message):
        RewardSet([constant(returned)]).score(**batch())


def test_a_reward_that_raises_is_named_and_its_error_chained():
    def faulty(**columns):
        raise KeyError("lost")

    with pytest.raises(RewardError, match="reward 'faulty' raised KeyError: 'lost'") as caught:
        RewardSet([faulty]).score(**batch())
    assert isinstance(caught.value.__cause__, KeyError)


def test_ctrl_c_in_a_reward_is_not_swallowed():
    def interrupted(**columns):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        RewardSet([interrupted]).score(**batch())


def test_changing_the_images_in_place_is_refused():
    def vandal(*, images, **columns):
        return images.mul_(0.5).mean(dim=(1, 2, 3))

    with pytest.raises(RewardError, match="'vandal' changed the images in place"):
        RewardSet([vandal]).score(**batch())


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


def test_without_with_grad_nothing_is_recorded():
    given = batch()
    given["images"].requires_grad_()
    assert not RewardSet([brightness]).score(**given).total.requires_grad


def test_a_set_is_differentiable_if_all_its_rewards_are():
    assert RewardSet([brightness, Scaled]).differentiable
    assert not RewardSet([brightness, constant([0.0] * BATCH)]).differentiable


def test_gradients_through_a_reward_without_them_are_refused():
    given = batch()
    given["images"].requires_grad_()
    with pytest.raises(ValueError, match="reward 'reward' is not differentiable"):
        RewardSet([brightness, constant([0.0] * BATCH)]).score(**given, with_grad=True)


def test_a_false_claim_of_gradients_is_refused():
    def liar(*, images, **columns):
        return images.detach().mean(dim=(1, 2, 3))

    liar.differentiable = True
    given = batch()
    given["images"].requires_grad_()
    with pytest.raises(RewardError, match="'liar' declares itself differentiable, but no gradient leads"):
        RewardSet([liar]).score(**given, with_grad=True)


def test_gradients_to_images_that_want_none_are_refused():
    with pytest.raises(ValueError, match="images that require gradients"):
        RewardSet([brightness]).score(**batch(), with_grad=True)


# The documentation is run as it stands


def fenced(language: str) -> list[str]:
    """The code blocks of docs/rewards.md in one language."""
    text = (ROOT / "docs" / "rewards.md").read_text()
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def test_the_ten_line_plug_in_of_the_docs_runs_with_its_recipe(tmp_path, monkeypatch, registered):
    plug_in = fenced("python")[0]
    lines = [line for line in plug_in.splitlines() if line and not line.startswith("#")]
    assert len(lines) <= 10
    (tmp_path / "my_rewards.py").write_text(plug_in)
    monkeypatch.chdir(tmp_path)
    recipe = yaml.safe_load(fenced("yaml")[0])
    assert recipe.pop("eval_reward_funcs") == ["held_out_classifier"]
    # The classifier itself has tests of its own; here another class stands in for it.
    registered(classifier=f"{__name__}:Scaled")
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
    names = ["brightness", "bright_digits_only"]
    scores = RewardSet([f"{tmp_path}/functions.py:{name}" for name in names]).score(**batch())
    assert scores.components["brightness"].tolist() == [0.0, 0.25, 1.0]
    assert scores.components["bright_digits_only"].isnan().tolist() == [True, False, False]


def test_the_entry_point_group_of_the_docs_is_the_one_that_is_read():
    [snippet] = fenced("toml")
    assert list(tomllib.loads(snippet)["project"]["entry-points"]) == [loading.ENTRY_POINT_GROUP]


def test_the_library_never_imports_the_shipped_rewards_by_name():
    sources = (ROOT / "marval_rl").rglob("*.py")
    assert not [path for path in sources if re.search(r"^\s*(from|import) rewards\b", path.read_text(), re.MULTILINE)]


def test_a_parameter_of_another_name_is_a_column_of_the_data_set():
    def like_artist(images, artist, **columns):
        return [float(name == "Klee") for name in artist]

    rewards = RewardSet([like_artist])
    scores = rewards.score(**batch(), columns={"artist": ["Klee", "Marc", "Klee"]})
    assert scores.total.tolist() == [1.0, 0.0, 1.0]
    with pytest.raises(RewardError, match=r"'like_artist' raised TypeError: .*artist"):
        rewards.score(**batch())
