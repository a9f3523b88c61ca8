"""Images in one folder per class: ImageNet as it is unpacked."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from marval_rl.data.class_folders import ClassFolders
from marval_rl.data.decoding import IMAGE_ENDINGS, read_bytes
from marval_rl.data.labelled_images import LabelledImages
from marval_rl.errors import DataError


class ImageFolder(LabelledImages):
    """Images in `root`/<class>/; labels are the order of the class folders by name, as in torchvision and MAR,
    but that 2 comes before 10.

    Folders that are all named by ImageNet's WordNet ids get the names of these classes, others keep their own.

    Args:
        root: Holds the class folders, or a folder `split` that holds them.
        split: "train", "val", ...; only "train" may be missing, `root` is then the folder itself.
        class_names: Names to use instead: a list, "imagenet" or a text file.

    Raises:
        DataError: If there is no such folder, a class has no images, or the names do not fit.
    """

    def __init__(self, root: str | Path, split: str = "train", class_names: Sequence[str] | str | None = None):
        self.files = ClassFolders(_split_folder(Path(root), split), IMAGE_ENDINGS, class_names)
        self.folder = str(self.files.root.absolute())
        super().__init__(self.files.class_labels, self.files.class_names)

    def name(self, index: int) -> str:
        return self.files.name(index)

    def where(self, index: int) -> str:
        return str(self.files.path(index))

    def stamp(self, index: int) -> str:
        path = self.files.path(index)
        try:
            found = path.stat()
        except OSError as error:
            raise DataError(f"cannot read {path}: {error.strerror}") from error
        return f"{found.st_size} {found.st_mtime_ns}"

    def encoded(self, index: int) -> bytes:
        return read_bytes(self.files.path(index))


def _split_folder(root: Path, split: str) -> Path:
    """`root`/`split` where it holds folders; a class may be called "train", but it holds images."""
    inside = root / split
    if inside.is_dir():
        with os.scandir(inside) as entries:
            if any(entry.is_dir() for entry in entries):
                return inside
    if split != "train" and root.is_dir():
        there = sorted(path.name for path in root.iterdir() if path.is_dir())[:5]
        raise DataError(f"{root} has no folder {split!r} of class folders; its folders: {', '.join(there) or 'none'}")
    return root
