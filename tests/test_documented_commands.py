"""Every command and code block of README.md and docs/ works as typed, on a machine without a GPU.

Blocks of a shell are run by bash with stand-ins for all programs, which note how they were called; each call is then
checked as far as it can be without the published weights: training is planned (`--dry_run`), other commands are parsed.
Blocks of Python are run, with a tiny student where they name one and a single step where they train. Of those that need
data that are not here (`/data/...`) only the imports are run. Of YAML each key must be a setting; a recipe is planned.
Blocks of text are output, and directives (`{options}`, `{toctree}`) are run by tests/test_docs_site.py.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch.distributed.run
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from tiny_models import tiny_student

from marval_rl.cli import processes
from marval_rl.cli.main import COMMANDS, main
from marval_rl.recipes.data_arguments import DataArguments
from marval_rl.recipes.network_arguments import LoraArguments, RewardArguments, TeacherArguments
from marval_rl.recipes.planning import memory
from marval_rl.runtime.settings import defaults_of
from marval_rl.trainers import arguments
from marval_rl.trainers.grpo_config import MARGRPOConfig

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
SHELL, OTHER = ("bash", "console"), ("python", "yaml", "toml", "json", "text")  # tags of code blocks
# `--seed S` and the like stand for the reader's own values.
PLACEHOLDERS = {"S": "0", "W": "3", "K": "4", "...": "runs/x", "base|large|huge": "huge"}
RECIPES = {"pretrain": "digits/teacher", "distill": "digits/distill", "train": "digits/grpo", "cache": "base"}
SLURM = {"SLURM_NNODES": "2", "SLURM_NODEID": "1", "SLURM_JOB_NODELIST": "node[1-2]"}

NOTE = """#!/bin/bash
printf '%s\\0' "$(basename "$0")" "$@" "" >> "$CALLS"
"""
STAND_INS = {
    **dict.fromkeys(["marval-rl", "python", "pip", "make", "accelerate", "torchrun"], NOTE),
    "scontrol": "#!/bin/bash\necho node1; echo node2\n",
    "srun": '#!/bin/bash\nwhile [[ $1 == -* ]]; do shift; done\nexec "$@"\n',
}
UNKNOWN = 'command_not_found_handle() { printf "%s\\0" "$@" "" >> "$CALLS"; }; export -f command_not_found_handle\n'


def blocks(page: Path) -> Iterator[tuple[str, str]]:
    """(tag, text) of each code block."""
    for match in re.finditer(r"^```(.*?)\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL):
        yield match[1], match[2]


def calls_of(script: str, folder: Path) -> list[list[str]]:
    """The programs that a shell script calls, with their arguments."""
    programs, calls = folder / "programs", folder / "calls"
    shutil.rmtree(programs, ignore_errors=True)
    calls.unlink(missing_ok=True)
    for path in (programs, folder / "there" / "bin"):  # docs/remote_rewards.md makes an environment `there`
        path.mkdir(parents=True, exist_ok=True)
        for name, text in STAND_INS.items():
            (path / name).write_text(text)
            (path / name).chmod(0o755)
    for name in ("bash", "basename", "head", "ls", "grep"):
        (programs / name).symlink_to(shutil.which(name))
    done = subprocess.run(
        [programs / "bash", "-c", UNKNOWN + script],
        cwd=folder,
        env={"PATH": str(programs), "CALLS": str(calls), **SLURM},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stderr == "", script
    words = calls.read_text().split("\0") if calls.exists() else []
    found: list[list[str]] = [[]]
    for word in words:
        if word:
            found[-1].append(PLACEHOLDERS.get(word, word))
        else:
            found.append([])
    return [call for call in found if call]


def commands_in(page: Path, folder: Path) -> list[list[str]]:
    """The calls of a page's shell blocks, and those in its prose that are complete commands."""
    found = []
    for tag, text in blocks(page):
        if tag.startswith("{"):
            continue
        assert tag in (*SHELL, *OTHER), f"{page.name}: a code block is tagged {tag!r}, not one of {SHELL} or {OTHER}"
        if tag == "console":
            text = "\n".join(line.removeprefix("$ ") for line in text.splitlines() if line.startswith("$ "))
        if tag in SHELL:
            calls = calls_of(text, folder)
            assert calls, f"{page.name}: a shell block without a command:\n{text}"
            found += calls
    for span in re.findall(r"`((?:marval-rl|python|pip|make|accelerate|torchrun) [^`]+)`", page.read_text()):
        words = shlex.split(span)
        if len(words) > (3 if "rewards" in words else 2) and not any("..." in word for word in words):
            words = [PLACEHOLDERS.get(word, word) for word in words]
            found.append([f"recipes/{RECIPES[words[1]]}.yaml" if word == "RECIPE" else word for word in words])
    return found


