"""Finding labelled images by name or path: an image folder, parquet files, a saved data set, or the hub."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa

from marval_rl.data.bundled import BUNDLED, BundledImages
from marval_rl.data.class_folders import is_split
from marval_rl.data.class_names import shorten
from marval_rl.data.image_folder import ImageFolder
from marval_rl.data.labelled_images import LabelledImages
from marval_rl.errors import DataError, first_line
from marval_rl.paths import looks_like_hub_id


def load_labelled_images(
    name_or_path: str | Path,
    split: str = "train",
    image_column: str = "image",
    label_column: str = "label",
    class_names: Sequence[str] | str | None = None,
    caption_column: str | None = None,
) -> LabelledImages:
    """Labelled images; the network is used only for what is not a local path and looks like a hub id.

    Args:
        name_or_path: The name of a bundled set (digits, mnist; see `BundledImages`); a folder with one folder per class
            (or with `split` folders of that kind); a parquet file, a pattern such as "data/train-*.parquet" or a
            folder of parquet files; a folder that
            `datasets.save_to_disk` wrote; or a hub id, owner/name.
        split: "train", "validation", "test", ...
        image_column, label_column: The columns, for all but image folders.
        caption_column: A column of captions in place of labels: the different ones are the classes.
        class_names: Names of the classes: a list, "imagenet" or a text file with one name per line; None to take those
            that the data have.

    Raises:
        DataError: If there is no such data or split, or they are not what they should be.
    """
    path = Path(name_or_path).expanduser()
    if str(name_or_path) in BUNDLED:
        return BundledImages(str(name_or_path), split)
    if path.is_dir() and not _is_saved(path) and not _holds_parquet(path, split):
        try:
            return ImageFolder(path, split, class_names)
        except DataError as error:
            deeper = next(path.rglob("*.parquet"), None)
            if deeper is None:
                raise
            raise DataError(f"{error}. Parquet files lie in {deeper.parent}: give that path") from error
    from marval_rl.data.hub_images import HubImages  # `datasets` is slow to import, and image folders do without

    rows = _load_dataset(str(name_or_path), path, split)
    if caption_column is not None:
        return HubImages(rows, image_column, caption_column, where=str(path), are_captions=True)
    return HubImages(rows, image_column, label_column, class_names, str(path))


def load_held_out(
    dataset: str | Path,
    eval_dataset: str,
    class_names: Sequence[str] | str | None,
    mode_names: Sequence[str],
    **columns,
) -> LabelledImages:
    """The images to judge against: a split of the data set that is trained on, or other images of the same classes.

    Args:
        dataset: What is trained on, as `load_labelled_images` takes it.
        eval_dataset: The name of one of its splits (val, validation, test, ...); or else what `load_labelled_images`
            takes.
        class_names: Of `load_labelled_images`.
        mode_names: The classes that are trained on; the labels of the images become those of these classes.
        columns: image_column and label_column of `load_labelled_images`.

    Raises:
        DataError: If there are no such images, or they have a class that is not trained on.
    """
    if is_split(eval_dataset):
        found = load_labelled_images(dataset, eval_dataset, class_names=class_names, **columns)
    else:
        found = load_labelled_images(eval_dataset, class_names=class_names, **columns)
    if found.mode_names != list(mode_names):
        strange = [name for name in found.mode_names if list(mode_names).count(name) != 1]
        if strange:
            raise DataError(
                f"eval_dataset {eval_dataset} has the class {strange[0]!r}, which is not one class of the images that "
                f"are trained on ({shorten(mode_names)})"
            )
        label_of = [list(mode_names).index(name) for name in found.mode_names]
        found.modes = [label_of[mode] for mode in found.modes]
        found.set_modes(mode_names)
        found.class_labels = found.modes
    return found


def _load_dataset(name: str, path: Path, split: str):
    """The `datasets.Dataset` that the name or path means."""
    import datasets

    from marval_rl.data.prompts import load_saved

    try:
        if path.is_dir() and _is_saved(path):
            return load_saved(path, split)
        if path.is_dir():
            return datasets.load_dataset("parquet", data_dir=str(path), split=split)
        files = sorted(map(str, path.parent.glob(path.name))) if "*" in path.name else [str(path)] * path.is_file()
        if files:
            _check_parquet(files)
            return datasets.load_dataset("parquet", data_files=files, split=split)
        if not _can_be_hub_id(name):
            raise DataError(
                f"no images at {name}: the path does not exist ({', '.join(BUNDLED)} are bundled; a hub id is written "
                "owner/name; a folder holds one folder per class, parquet files, or what datasets.save_to_disk wrote)"
            )
        return datasets.load_dataset(name, split=split)
    except (OSError, ValueError, pa.ArrowException, datasets.exceptions.DatasetsError) as error:
        meant = (
            ""
            if path.exists() or "*" in name
            else f" (no such local path, so it was taken for a hub id; ./{name} is a path)"
        )
        raise DataError(f"cannot load the split {split!r} of {name}{meant}: {first_line(error)}") from error


def _is_saved(folder: Path) -> bool:
    return (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file()


def _holds_parquet(folder: Path, split: str) -> bool:
    """Whether parquet files lie in a folder, as they are or as the hub converts: <configuration>/<split>/0000.parquet.

    Class folders are not searched: ImageNet's hold a million files. Raises DataError for several configurations.
    """
    if any(next(place.glob("*.parquet"), None) for place in (folder, folder / "data", folder / split)):
        return True
    deeper = [file for pattern in (f"*/{split}/*", f"*/{split}-*") for file in folder.glob(f"{pattern}.parquet")]
    found = sorted({file.relative_to(folder).parts[0] for file in deeper})
    if len(found) > 1:
        raise DataError(f"{folder} holds the configurations {', '.join(found)}: give the path of one of them")
    return bool(found)


def _check_parquet(files: list[str]) -> None:
    """Raises DataError for a file that is not a parquet file or is cut off, which `datasets` would not name."""
    import pyarrow.parquet

    for file in files:
        try:
            pyarrow.parquet.read_metadata(file)
        except pa.ArrowInvalid as error:
            raise DataError(f"{file} is not a parquet file, or it is cut off") from error


def _can_be_hub_id(name: str) -> bool:
    """A relative path in a folder that exists is meant to be local too."""
    return looks_like_hub_id(name) and not name.endswith(("/", ".parquet")) and not Path(name).parent.is_dir()
