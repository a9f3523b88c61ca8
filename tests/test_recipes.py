"""Recipes: YAML, then the command line; what is wrong is named together with its remedy."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml
from transformers import TrainingArguments
from trl import GRPOConfig

from marval_rl.errors import RecipeError
from marval_rl.recipes.reading import (
    build_configs,
    find_recipes,
    peek_setting,
    read_settings,
    resolved_recipe,
    save_recipe,
)
from marval_rl.recipes.unknown_settings import explain_trl_setting
from marval_rl.recipes.values import WrongType, convert, describe
from marval_rl.trainers.grpo import MARGRPOConfig


@dataclass
class Method:
    model: str
    method: Literal["grpo", "reward_backprop"] = "grpo"
    reward_funcs: list[str] = field(default_factory=lambda: ["classifier"])
    reward_weights: list[float] | None = None
    reward_kwargs: dict[str, Any] | None = None
    num_generations: int = field(default=8, metadata={"help": "Images per group."})
    share_noise: bool = True
    level: str = field(default="step", metadata={"choices": ["token", "step", "image"]})

    def __post_init__(self):
        if self.num_generations < 2:
            raise ValueError(f"num_generations must be at least 2, got {self.num_generations}")


@dataclass
class Training(TrainingArguments):
    learning_rate: float = field(default=2e-5, metadata={"help": "Another default than the parent's."})
    sigma: float = 0.1


class Colour(Enum):
    RED = "red"
    NO = "no"


@pytest.fixture
def write(tmp_path: Path):
    def write_recipe(text: str, name: str = "recipe.yaml") -> str:
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        return str(path)

    return write_recipe


def parse(path, *overrides, types=(Method,)):
    return build_configs(read_settings(path, overrides, types), types)


# precedence


def test_the_command_line_wins_over_yaml_and_yaml_over_defaults(write):
    path = write("model: student\nnum_generations: 4\nreward_weights: [1, 0.5]\n")
    (method,) = parse(path, "--num_generations", "6")
    assert (method.model, method.num_generations, method.level) == ("student", 6, "step")
    assert method.reward_weights == [1, 0.5]


def test_without_a_recipe_the_command_line_is_enough():
    (method,) = parse(None, "--model", "student", "--no_share_noise", "--reward_funcs", "clip", "my.py:redness")
    assert (method.share_noise, method.reward_funcs) == (False, ["clip", "my.py:redness"])


def test_both_spellings_of_an_option_and_equals_are_accepted():
    (method,) = parse(None, "--model=student", "--num-generations", "3", "--share_noise", "false")
    assert (method.model, method.num_generations, method.share_noise) == ("student", 3, False)


def test_keys_go_to_the_dataclass_that_has_them(write):
    path = write("model: student\nsigma: 0.2\noutput_dir: runs/a\nmax_steps: 7\n")
    method, training = parse(path, types=(Method, Training))
    assert (method.model, training.sigma, training.max_steps, training.learning_rate) == ("student", 0.2, 7, 2e-5)


def test_the_env_block_sets_environment_variables(write, monkeypatch):
    monkeypatch.setenv("MARVAL_TEST_VARIABLE", "before")
    parse(write("model: student\nenv:\n  MARVAL_TEST_VARIABLE: 3\n"))
    assert os.environ["MARVAL_TEST_VARIABLE"] == "3"


def test_peek_setting_reads_one_key_with_the_same_precedence(write):
    path = write("method: grpo\nmodel: student\n")
    assert peek_setting(path, ["--model", "other"], "method") == "grpo"
    assert peek_setting(path, ["--model", "other", "--method=reward_backprop"], "method") == "reward_backprop"
    assert peek_setting(None, [], "method") is None


# unknown keys


@pytest.mark.parametrize(
    ("text", "overrides", "expected"),
    [
        ("model: a\nnum_generation: 4\n", [], "unknown key 'num_generation'; did you mean num_generations"),
        ("model: a\nreward-funcs: [b]\n", [], "unknown key 'reward-funcs'; did you mean reward_funcs"),
        ("model: a\nzzz: 4\n", [], "unknown key 'zzz'"),
        ("model: a\n", ["--num_generation", "4"], "unknown option --num_generation; did you mean num_generations"),
        ("model: a\n", ["--metod=grpo"], "unknown option --metod; did you mean method"),
        ("model: a\n", ["--dryrun"], "unknown option --dryrun; did you mean dry_run"),
        ("model: a\n", ["--num_gen", "4"], "unknown option --num_gen"),  # no silent abbreviations
        ("model: a\n", ["grpo"], "unexpected argument 'grpo'"),
    ],
)
def test_an_unknown_key_is_answered_with_the_nearest_name(write, text, overrides, expected):
    with pytest.raises(RecipeError) as caught:
        parse(write(text), *overrides)
    assert expected in str(caught.value)


def test_a_setting_of_trl_is_explained(write):
    ours = MARGRPOConfig.__dataclass_fields__
    for name in sorted(set(GRPOConfig.__dataclass_fields__) - set(ours)):
        answer = explain_trl_setting(name, ours)
        assert answer and re.match(f"{name} is a setting of TRL(; here it is |, and has no meaning here: )", answer), (
            name
        )
    assert explain_trl_setting("num-generations", ours) is None and explain_trl_setting("zzz", ours) is None
    for text, overrides in (("model: a\nlog_completions: true\n", []), ("model: a\n", ["--log_completions"])):
        with pytest.raises(
            RecipeError, match="log_completions is a setting of TRL, and has no meaning here: images of "
        ):
            parse(write(text), *overrides)


def test_an_unknown_key_of_the_recipe_is_reported_with_its_file(write):
    path = write("model: a\nzzz: 4\n")
    with pytest.raises(RecipeError, match="zzz") as caught:
        parse(path)
    assert str(caught.value).startswith(path)
    assert "did you mean" not in str(caught.value)


# wrong types


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("max_steps: many", "max_steps: expected a whole number, got 'many'"),
        ("max_steps: 1.5", "max_steps: expected a whole number, got 1.5"),
        ("max_steps: true", "max_steps: expected a whole number, got True"),
        ("max_steps: null", "max_steps: expected a whole number, got null"),
        ("learning_rate: fast", "learning_rate: expected a number, got 'fast'"),
        ("bf16: maybe", "bf16: expected true or false, got 'maybe'"),
        ("method: ppo", "method: expected one of grpo, reward_backprop, got 'ppo'"),
        ("level: pixel", "level: expected one of token, step, image, got 'pixel'"),
        ("reward_funcs: {clip: 1}", "reward_funcs: expected a list, each element text, got {'clip': 1}"),
        ("reward_funcs: '[clip'", "reward_funcs: expected a list, written [a, b] or a,b; [] is the empty one"),
        ("reward_funcs: clip,", "reward_funcs: expected a list, written [a, b] or a,b; [] is the empty one"),
        ("reward_weights: 1 0.3", "a list, each element a number or null, written [a, b] or a,b, got '1 0.3'"),
        ("reward_weights: [1, heavy]", "reward_weights: expected a list, each element a number or null"),
        ("reward_kwargs: [1]", "reward_kwargs: expected a mapping"),
        ("model: 3", "model: expected text (write it in quotes), got 3"),
        ("model: ' '", "model: is empty"),
        ("model: off", "write it in quotes"),
        ("lr_scheduler_type: sideways", "lr_scheduler_type: expected one of linear, cosine"),
    ],
)
def test_a_wrong_type_names_key_value_and_expected_type(write, line, expected):
    key = line.split(":")[0]
    path = write(("" if key == "model" else "model: a\n") + line + "\n")
    with pytest.raises(RecipeError) as caught:
        parse(path, types=(Method, Training))
    assert expected in str(caught.value)
    assert str(caught.value).startswith(f"{path}: {key}: ")


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["--max_steps", "many"], "--max_steps: expected a whole number, got 'many'"),
        (["--learning_rate", "fast"], "--learning_rate: expected a number, got 'fast'"),
        (["--method", "ppo"], "--method: expected one of grpo, reward_backprop, got 'ppo'"),
        (["--reward_kwargs", "{broken"], "--reward_kwargs: expected a mapping"),
        (["--log_level", "loud"], "--log_level: expected one of"),
        (["--max_steps"], "--max_steps"),
    ],
)
def test_a_wrong_type_on_the_command_line_reads_the_same(overrides, expected):
    with pytest.raises(RecipeError) as caught:
        parse(None, "--model", "a", *overrides, types=(Method, Training))
    assert expected in str(caught.value)


def test_numbers_that_yaml_takes_for_strings_are_numbers(write):
    _, training = parse(write("model: a\nlearning_rate: 1e-4\nmax_steps: '12'\n"), types=(Method, Training))
    assert (training.learning_rate, training.max_steps) == (1e-4, 12)


def test_a_mapping_can_be_written_on_the_command_line():
    (method,) = parse(None, "--model", "a", "--reward_kwargs", '{"classifier": {"score": "accuracy"}}')
    assert method.reward_kwargs == {"classifier": {"score": "accuracy"}}


def test_none_on_the_command_line_resets_what_the_recipe_sets(write):
    (method,) = parse(write("model: a\nreward_kwargs: {clip: {}}\n"), "--reward_kwargs", "none")
    assert method.reward_kwargs is None


def test_a_bare_no_is_the_word_where_a_choice_has_it(write):
    _, training = parse(write("model: a\neval_strategy: no\nsave_strategy: no\n"), types=(Method, Training))
    assert (training.eval_strategy.value, training.save_strategy.value) == ("no", "no")


@pytest.mark.parametrize(
    ("value", "hint", "expected"),
    [
        (3, float, 3),
        ("1e-4", float | None, 1e-4),
        (None, int | None, None),
        ("None", int | None, None),
        ("none", str | None, "none"),
        ("yes", bool, True),
        ("red", Colour, "red"),
        (False, Colour | str, "no"),
        ("2", Literal[1, 2], 2),
        (["1", 2], list[int], [1, 2]),
        ("{a: 1}", dict[str, int], {"a": 1}),
        ("a", str | list[str], "a"),
        ("a", list[str], ["a"]),
        (1, list[float], [1]),
        ("1,0.3", list[float], [1.0, 0.3]),
        ("[1, 0.3]", list[float] | None, [1, 0.3]),
        ("[]", list[str], []),
        (["a,b"], list[str], ["a,b"]),  # a file's name may have a comma
        ("[a, b]", str | list[str] | None, ["a", "b"]),
        ("{a: 1e-6}", dict | str | None, {"a": 1e-6}),
        ("on", bool, True),
        (["a"], str | list[str], ["a"]),
        (object, Any, object),
    ],
)
def test_convert(value, hint, expected):
    converted = convert(value, hint)
    assert converted == expected and type(converted) is type(expected)


@pytest.mark.parametrize(
    ("value", "hint"),
    [(True, float), (1, bool), ("x", Colour | str), (True, Literal[1]), ({"a": "b"}, dict[str, int]), ({"a": 1}, list)],
)
def test_convert_refuses(value, hint):
    with pytest.raises(WrongType):
        convert(value, hint)


def test_describe_speaks_of_types_in_words():
    assert describe(list[int] | None) == "a list, each element a whole number or null"
    assert describe(Colour) == "one of red, no"


# files and constructors


def test_a_missing_file_suggests_the_recipes_near_it(write, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipes" / "digits").mkdir(parents=True)
    for name in ("teacher", "grpo"):
        (tmp_path / "recipes" / "digits" / f"{name}.yaml").write_text("model: a\n")
    with pytest.raises(RecipeError, match=r"no recipe at recipes/digits/techer.yaml; did you mean .*teacher.yaml"):
        parse("recipes/digits/techer.yaml")
    with pytest.raises(RecipeError, match=r"recipes here: .*grpo.yaml, .*teacher.yaml"):
        parse("zzz")
    assert find_recipes() == [Path("recipes/digits/grpo.yaml"), Path("recipes/digits/teacher.yaml")]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("- a\n- b\n", "a recipe is a mapping"),
        ("", "a recipe is a mapping"),
        ("model: [a\n", "is not valid YAML"),
        ("model: a\nenv: [A]\n", "env: expected a mapping"),
    ],
)
def test_a_file_that_is_not_a_recipe(write, text, expected):
    with pytest.raises(RecipeError, match=expected):
        parse(write(text))


def test_files_that_cannot_be_read(tmp_path):
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    for path in (tmp_path, tmp_path / "binary.yaml"):
        with pytest.raises(RecipeError, match="cannot read the recipe"):
            parse(path)


def test_an_error_of_a_constructor_is_a_recipe_error():
    with pytest.raises(RecipeError, match="num_generations must be at least 2, got 1"):
        parse(None, "--model", "a", "--num_generations", "1")


# the recipe of a run


def test_a_saved_recipe_builds_the_same_configuration(write, tmp_path):
    types = (Method, Training)
    path = write("model: a\nlearning_rate: 1e-4\nlr_scheduler_type: cosine\nreward_kwargs: {classifier: {score: x}}\n")
    overrides = ["--output_dir", str(tmp_path / "run"), "--max_steps", "3", "--no_share_noise", "--bf16", "false"]
    settings = read_settings(path, overrides, types)
    configs = build_configs(settings, types)
    saved = tmp_path / "run" / "recipe.yaml"
    save_recipe(saved, resolved_recipe(configs, settings))
    method, training = parse(saved, types=types)
    assert method == configs[0]
    assert training.to_dict() == configs[1].to_dict()
    assert training.lr_scheduler_type == "cosine" and training.max_steps == 3


def test_the_recipe_of_a_run_has_only_the_given_settings_and_our_own_fields(write, monkeypatch):
    monkeypatch.setenv("MARVAL_TEST_VARIABLE", "before")
    types = (Method, Training)
    path = write("model: a\nmax_steps: 3\nhub_token: secret\nenv: {MARVAL_TEST_VARIABLE: secret}\n")
    settings = read_settings(path, [], types)
    recipe = resolved_recipe(build_configs(settings, types), settings)
    ours = {"method", "reward_funcs", "reward_weights", "reward_kwargs", "num_generations", "share_noise", "level"}
    assert set(recipe) == {"model", "max_steps", "learning_rate", "sigma"} | ours
    assert list(recipe)[:2] == ["model", "max_steps"]
    assert yaml.safe_load(yaml.safe_dump(recipe)) == recipe
