"""What is installed: every package, and nothing at the top level but marval_rl."""

from __future__ import annotations

import tomllib
from importlib.resources import files
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SETUPTOOLS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]


def test_every_package_is_listed():
    mapped = {ROOT / folder: name for name, folder in SETUPTOOLS["package-dir"].items()}
    folders = [path.parent for path in (ROOT / "marval_rl").rglob("__init__.py")] + list(mapped)
    found = [mapped.get(folder) or ".".join(folder.relative_to(ROOT).parts) for folder in folders]
    assert SETUPTOOLS["packages"] == sorted(found)
    # A folder of modules without an __init__.py would be forgotten as well.
    assert {path.parent for path in (ROOT / "marval_rl").rglob("*.py")} <= set(folders)


@pytest.mark.parametrize(("package", "folder"), SETUPTOOLS["package-dir"].items())
def test_the_folders_are_imported_from_inside_marval_rl(package, folder):
    assert Path(str(files(package))) == ROOT / folder