class Parsed(Exception):
    """A program has understood its arguments."""


class Checker:
    """Checks one call: `checker(words)`. The method's name is the program's; a program without one fails."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
        self.monkeypatch, self.capsys = monkeypatch, capsys

    def __call__(self, words: list[str]) -> None:
        checks: dict[str, Callable[[list[str]], None]] = {
            "marval-rl": self.marval_rl,
            "python": self.python,
            "pip": self.pip,
            "make": self.make,
            "accelerate": self.accelerate,
            "torchrun": self.torchrun,
        }
        assert words[0] in checks, f"how is {shlex.join(words)!r} to be checked?"
        for word in words[1:]:
            if word.startswith(("recipes/", "examples/", "docs/", "tests/")):
                assert (ROOT / word).exists(), f"{word}, of {shlex.join(words)!r}"
        checks[words[0]](words[1:])

    def marval_rl(self, words: list[str]) -> None:
        name = words[0]
        with self.monkeypatch.context() as patch:
            if name in RECIPES and "--verify" not in words:
                words = [*words, "--dry_run"]
            else:
                patch.setattr(importlib.import_module(COMMANDS[name].module), "run", lambda args, extra: None)
                patch.setattr(processes, "run_processes", lambda launch, arguments: main(arguments))
            assert main(words) == 0, (shlex.join(words), self.capsys.readouterr().err)
        output = self.capsys.readouterr().out
        if COMMANDS[name].can_launch and COMMANDS[name].takes_recipe:
            number = words[words.index("--num_processes") + 1] if "--num_processes" in words else None
            number = number or os.environ.get("WORLD_SIZE", "1")
            assert f"planned for {number} process" in output and "nothing was trained" in output

    def python(self, words: list[str]) -> None:
        if words[:2] == ["-m", "venv"]:
            return
        if words[0] == "-m":
            module, words = importlib.import_module(words[1]), words[2:]
        else:
            specification = importlib.util.spec_from_file_location("script", ROOT / words[0])
            module, words = importlib.util.module_from_spec(specification), words[1:]
            with self.monkeypatch.context() as patch:
                patch.syspath_prepend(ROOT / "tests")
                patch.syspath_prepend(Path(specification.origin).parent)  # as Python does with a script's folder
                patch.setitem(sys.modules, "script", module)
                specification.loader.exec_module(module)
        if "argparse" not in vars(module):
            assert not words
            return

        def parse(parser: argparse.ArgumentParser, *args: Any, **kwargs: Any) -> None:
            parser.parse_known_args, given = None, real(parser, *args, **kwargs)
            assert not given[1], f"unknown: {given[1]}"
            raise Parsed

        real = argparse.ArgumentParser.parse_known_args
        with self.monkeypatch.context() as patch:
            patch.setattr(sys, "argv", ["program", *words])
            patch.setattr(argparse.ArgumentParser, "parse_args", parse)
            with pytest.raises(Parsed):
                module.main()

    def pip(self, words: list[str]) -> None:
        assert words[0] == "install"
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        for word in words[1:]:
            match = re.fullmatch(r"(?:\.|marval-rl)\[(.+)\]", word)
            assert match is None or set(match[1].split(",")) <= set(extras), word

    def make(self, words: list[str]) -> None:
        targets = re.findall(r"^(\S+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert words and set(words) <= set(targets)

    def accelerate(self, words: list[str]) -> None:
        assert words[0] == "launch"
        given = launch_command_parser().parse_args(words[1:])
        config = load_config_from_file(given.config_file)
        assert given.module and given.training_script == "marval_rl"
        self.launched(config.num_processes, given.training_script_args, config.mixed_precision)

    def torchrun(self, words: list[str]) -> None:
        given = torch.distributed.run.get_args_parser().parse_args(words)
        assert given.module and given.training_script == "marval_rl"
        self.launched(int(given.nproc_per_node) * int(given.nnodes), given.training_script_args)

    def launched(self, num_processes: int, words: list[str], precision: str = "no") -> None:
        with self.monkeypatch.context() as patch:
            for name, value in {"WORLD_SIZE": num_processes, "RANK": 0, "LOCAL_RANK": 0}.items():
                patch.setenv(name, str(value))
            patch.setenv("ACCELERATE_MIXED_PRECISION", precision)
            self.marval_rl(words)


@pytest.fixture
def check(monkeypatch, capsys, tmp_path) -> Checker:
    """In a folder that holds the repository's recipes and examples, without a GPU. Activations take seconds to count,
    and are those of the recipes that tests/test_planning.py counts."""
    for name in ("recipes", "examples"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(arguments, "accelerator_here", lambda: None)
    monkeypatch.setattr(memory, "activations_of", lambda *_: 0)
    return Checker(monkeypatch, capsys)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_commands_of_a_page_work_as_typed(page, check, tmp_path):
    for words in commands_in(page, tmp_path):
        check(words)


PYTHON = [page for page in PAGES if any(tag == "python" for tag, _ in blocks(page))]
YAML = [page for page in PAGES if any(tag == "yaml" for tag, _ in blocks(page))]


@pytest.mark.parametrize("page", PYTHON, ids=lambda page: page.name)
def test_the_python_of_a_page_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = ["even digit", "odd digit"]
    student = tiny_student(image_size=8, num_classes=2, class_names=names)
    for name in ("distill", "grpo"):
        student.save_pretrained(tmp_path / "runs" / "digits" / name / "final")
    space: dict[str, Any] = {}
    for tag, text in blocks(page):
        if tag != "python":
            continue
        tree = ast.parse(text)
        if "/data/" in text:
            tree.body = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
        else:
            text = text.replace("MARGRPOConfig(", 'MARGRPOConfig(max_steps=1, eval_strategy="no", ', 1)
            tree = ast.parse(text)
        exec(compile(tree, page.name, "exec"), space)


@pytest.mark.parametrize("page", YAML, ids=lambda page: page.name)
def test_the_settings_of_a_page_exist_and_its_recipes_can_be_planned(page, check, tmp_path):
    known = defaults_of([MARGRPOConfig, DataArguments, RewardArguments, TeacherArguments, LoraArguments])
    for tag, text in blocks(page):
        if tag != "yaml":
            continue
        settings = yaml.safe_load(text)
        assert set(settings) <= set(known), text
        if "method" in settings:
            recipe = yaml.safe_load((ROOT / "recipes" / "digits" / f"{settings['method']}.yaml").read_text())
            (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe | settings))
            check(["marval-rl", "train", "recipe.yaml"])


def test_a_command_that_nobody_can_check_fails_and_so_does_a_wrong_one(check, tmp_path):
    (tmp_path / "page.md").write_text(
        "```bash\nmarval-rl env && uv sync --all\nmarval-rl train recipes/none.yaml\n```\n"
    )
    known, unknown, wrong = commands_in(tmp_path / "page.md", tmp_path)
    check(known)
    with pytest.raises(AssertionError, match="how is 'uv sync --all' to be checked"):
        check(unknown)
    with pytest.raises(AssertionError, match=r"recipes/none.yaml"):
        check(wrong)
    (tmp_path / "page.md").write_text("```\nmarval-rl env\n```\n")
    with pytest.raises(AssertionError, match="a code block is tagged ''"):
        commands_in(tmp_path / "page.md", tmp_path)
