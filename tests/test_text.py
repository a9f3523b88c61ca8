"""Text and paths as users write them: editors' byte order marks, YAML 1.2, keys that stand twice, ~ and variables."""

from __future__ import annotations

import argparse
import importlib
import os
from dataclasses import fields
from pathlib import Path
from typing import Any, get_type_hints

import pytest
import yaml

from marval_rl.cli import main as cli
from marval_rl.cli.cache import CacheArguments
from marval_rl.data.class_names import read_class_names
from marval_rl.errors import RecipeError
from marval_rl.evaluation.scored_images import read_prompts
from marval_rl.paths import SHIPPED_RECIPES, expand_path, expand_sure_paths, looks_like_hub_id
from marval_rl.recipes.data_arguments import DataArguments
from marval_rl.recipes.network_arguments import LoraArguments, ModelArguments, RewardArguments, TeacherArguments
from marval_rl.recipes.reading import PATH_SETTINGS, default_output_dir, read_settings, resolve_recipe
from marval_rl.rewarding import load_reward
from marval_rl.rewarding.arguments import parse_kwargs
from marval_rl.text import dump_yaml, load_yaml, read_text
from marval_rl.trainers.distill import DistillConfig
from marval_rl.trainers.grpo import MARGRPOConfig
from marval_rl.trainers.pretrain import PretrainConfig
from marval_rl.trainers.reward_backprop import RewardBackpropConfig

ARGUMENTS = (CacheArguments, DataArguments, LoraArguments, ModelArguments, RewardArguments, TeacherArguments)
CONFIGS = (DistillConfig, MARGRPOConfig, PretrainConfig, RewardBackpropConfig)
TRAINING = (DataArguments, RewardArguments, MARGRPOConfig)

# files


@pytest.mark.parametrize("content", [b"\xef\xbb\xbfcat\r\ndog\r\n", b"cat\ndog\n", b"\xef\xbb\xbfcat\rdog"])
def test_a_text_file_reads_alike_from_every_editor(tmp_path, content):
    file = tmp_path / "names.txt"
    file.write_bytes(content)
    assert read_text(file).split() == read_class_names(str(file)) == ["cat", "dog"]
    assert [prompt.prompt for prompt in read_prompts(file)] == ["cat", "dog"]


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "latin-1"])
def test_another_encoding_is_named_with_its_remedy(tmp_path, encoding):
    file = tmp_path / "a.yaml"
    file.write_bytes("run_name: gr\u00fcn\n".encode(encoding))
    with pytest.raises(RecipeError, match=rf"cannot read the recipe {file}: .*save it as UTF-8"):
        read_settings(file, [], TRAINING)
    with pytest.raises(ValueError, match="save it as UTF-8"):
        read_prompts(file)


def test_a_recipe_of_windows(tmp_path):
    file = tmp_path / "a.yaml"
    file.write_bytes(b"\xef\xbb\xbfmax_steps: 3\r\nreward_funcs: [clip]\r\n")
    assert read_settings(file, [], TRAINING) == {"max_steps": 3, "reward_funcs": ["clip"]}


# YAML


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-6", 1e-6),
        ("1E6", 1e6),
        ("-1.5e3", -1500.0),
        (".5", 0.5),
        ("1.", 1.0),
        ("1_000", 1000),
        ("010", 10),  # eight in YAML 1.1
        ("0x1f", 31),
        ("0o17", 15),
        ("-.inf", float("-inf")),
        ("1:30", "1:30"),  # ninety in YAML 1.1
        ("2026-01-31", "2026-01-31"),  # a date in YAML 1.1
        ("yes", True),
        ("off", False),
        ("~", None),
        ("1e", "1e"),
        ("1.2.3", "1.2.3"),
        ("e5", "e5"),
        ("'1e-6'", "1e-6"),
        ("{no: 1, on: 2, true: 3, 4: 5}", {"no": 1, "on": 2, True: 3, 4: 5}),
        ("{a: &x {b: 1, c: 2}, d: {<<: *x, b: 3}}", {"a": {"b": 1, "c": 2}, "d": {"b": 3, "c": 2}}),
    ],
)
def test_scalars_are_what_a_reader_takes_them_for(text, value):
    read = load_yaml(f"key: {text}\n")["key"]
    assert read == value and type(read) is type(value)
    assert load_yaml(dump_yaml({"key": value})) == {"key": value}
    assert not isinstance(value, str) or yaml.safe_load(dump_yaml({"key": value})) == {"key": value}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rate: 1\nseed: 1\nlearning_rate: 2\n", "'learning_rate' is written twice, in line 1 and in line 3"),
        ("reward_kwargs:\n  clip:\n    a: 1\n    'a': 2\n", "'a' is written twice, in line 3 and in line 4"),
        ("reward_funcs: [{b: 1, b: 2}]\n", "'b' is written twice, in line 1 and in line 1"),
        ("env:\n  A: 1\n  A: 1\n", "'A' is written twice, in line 2 and in line 3"),
        ("reward_kwargs:\n\tclip: 1\n", "indents with spaces, not tabs"),
        ("reward_kwargs: !!python/object/apply:os.getcwd []\n", "could not determine a constructor"),
    ],
)
def test_a_recipe_that_yaml_refuses(tmp_path, text, message):
    file = tmp_path / "a.yaml"
    file.write_text(text)
    with pytest.raises(RecipeError) as caught:
        read_settings(file, [], TRAINING)
    assert message in str(caught.value) and str(caught.value).startswith(f"{file} is not valid YAML")


