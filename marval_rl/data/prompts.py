"""Prompts by name or path: a text file, JSON lines, parquet, a saved data set, or the hub; further columns stay."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import datasets
import pyarrow as pa

from marval_rl.data.class_rows import RESERVED
from marval_rl.errors import DataError, first_line, nearest
from marval_rl.paths import looks_like_hub_id
from marval_rl.text import read_text

TABLES = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}


def load_prompts(name_or_path: str | Path, column: str = "prompt", split: str = "train") -> datasets.Dataset:
    """Rows {"prompt": str, ...} with the further columns of the data.

    Args:
        name_or_path: A .txt file of one prompt per line; .jsonl, .parquet or .csv; a folder that
            `datasets.save_to_disk` wrote; or a hub id, owner/name.
        column: The column of prompts, for all but text files.
        split: The split, where the data have several.

    Raises:
        DataError: If there are no such data, no such column, or rows without a prompt.
    """
    path = Path(name_or_path).expanduser()
    if path.suffix == ".txt":
        rows = datasets.Dataset.from_dict({"prompt": _lines(path)})
    else:
        rows = _read(str(name_or_path), path, split)
        if column not in rows.column_names:
            raise DataError(
                f"{name_or_path} has no column {column!r}, only {', '.join(rows.column_names)} (--prompt_column ...)"
                f"{nearest(column, rows.column_names)}"
            )
        if column != "prompt":
            if "prompt" in rows.column_names:
                rows = rows.remove_columns("prompt")
            rows = rows.rename_column(column, "prompt")
    if reserved := [name for name in rows.column_names if name in (*RESERVED, "class_labels", "images")]:
        raise DataError(f"{name_or_path} has a column {reserved[0]}, which is made here: rename it")
    if not len(rows):
        raise DataError(f"{name_or_path} holds no prompt")
    for number, prompt in enumerate(rows["prompt"]):
        if not isinstance(prompt, str) or not prompt.strip():
            raise DataError(f"row {number} of {name_or_path} has no prompt but {prompt!r}")
    return rows


def index_prompts(prompts: Sequence[str], known: Sequence[str] = ()) -> tuple[list[str], list[int]]:
    """A table of different prompts that begins with the known ones, and the index of each prompt in it."""
    table = dict.fromkeys([*known, *prompts])
    place = {prompt: index for index, prompt in enumerate(table)}
    return list(table), [place[prompt] for prompt in prompts]


def _lines(path: Path) -> list[str]:
    try:
        return [line.strip() for line in read_text(path).splitlines() if line.strip()]
    except (OSError, UnicodeError) as error:
        raise DataError(f"cannot read the prompts {path}: {error}") from error


def load_saved(folder: Path, split: str) -> datasets.Dataset:
    """What `datasets.save_to_disk` wrote; of several splits this one. Raises DataError if it is not among them."""
    found = datasets.load_from_disk(str(folder))
    if not isinstance(found, datasets.DatasetDict):
        return found
    if split not in found:
        raise DataError(f"{folder} has no split {split!r}: it has {', '.join(found)}")
    return found[split]


def _read(name: str, path: Path, split: str) -> datasets.Dataset:
    try:
        if path.is_dir():
            return load_saved(path, split)
        if path.suffix in TABLES:
            if not path.is_file():
                raise DataError(f"no prompts at {path}: the file does not exist")
            return datasets.load_dataset(TABLES[path.suffix], data_files=str(path), split="train")
        if path.is_file() or not looks_like_hub_id(name):
            raise DataError(
                f"no prompts at {name}: give a .txt, {', '.join(TABLES)} file, a folder of datasets.save_to_disk, or a "
                "hub id, owner/name"
            )
        return datasets.load_dataset(name, split=split)
    except (OSError, ValueError, pa.ArrowException, datasets.exceptions.DatasetsError) as error:
        raise DataError(f"cannot load the prompts {name}: {first_line(error)}") from error
