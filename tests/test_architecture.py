"""The rooms: imports point one way, every module is imported by something, and messages are plain English."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "marval_rl"
# What a room may import, besides itself and the modules beside the rooms (errors, paths, text, ...).
ALLOWED = {
    "losses": set(),
    "models": set(),
    "rewarding": {"losses"},
    "data": {"models"},
    "evaluation": {"data", "models", "rewarding"},
    "runtime": {"models"},
    "trainers": {"runtime", "losses", "models", "rewarding", "evaluation", "data"},
    "reporting": {"runtime"},
    "recipes": {"trainers", "runtime", "losses", "models", "rewarding", "evaluation", "data"},
    "benchmarks": {"trainers", "runtime", "models", "rewarding", "evaluation", "data"},
    "cli": {"benchmarks", "recipes", "trainers", "runtime", "models", "rewarding", "evaluation", "data", "reporting"},
    "rewards": {"rewarding", "data"},
}
STARTED = {"__main__", "rewarding.serving.server"}  # by `python -m`


def modules() -> Iterator[tuple[str, Path]]:
    """Each module's name below marval_rl, and its file."""
    for folder, prefix in ((PACKAGE, ()), (ROOT / "rewards", ("rewards",))):
        for path in sorted(folder.rglob("*.py")):
            parts = (*prefix, *path.relative_to(folder).with_suffix("").parts)
            if "environments" not in parts:
                yield ".".join(parts).removesuffix(".__init__"), path


def imports_of(name: str, path: Path) -> set[str]:
    """The names below marval_rl that a module imports; of `from a import b` both a and a.b."""
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ["marval_rl", *package[: len(package) - node.level + 1]] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            found |= {source, *(f"{source}.{alias.name}" for alias in node.names)}
    return {other.removeprefix("marval_rl.") for other in found if other.startswith("marval_rl.")}


def room_of(name: str) -> str | None:
    first = name.split(".")[0]
    return first if first in ALLOWED else None


MODULES = dict(modules())


@pytest.mark.parametrize("room", ALLOWED)
def test_no_import_runs_back_up(room):
    backwards = [
        f"{name} -> {other}"
        for name, path in MODULES.items()
        if room_of(name) == room
        for other in imports_of(name, path)
        if room_of(other) not in (None, room, *ALLOWED[room])
    ]
    assert backwards == []


def test_every_folder_is_a_room():
    folders = {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").exists()}
    assert folders | {"rewards"} == set(ALLOWED)


def test_no_module_is_dead():
    entry_points = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    commands = (PACKAGE / "cli" / "main.py").read_text(encoding="utf-8")
    imported = {other for name, path in MODULES.items() for other in imports_of(name, path) if other != name}
    dead = [
        name
        for name, path in MODULES.items()
        if path.name != "__init__.py"
        and name not in imported | STARTED
        and f"marval_rl.{name}:" not in entry_points
        and f'"marval_rl.{name}"' not in commands
    ]
    assert dead == []


def test_messages_and_docstrings_are_idiomatic():
    wrong = re.compile(
        r"\b(goes? on|hangs? on|anew|mends?|lacks?)\b|(?<![Tt]here )\b(is|are) no (?!guidance)\w+"
        r"|\bone \w+ a (class|line|token|step)\b"
    )
    texts = [
        (name, node.value)
        for name, path in MODULES.items()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ]
    assert len(texts) > 1000
    assert [(name, match[0]) for name, text in texts for match in wrong.finditer(text)] == []