def test_numbers_in_nested_mappings(tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text("lr_scheduler_kwargs: {min_lr: 1e-6}\nreward_kwargs: {mine.py:F: {scale: 9e1, on: [1e3]}}\n")
    read = read_settings(file, [], TRAINING)
    assert read["lr_scheduler_kwargs"] == {"min_lr": 1e-6}
    assert read["reward_kwargs"] == {"mine.py:F": {"scale": 90.0, "on": [1000.0]}}
    assert read_settings(None, ["--lr_scheduler_kwargs", "{min_lr: 1e-6}"], TRAINING) == {
        "lr_scheduler_kwargs": {"min_lr": 1e-6}
    }
    assert parse_kwargs("{scale: 9e1}") == parse_kwargs('{"scale": 9e1}') == {"scale": 90.0}
    with pytest.raises(ValueError, match="'a' is written twice"):
        parse_kwargs('{"a": 1, "a": 2}')


def test_the_environment_is_the_text_that_is_written(tmp_path, monkeypatch):
    values = {"A": "off", "B": "010", "C": "1e-6", "D": "1:30", "E": "null", "F": "true", "G": "0,1"}
    for name in values:
        monkeypatch.setenv(f"MARVAL_{name}", "before")
    file = tmp_path / "a.yaml"
    file.write_text("env:\n" + "".join(f"  MARVAL_{name}: {value}\n" for name, value in values.items()))
    read_settings(file, [], TRAINING)
    assert {name: os.environ[f"MARVAL_{name}"] for name in values} == values


@pytest.mark.parametrize(
    "words", [["1", "0.3"], ["[1,0.3]"], ["[1, 0.3]"], ["[1,", "0.3]"], ["1,0.3"], ["1,", "0.3"], ["1e0", "3e-1"]]
)
def test_lists_on_the_command_line(words):
    assert read_settings(None, ["--reward_weights", *words, "--max_steps", "3"], TRAINING)["reward_weights"] == [1, 0.3]


@pytest.mark.parametrize("words", [["clip", "jpeg"], ["[clip, jpeg]"], ["clip,jpeg"], ['["clip", "jpeg"]']])
def test_lists_of_text_on_the_command_line(words):
    assert read_settings(None, ["--reward_funcs", *words], TRAINING) == {"reward_funcs": ["clip", "jpeg"]}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--reward_weights", "[1,0.3"], r"--reward_weights: expected a list, written \[a, b\] or a,b"),
        (["--reward_weights", "1 x"], r"each element a number or null, written \[a, b\] or a,b, got '1 x'"),
        (["--reward_kwargs", "{a: 1, a: 2}"], "'a' is written twice, in line 1 and in line 1"),
        (["--reward_funcs", ""], r"--reward_funcs: expected a list, written \[a, b\] or a,b; \[\] is the empty one"),
        (["--model", ""], r"--model: is empty \(an unset variable of the shell\?\); write null to unset it"),
        (["--dataset", " "], "--dataset: is empty .*write null to unset it"),
        (["--output_dir", "runs/a\r"], "--output_dir: the path 'runs/a.r' begins or ends with white space"),
        (["--cache_dir", "a\tb"], "holds a tab"),
        (["--model", "~no-such-user/a"], "there is no user 'no-such-user'"),
        (["--vae", "$MARVAL_UNSET/vae"], "--vae: the path .* names the variable MARVAL_UNSET, which is not set"),
    ],
)
def test_values_that_cannot_be_meant_are_refused_with_a_remedy(words, message):
    with pytest.raises(RecipeError, match=message):
        read_settings(None, words, TRAINING)


