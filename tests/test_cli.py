"""The command line: finding commands, exit codes, one readable line per error; and commands that need no model."""

from __future__ import annotations

import argparse
import csv
import errno
import json
import os
import re
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from marval_rl import __version__
from marval_rl.cli import main as cli
from marval_rl.cli.arguments import add_recipe_arguments
from marval_rl.errors import CheckpointError, RecipeError
from marval_rl.evaluation.scored_images import read_image, read_prompts


@pytest.fixture
def command(monkeypatch):
    """Registers a command: `command(function, takes_recipe)` returns the list of (args, extra) that it is run with."""

    def register(function=lambda: None, takes_recipe: bool = False) -> list:
        module = types.ModuleType("fake_command", "A command for tests.")
        calls = []

        def add_arguments(parser: argparse.ArgumentParser) -> None:
            if takes_recipe:
                add_recipe_arguments(parser)
            else:
                parser.add_argument("--images", type=int, default=1)

        def run(args: argparse.Namespace, extra: list[str]) -> None:
            calls.append((args, extra))
            function()

        module.add_arguments, module.run = add_arguments, run
        monkeypatch.setitem(sys.modules, "fake_command", module)
        monkeypatch.setitem(cli.COMMANDS, "fake", cli.Command("fake_command", "for tests", takes_recipe))
        return calls

    return register


def raiser(error: BaseException):
    def raise_it() -> None:
        raise error

    return raise_it


def error_line(capsys) -> str:
    """The one line on stderr."""
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    return lines[0]


# finding the command


def test_help_and_version_do_not_import_torch():
    script = (
        "import sys; from marval_rl.cli.main import main; codes = main(['--help']), main(['--version']);"
        "sys.exit(codes != (0, 0) or bool({'torch', 'transformers', 'trl'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stdout + result.stderr
    assert __version__ in result.stdout
    assert all(f"  {name} " in result.stdout for name in cli.COMMANDS)


def test_the_module_runs_and_returns_the_exit_code():
    result = subprocess.run([sys.executable, "-m", "marval_rl", "trian"], capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == "marval-rl: error: unknown command 'trian'; did you mean train or pretrain?\n"


def test_the_overview_is_shown_where_no_command_is_given(capsys):
    assert cli.main([]) == 2
    assert "commands:" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("--verison", "unrecognized arguments: --verison"),
        # An option of a nested command is suggested before a missing one is named.
        ("rewards score classifier --imges x", "unknown option '--imges'; did you mean --images"),
        ("report no/such/run", "no/such/run is not a run: there is no such folder"),
    ],
)
def test_a_wrong_command_line_is_refused(capsys, arguments, expected):
    assert cli.main(arguments.split()) == 2
    assert expected in error_line(capsys)


def test_a_command_gets_its_arguments_and_its_own_help(command, capsys):
    calls = command()
    assert cli.main(["fake", "--images", "3"]) == 0
    assert (calls[0][0].images, calls[0][1]) == (3, [])
    assert cli.main(["fake", "--help"]) == 0
    printed = capsys.readouterr().out
    assert "A command for tests." in printed and "--images" in printed and "--debug" in printed


@pytest.mark.parametrize("name", list(cli.COMMANDS))
def test_every_command_explains_itself(name, capsys):
    assert cli.main([name, "--help"]) == 0
    assert f"usage: marval-rl {name} " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--imags", "3"], "unknown option '--imags'; did you mean --images?"),
        (["--image=3"], "unknown option '--image'; did you mean --images?"),  # no silent abbreviations
        (["--zzz"], "unknown option '--zzz' (see marval-rl fake --help)"),
        (["stray"], "unexpected argument 'stray' (see marval-rl fake --help)"),
        (["--images", "many"], "argument --images: invalid int value: 'many' (see marval-rl fake --help)"),
    ],
)
def test_arguments_that_a_command_does_not_know(command, capsys, arguments, expected):
    calls = command()
    assert cli.main(["fake", *arguments]) == 2
    assert error_line(capsys) == f"marval-rl: error: {expected}"
    assert not calls


