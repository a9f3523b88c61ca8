"""Files sorted into one folder per class, as torchvision's `ImageFolder` and `DatasetFolder` expect them."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from marval_rl.data.class_names import imagenet_names, label_classes, natural_key
from marval_rl.errors import DataError

SPLIT = re.compile(
    r"(train|training|test|testing|val|valid|validation|dev|eval|evaluation)([-_ ]?(set|split|data|images|[0-9]+))?"
)


class ClassFolders:
    """The files below `root`/<class>/, at any depth.

    Millions of files are listed without opening or asking about any of them, and kept as one array of bytes, which
    forked workers share. Hidden files and folders and files with other endings are left out.

    class_names:  the name of each class, in the order of the labels
    class_labels: the label of each file; see `label_classes`

    Args:
        root: Holds the class folders.
        endings: Lower-case endings of the files that count, each with its dot.
        class_names: Names to use instead of the folders': a list, "imagenet" or a text file.

    Raises:
        DataError: If there is no such folder, it holds no class folders, a class folder holds no such file, the folders
            are splits or hide the class folders, or the names do not fit.
    """

    def __init__(self, root: Path, endings: tuple[str, ...], class_names: Sequence[str] | str | None = None):
        if not root.is_dir():
            raise DataError(f"no folder at {root}: " + ("it is a file" if root.exists() else "it does not exist"))
        self.root = root
        try:
            with os.scandir(root) as entries:
                found = [entry.name for entry in entries if entry.is_dir() and not is_ignored(entry.name)]
            found.sort(key=natural_key)
            files = {folder: _files_below(root / folder, endings) for folder in found}
        except OSError as error:
            raise DataError(f"cannot list {error.filename}: {error.strerror}") from error
        wanted = ", ".join(endings)
        if not files:
            raise DataError(
                f"{root} holds no class folders: one folder per class is expected, with files ending in {wanted}"
            )
        check_layout(root, files)
        empty = [folder for folder in files if not files[folder]]
        if empty:
            raise DataError(
                f"{len(empty)} of the {len(files)} class folders in {root} hold no files ending in {wanted}: "
                f"{', '.join(empty[:5])}{', ...' if len(empty) > 5 else ''}; fill or remove them"
            )
        labels, self.class_names = label_classes(found, class_names, str(root))
        self.class_labels = [label for label, folder in zip(labels, found, strict=True) for _ in files[folder]]
        self._paths = np.array([path for folder in found for path in files[folder]], dtype=np.bytes_)

    def __len__(self) -> int:
        return len(self.class_labels)

    def name(self, index: int) -> str:
        """The path of a file below the root."""
        return os.fsdecode(self._paths[index].item())

    def path(self, index: int) -> Path:
        return self.root / self.name(index)


def is_ignored(name: str) -> bool:
    """Hidden files and folders, and those that macOS and Synology leave beside images."""
    return name.startswith(".") or name in ("__MACOSX", "@eaDir")


def _files_below(folder: Path, endings: tuple[str, ...]) -> list[bytes]:
    """The paths of a class, relative to the folder above it, sorted."""
    paths = []
    for parent, inner, names in os.walk(folder, followlinks=True, onerror=_raise):
        inner[:] = [name for name in inner if not is_ignored(name)]  # os.walk does not enter what is not here
        inside = os.path.relpath(parent, folder.parent)
        chosen = (name for name in names if name.lower().endswith(endings) and not is_ignored(name))
        paths += [os.fsencode(os.path.join(inside, name)) for name in chosen]
    return sorted(paths)


def _raise(error: OSError) -> None:
    raise error  # os.walk would pass over a folder that it cannot list


# ---- Folders that are not classes: splits, or folders that hold the class folders ----


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