# paths


@pytest.fixture
def home(tmp_path, monkeypatch) -> str:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("MARVAL_SCRATCH", f"{tmp_path}/scratch")
    return str(tmp_path)


def test_paths_are_expanded_as_a_shell_does(home):
    assert expand_path("~/a") == expand_path("$HOME/a") == expand_path("${HOME}/a") == f"{home}/a"
    assert expand_path("~root/a").startswith("/") and expand_path("~") == home
    for unchanged in ("org/name", "a/b~", "./~/a", "runs/a", "digits", "price$5", "local-dir:a"):
        assert expand_path(unchanged) == unchanged


def test_the_arguments_of_a_reward_are_expanded_only_where_they_must_be_paths(home):
    kwargs = {"weights": "~/a.pt", "model": "local-dir:$MARVAL_SCRATCH/clip", "more": [{"x": "${HOME}/b"}], "n": 1}
    expected = {
        "weights": f"{home}/a.pt",
        "model": f"local-dir:{home}/scratch/clip",
        "more": [{"x": f"{home}/b"}],
        "n": 1,
    }
    assert expand_sure_paths(kwargs) == expected
    for text in ("~ a cat ~", "~cat", "a $HOME", "cost: $5"):
        assert expand_sure_paths(text) == text
    Path(home, "mine.py").write_text(
        "class Mine:\n    def __init__(self, weights): self.weights = weights\n"
        "    def __call__(self, *, images, **columns): return [0.0] * len(images)\n"
    )
    assert load_reward("~/mine.py:Mine", weights="$HOME/w").weights == f"{home}/w"


@pytest.mark.parametrize("key", PATH_SETTINGS)
def test_a_path_means_the_same_in_a_recipe_and_on_the_command_line(home, tmp_path, key):
    types = (DataArguments, RewardArguments, TeacherArguments, MARGRPOConfig)
    for text, expected in (("~/a", f"{home}/a"), ("$MARVAL_SCRATCH/a", f"{home}/scratch/a"), ("b/c", "b/c")):
        recipe = tmp_path / "a.yaml"
        recipe.write_text(f"{key}: {text}\n")
        settings = [read_settings(recipe, [], types), read_settings(None, [f"--{key}={text}"], types)]
        assert settings == [{key: expected}] * 2


# Text settings that are not paths. A new setting of type text must be named here or in PATH_SETTINGS.
NO_PATHS = {
    *("class_groups", "image_column", "label_column", "judges"),  # names
    *("caption_column", "prompt_column", "prompt_split", "text_tower", "text_pretrained"),
    "distribution_column",
    *("eval_features", "distribution_features"),  # paths in them: `load_extractor`
    *("reward_funcs", "reward_kwargs", "eval_reward_funcs", "eval_reward_kwargs"),  # paths in them: `load_reward`
    *("prompt_template", "eval_guidance_schedule", "best_metric", "scale_rewards", "overwrite_output_dir"),
    *("lora_target", "lora_target_modules", "method", "model_size", "cache_dtype"),
    *("optim_args", "optim_target_modules", "activation_checkpointing_kwargs", "gradient_checkpointing_kwargs"),
    *("lr_scheduler_kwargs", "accelerator_config", "liger_kernel_config", "label_names", "include_for_metrics"),
    *("torch_compile_backend", "torch_compile_mode", "log_level", "log_level_replica", "report_to", "run_name"),
    *("project", "trackio_space_id", "trackio_bucket_id", "trackio_static_space_id", "hub_token", "hub_model_id"),
    *("hub_revision", "metric_for_best_model", "dataloader_multiprocessing_context", "train_sampling_strategy"),
    *("length_column_name", "ddp_backend", "fsdp", "debug", "include_num_input_tokens_seen", "optim"),
    *("lr_scheduler_type", "logging_strategy", "eval_strategy", "save_strategy", "hub_strategy"),
}


def test_no_setting_that_is_a_path_is_forgotten():
    unknown = set()
    for config in (*ARGUMENTS, *CONFIGS):
        hints = get_type_hints(config)
        for f in fields(config):
            named = f.name.endswith(("_dir", "_file", "_path", "_folder"))
            if named or (holds_text(hints[f.name]) and not f.metadata.get("choices")):
                unknown |= {f.name} - set(PATH_SETTINGS) - NO_PATHS
    assert not unknown, f"is it a path? name it in PATH_SETTINGS (recipes.py), or else in NO_PATHS here: {unknown}"


