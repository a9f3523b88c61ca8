"""What `marval-rl rewards score` reads: a folder of images, and a file that says what each of them should show."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from marval_rl.data.class_folders import is_ignored
from marval_rl.data.datasets import to_pixels
from marval_rl.data.decoding import IMAGE_ENDINGS, CorruptImageError, decode_image, read_bytes
from marval_rl.text import read_text

UNKNOWN_LABEL = -1
STANDARD_KEYS = ("prompt", "class_name", "class_label")


@dataclass(frozen=True)
class Prompt:
    """What one image should show. class_label is UNKNOWN_LABEL where the file has none."""

    prompt: str
    class_name: str
    class_label: int = UNKNOWN_LABEL
    columns: dict[str, Any] = field(default_factory=dict)


def list_images(folder: Path) -> list[Path]:
    """Returns the image files of a folder, sorted by name. Raises ValueError if there is none."""
    files = [file for file in folder.iterdir() if file.name.lower().endswith(IMAGE_ENDINGS)]
    files = sorted(file for file in files if not is_ignored(file.name))
    if not files:
        raise ValueError(f"{folder} holds no image ({', '.join(IMAGE_ENDINGS)})")
    return files


def read_image(file: Path) -> Tensor:
    """Returns float32 [3, H, W] in 0..1, decoded as for training. Raises ValueError for a damaged file."""
    try:
        image = decode_image(read_bytes(file), str(file))
    except CorruptImageError as error:
        raise ValueError(f"cannot read the image {file}: {error.reason}") from error
    return to_pixels(image).float() / 255


def read_prompts(file: Path) -> list[Prompt]:
    """Returns one Prompt per line: plain text (prompt and class name alike), or JSON objects.

    A JSON line has "prompt", "class_name" or both (each stands in for the other) and may have "class_label" (an
    integer); other keys go to the reward as columns, so that every line needs the same ones. Raises ValueError with the
    number of the offending line.
    """
    try:
        lines = read_text(file).splitlines()
    except UnicodeError as error:
        raise ValueError(f"cannot read the prompts {file}: {error}") from error
    while lines and not lines[-1].strip():
        lines.pop()
    is_json = bool(lines) and lines[0].lstrip().startswith("{")
    prompts = []
    for number, line in enumerate(lines, start=1):
        try:
            prompts.append(_parse_json_line(line) if is_json else _parse_text_line(line))
        except ValueError as error:
            raise ValueError(f"{file}, line {number}: {error}") from error
        if prompts[-1].columns.keys() != prompts[0].columns.keys():
            raise ValueError(
                f"{file}, line {number}: has the columns {sorted(prompts[-1].columns)}, line 1 has "
                f"{sorted(prompts[0].columns)}; every line needs the same (null where there is no value)"
            )
    return prompts


def _parse_text_line(line: str) -> Prompt:
    text = line.strip()
    if not text:
        raise ValueError("is empty; each image needs a line")
    return Prompt(prompt=text, class_name=text)


def _parse_json_line(line: str) -> Prompt:
    try:
        entry = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"is not valid JSON: {error}") from error
    if not isinstance(entry, dict) or not {"prompt", "class_name"} & entry.keys():
        raise ValueError('expected a JSON object with "prompt" or "class_name"')
    prompt = entry.get("prompt", entry.get("class_name"))
    class_name = entry.get("class_name", prompt)
    label = entry.get("class_label", UNKNOWN_LABEL)
    if not isinstance(prompt, str) or not isinstance(class_name, str):
        raise ValueError(f"prompt and class_name must be text, got {prompt!r} and {class_name!r}")
    if not isinstance(label, int) or isinstance(label, bool):
        raise ValueError(f"class_label must be a whole number, got {label!r}")
    return Prompt(prompt, class_name, label, {key: value for key, value in entry.items() if key not in STANDARD_KEYS})
