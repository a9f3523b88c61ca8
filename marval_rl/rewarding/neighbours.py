"""What a reward file may import from its own folder, without a trace in how the rest of the process imports."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any


def folder_package(folder: Path) -> str:
    """The name of a package that stands for a folder, so that `from .helpers import x` works in a file in it.

    The name is unique: a reward file must neither shadow nor be shadowed by an installed module.
    """
    name = f"marval_rl_reward_folder_{hashlib.sha256(str(folder).encode()).hexdigest()[:12]}"
    if name not in sys.modules:
        package = ModuleType(name, f"The reward files of {folder}.")
        package.__path__ = [str(folder)]
        sys.modules[name] = package
    return name


@contextmanager
def neighbours_of(spec: Any) -> Iterator[None]:
    """Lets `import helpers` find helpers.py beside the reward file of a spec such as path/file.py:attribute.

    Only until the reward is made, and each folder has its own `helpers`. A name of the standard library or of an
    installed package means that one, whatever lies in the folder. Other specs change nothing.
    """
    source = spec.rpartition(":")[0] if isinstance(spec, str) else ""
    if not source.endswith(".py"):
        yield
        return
    folder = Path(source).resolve().parent
    names = _top_level_names(folder)
    finder = _FolderFinder(folder, names)
    outside = _take_modules(names)
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        _take_modules(names)
        sys.modules.update(outside)


class _FolderFinder:
    """Finds modules of these names in one folder."""

    def __init__(self, folder: Path, names: set[str]):
        self.folder = folder
        self.names = names

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: Any = None) -> ModuleSpec | None:
        return PathFinder.find_spec(name, [str(self.folder)]) if path is None and name in self.names else None


def _top_level_names(folder: Path) -> set[str]:
    """What can be imported from a folder, less what is built in or installed."""
    if not folder.is_dir():
        return set()
    found = {entry.stem for entry in folder.iterdir() if entry.suffix == ".py" or (entry / "__init__.py").is_file()}
    installed = [entry for entry in sys.path if Path(entry).name in ("site-packages", "dist-packages")]
    return {name for name in found - set(sys.stdlib_module_names) if PathFinder.find_spec(name, installed) is None} - {
        __package__.partition(".")[0]
    }


def _take_modules(names: set[str]) -> dict[str, ModuleType]:
    """Takes the modules of these names, and those inside them, out of sys.modules."""
    taken = [name for name in sys.modules if name.partition(".")[0] in names]
    return {name: sys.modules.pop(name) for name in taken}