def holds_text(hint: Any) -> bool:
    return hint in (str, dict) or any(map(holds_text, getattr(hint, "__args__", ())))


# Options of commands that are text, and no paths.
NO_PATH_OPTIONS = {
    *("--eval_dataset", "--eval_holdout", "--image_column", "--label_column", "--eval_features", "--judges"),
    *("--eval_reference", "--eval_reference_images", "--prompts", "--eval_prompts"),  # expanded as settings
    *("--prompt", "--caption_column", "--prompt_column", "--prompt_split"),
    *("--main_process_ip", "--device", "--class_groups", "--prompt_template", "--classes", "--host", "--token"),
    *("--guidance_schedule", "--dtype", "--model_size", "--dataset", "--weights", "--reward_kwargs", "--rewards"),
}


def actions_of(parser: argparse.ArgumentParser):
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for child in action.choices.values():
                yield from actions_of(child)
        else:
            yield action


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_no_option_that_is_a_path_is_forgotten(name):
    parser = cli.CommandParser(prog=name)
    importlib.import_module(cli.COMMANDS[name].module).add_arguments(parser)
    for action in actions_of(parser):
        option = action.option_strings[0] if action.option_strings else action.dest
        is_text = action.nargs != 0 and action.type is None and option not in NO_PATH_OPTIONS
        # The recipe is looked for by `resolve_recipe`, --batch_sizes are numbers and --format is one of a few.
        assert not is_text or option in ("recipe", "--batch_sizes", "--format"), (name, option, "a path?")


def test_paths_of_commands_are_expanded(home, capsys):
    parser = cli.CommandParser()
    parser.add_argument("--output", type=Path)
    assert parser.parse_args(["--output=~/a.png"]).output == Path(home, "a.png")
    for given, message in (("", "is empty"), ("$MARVAL_UNSET/a", "names the variable MARVAL_UNSET")):
        assert cli.main(["sample", "runs/a", f"--output={given}"]) == 2
        assert message in capsys.readouterr().err


def test_a_hub_id_is_owner_and_name():
    assert looks_like_hub_id("owner/name") and looks_like_hub_id(Path("runs2/kl16"))
    local = ("kl16", "./kl16", "../kl16", "/kl16", "~/kl16", "a/b/c", "models/kl16", "runs/teacher", "")
    assert not any(map(looks_like_hub_id, local))


# recipes by name


def test_recipes_that_ship_are_found_by_name_and_local_ones_win(home, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shipped = str(SHIPPED_RECIPES / "digits" / "teacher.yaml")
    names = ("digits/teacher.yaml", "recipes/digits/teacher.yaml", "./recipes/digits/teacher.yaml")
    assert [resolve_recipe(name) for name in names] == [shipped] * 3
    assert {default_output_dir(resolve_recipe(name)) for name in names} == {"runs/digits/teacher"}
    assert default_output_dir("recipes/digits/teacher.yaml") == "runs/digits/teacher"
    for name in names[:2]:
        Path(name).parent.mkdir(parents=True)
        Path(name).write_text("max_steps: 3\n")
        assert resolve_recipe(name) == name
    assert resolve_recipe("~/digits/teacher.yaml") == f"{home}/digits/teacher.yaml"
    for name in ("../digits/teacher.yaml", "/digits/teacher.yaml", "digits", "__init__.py", "zzz.yaml"):
        assert resolve_recipe(name) == name


def test_an_unknown_recipe_is_answered_with_those_that_ship(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["pretrain", "digits/techer.yaml"]) == 2
    assert "did you mean digits/teacher.yaml" in capsys.readouterr().err
    assert cli.main(["pretrain", "zzz.yaml"]) == 2
    assert "shipped: backprop_pickscore.yaml, base.yaml, digits/distill.yaml" in capsys.readouterr().err
    assert cli.main(["pretrain", "digits/teacher.yaml", "--dry_run", "--use_cpu", "true"]) == 0
    printed = capsys.readouterr().out
    assert (
        f"recipe: {SHIPPED_RECIPES}/digits/teacher.yaml\n" in printed and "output_dir: runs/digits/teacher" in printed
    )
    assert not list(tmp_path.iterdir())