# recipes


def test_what_follows_a_recipe_is_handed_on(command):
    calls = command(takes_recipe=True)
    assert cli.main(["fake", "a.yaml", "--dry_run", "--max_steps", "3", "--bf16", "--resume", "--debug"]) == 0
    assert cli.main(["fake", "a.yaml", "--resume", "runs/a/checkpoint-3"]) == 0
    assert cli.main(["fake", "--dry_run", "a.yaml", "--max_steps", "3"]) == 0  # our own options may come first
    assert [(args.recipe, args.dry_run, args.resume, extra) for args, extra in calls] == [
        ("a.yaml", True, "latest", ["--max_steps", "3", "--bf16"]),
        ("a.yaml", False, "runs/a/checkpoint-3", []),
        ("a.yaml", True, None, ["--max_steps", "3"]),
    ]


def test_a_missing_recipe_is_answered_with_those_that_exist(command, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    calls = command(takes_recipe=True)
    assert cli.main(["fake"]) == 2
    line = error_line(capsys)
    assert "fake needs a recipe: marval-rl fake RECIPE.yaml [--key value ...]; shipped: " in line
    assert "digits/teacher.yaml" in line and "accelerate" not in line
    Path("recipes").mkdir()
    Path("recipes/a.yaml").write_text("max_steps: 3\n")
    assert cli.main(["fake", "--max_steps"]) == 2
    assert "; recipes here: recipes/a.yaml; shipped: " in error_line(capsys)
    assert not calls


@pytest.mark.parametrize("before", [["--max_steps", "3"], ["--dry_run", "--max_steps", "3"]])
def test_a_setting_before_the_recipe_does_not_pass_its_value_for_the_recipe(command, capsys, before):
    calls = command(takes_recipe=True)
    assert cli.main(["fake", *before, "a.yaml"]) == 2
    assert "the recipe comes first: marval-rl fake RECIPE.yaml --max_steps" in error_line(capsys)
    assert not calls


# errors

AGAIN = "(run again with --debug for the traceback)"


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (RecipeError("unknown key 'a'"), 2, "unknown key 'a'"),
        (CheckpointError("model.safetensors is truncated"), 1, "model.safetensors is truncated"),
        (ValueError("class 12 is out of range"), 2, "class 12 is out of range"),
        (ValueError("two\n  lines"), 2, "two lines"),
        (FileNotFoundError(errno.ENOENT, "No such file", "a.yaml"), 1, "a.yaml: No such file"),
        (PermissionError(errno.EACCES, "Permission denied", "runs/a"), 1, "runs/a: Permission denied"),
        (OSError(errno.ENOSPC, "No space left on device", "a", None, "b"), 1, "a -> b: No space left on device"),
        (OSError(errno.ENOSPC, "No space left on device"), 1, "No space left on device"),
        (OSError("no model of that name"), 1, "no model of that name"),
        (BrokenPipeError(errno.EPIPE, "Broken pipe"), 1, "Broken pipe"),  # another than that of our reader
        (KeyboardInterrupt(), 130, "interrupted"),
        (RuntimeError("shapes differ"), 1, f"unexpected error: RuntimeError: shapes differ {AGAIN}"),
        (AssertionError(), 1, f"unexpected error: AssertionError {AGAIN}"),
    ],
)
def test_an_error_is_one_line_and_an_exit_code(command, capsys, error, code, message):
    command(raiser(error))
    assert cli.main(["fake"]) == code
    assert error_line(capsys) == f"marval-rl: error: {message}"


@pytest.mark.parametrize("argv", [["--debug", "fake"], ["fake", "--debug"]])
def test_debug_shows_the_traceback_and_keeps_the_exit_code(command, capsys, argv):
    command(raiser(ValueError("class 12 is out of range")))
    assert cli.main(argv) == 2
    shown = capsys.readouterr().err
    assert "Traceback" in shown and "raise_it" in shown
    assert shown.splitlines()[-1] == "marval-rl: error: class 12 is out of range"


