"""Folders that are not the class folders they are taken for: splits, or folders that hold the real class folders."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

from marval_rl.data.class_names import imagenet_names
from marval_rl.errors import DataError

SPLIT = re.compile(
    r"(train|training|test|testing|val|valid|validation|dev|eval|evaluation)([-_ ]?(set|split|data|images|[0-9]+))?"
)


def check_layout(root: Path, files: Mapping[str, list[bytes]]) -> None:
    """Refuses class folders that are splits, or whose files all lie deeper, where class folders seem to be.

    Args:
        root: Holds the folders that are taken for classes.
        files: Folder -> the paths of its files below `root`.

    Raises:
        DataError: With the path to give instead.
    """
    folders = list(files)
    splits = [folder for folder in folders if is_split(folder)]
    if len(splits) > 1 or splits == folders:
        raise DataError(
            f"{root} holds splits and not classes ({', '.join(splits[:5])}): {_remedy(root, files, splits)}"
        )
    # <class>/<file> has one slash; three and more mean folders of folders.
    hiding = [folder for folder in folders if files[folder] and all(path.count(b"/") > 2 for path in files[folder])]
    if not hiding and all(path.count(b"/") > 1 for paths in files.values() for path in paths):
        inner = {os.fsdecode(path.split(b"/")[1]) for paths in files.values() for path in paths}
        looks_wrong = len(folders) == 1 or any(is_split(name) or imagenet_names([name]) for name in inner)
        hiding = [folder for folder in folders if files[folder]] if looks_wrong else []
    if hiding:
        raise DataError(
            f"{', '.join(hiding[:5])} in {root} would each be a class, but their images lie in folders inside: "
            f"{_remedy(root, files, hiding)}"
        )


def is_split(name: str) -> bool:
    return SPLIT.fullmatch(name.casefold()) is not None


def _remedy(root: Path, files: Mapping[str, list[bytes]], folders: list[str]) -> str:
    """What to give instead: the folders that hold folders of files, those for training first."""
    above = {os.path.dirname(os.path.dirname(path)) for folder in folders for path in files[folder]} - {b""}
    if not above:
        return "sort the images to train on into one folder per class, and give the path of the folder that holds these"
    paths = sorted((os.fsdecode(path) for path in above), key=lambda path: ("train" not in Path(path).name, path))
    best = [path for path in paths if "train" in Path(path).name] or paths
    return f"give the folder that holds the class folders: {' or '.join(str(root / path) for path in best[:3])}"