# env and report


def test_env_prints_a_markdown_table(capsys):
    assert cli.main(["env"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == ["| what | value |", "|---|---|"]
    rows = {name.strip(): value.strip() for _, name, value, _ in (line.split("|") for line in lines[2:])}
    assert rows["marval_rl"] == __version__
    assert {"python", "torch", "transformers", "trl", "accelerate", "datasets"} <= rows.keys()
    assert {"torch threads", "CPU cores"} <= rows.keys()


def test_env_survives_a_broken_torch(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch", None)  # an import of it raises ImportError
    assert cli.main(["env"]) == 0
    assert "| torch | cannot be imported" in capsys.readouterr().out


def make_run(folder: Path) -> Path:
    folder.mkdir()
    lines = [{"step": step, "time": float(step), "loss": 1 / step, "learning_rate": 1e-3} for step in (1, 2, 3)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "recipe.yaml").write_text("max_steps: 3\n")
    return folder


def test_report_writes_a_page_into_the_run_or_to_the_given_output(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first, second = make_run(tmp_path / "first"), make_run(tmp_path / "second")
    assert cli.main(["report", str(first)]) == 0
    assert cli.main(["report", str(first), str(second)]) == 0
    assert cli.main(["report", str(first), "--output", "page.html"]) == 0
    assert all(Path(page).is_file() for page in ("first/report.html", "report.html", "page.html"))
    assert capsys.readouterr().out.splitlines()[-1] == "report: page.html"


# rewards

REWARDS = '''
"""Rewards for tests."""

class Brightness:
    def __init__(self, factor: float = 1.0):
        self.factor = factor

    def __call__(self, images, **columns):
        return [self.factor * float(image.mean()) for image in images]

def known_labels(images, class_labels, class_names, prompts, **columns):
    assert class_names == ["zero", "a one"] and prompts == ["a nought", "a one"]
    assert columns["artist"] == ["ann", "bob"]
    return [None if label < 0 else float(label) for label in class_labels.tolist()]

def broken(images, **columns):
    raise RuntimeError("no weights")
'''


@pytest.fixture
def gallery(tmp_path: Path, monkeypatch) -> Path:
    """A folder with two images of different size and mode, white and black, a prompts file and rewards."""
    monkeypatch.chdir(tmp_path)
    Path("images").mkdir()
    Image.new("L", (8, 8), 255).save("images/a.png")
    Image.new("RGB", (6, 4), (0, 0, 0)).save("images/b.jpg")
    Path("images/notes.txt").write_text("no image")
    Path("prompts.txt").write_text("zero\none\n\n")
    Path("mine.py").write_text(REWARDS)
    return tmp_path


def score(spec: str, *arguments: str) -> int:
    """Scores images/ by prompts.txt; arguments win."""
    return cli.main(["rewards", "score", spec, "--images", "images", "--prompts", "prompts.txt", *arguments])


def test_rewards_list_shows_those_we_ship(capsys):
    assert cli.main(["rewards", "list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:2] == ["name", "target"]
    assert [line.split()[:2] for line in lines if line.startswith("held_out")] == [
        ["held_out_classifier", "marval_rl.rewards.classifier:HeldOutClassifier"]
    ]


def test_score_prints_and_saves_what_the_reward_says(gallery, capsys):
    assert score("mine.py:Brightness", "--reward_kwargs", '{"factor": 2}', "--output", "scores.csv") == 0
    *rows, summary = capsys.readouterr().out.splitlines()[:3]
    assert [row.split() for row in rows] == [["a.png", "2.0000", "zero"], ["b.jpg", "0.0000", "one"]]
    assert summary == "Brightness: mean 1.0000, standard deviation 1.0000, 2 scored, 0 left out"
    saved = [["image", "prompt", "score"], ["a.png", "zero", "2.0"], ["b.jpg", "one", "0.0"]]
    assert list(csv.reader(Path("scores.csv").read_text().splitlines())) == saved


def test_score_hands_on_labels_and_columns_and_leaves_out_none(gallery, capsys):
    Path("prompts.txt").write_text(
        '{"prompt": "a nought", "class_name": "zero", "class_label": 4, "artist": "ann"}\n'
        '{"prompt": "a one", "artist": "bob"}\n'
    )
    Image.new("RGB", (8, 8)).save("images/b.jpg")  # one batch
    assert score("mine.py:known_labels", "--output", "scores.json") == 0
    assert [row["score"] for row in json.loads(Path("scores.json").read_text())] == [4.0, None]
    assert "left out  a one" in capsys.readouterr().out


def test_a_corrupt_image_is_named(gallery, capsys):
    whole = Path("images/a.png").read_bytes()
    for content in (b"not an image", whole[:40]):
        Path("images/a.png").write_bytes(content)
        assert score("mine.py:Brightness") == 2
        assert "cannot read the image images/a.png: " in error_line(capsys)


@pytest.mark.parametrize(
    ("arguments", "code", "expected"),
    [
        ("mine.py:Brightness --prompts missing.txt", 1, "missing.txt: No such file or directory"),
        ("mine.py:broken", 1, "raised RuntimeError: no weights (images a.png to a.png)"),
        ("clasifier", 2, "classifier"),
        ("mine.py:Brightness --prompts long.txt", 2, "images holds 2 images, but long.txt has 3 lines"),
        ("mine.py:Brightness --output a.txt", 2, "must end in .csv or .json"),
        ("mine.py:Brightness --reward_kwargs {", 2, "must be a mapping"),
        ("mine.py:Brightness --reward_kwargs []", 2, "must be a mapping"),
        ("mine.py:Brightness --images empty", 2, "empty holds no image"),
    ],
)
def test_score_names_the_error(gallery, capsys, arguments, code, expected):
    Path("long.txt").write_text("zero\none\ntwo\n")
    Path("empty").mkdir()
    assert score(*arguments.split()) == code
    assert expected in error_line(capsys)


def test_read_image_gives_three_channels_in_unit_range(gallery):
    image = read_image(Path("images/a.png"))
    assert image.shape == (3, 8, 8) and image.min() == image.max() == 1
    Image.fromarray(np.full((4, 4), 257 * 100, np.uint16)).save("images/deep.png")
    deep = read_image(Path("images/deep.png"))
    assert deep.shape == (3, 4, 4) and deep.mul(255).round().unique().tolist() == [100]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("zero\n\none\n", "line 2: is empty"),
        ('{"prompt": "zero"}\n{"prompt"\n', "line 2: is not valid JSON"),
        ('{"prompt": "zero"}\none\n', "line 2: is not valid JSON"),
        ('{"label": 3}\n', 'line 1: expected a JSON object with "prompt" or "class_name"'),
        ('{"prompt": 3}\n', "line 1: prompt and class_name must be text, got 3 and 3"),
        ('{"prompt": "zero", "class_label": "3"}\n', "line 1: class_label must be a whole number, got '3'"),
        ('{"prompt": "a", "artist": 1}\n{"prompt": "b"}\n', "line 2: has the columns"),
    ],
)
def test_a_line_of_the_prompts_file_that_is_wrong_is_named(tmp_path, text, expected):
    (tmp_path / "prompts.txt").write_text(text)
    with pytest.raises(ValueError, match=re.escape(expected)):
        read_prompts(tmp_path / "prompts.txt")


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_reader_that_goes_away_ends_a_command_silently(unbuffered):
    reader, writer = os.pipe()
    os.close(reader)  # as `| head` does once it has seen enough
    environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    command = [sys.executable, "-m", "marval_rl", "env"]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, env=environment)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, "")
