"""The DeepSpeed configurations that are shipped with the library, by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from marval_rl.text import read_text

_FOLDER = Path(__file__).parents[1] / "presets"
DEEPSPEED_PRESETS = ("zero1", "zero2", "zero3", "zero2_offload", "zero3_offload")


def deepspeed_config(value: str | dict[str, Any] | None) -> str | dict[str, Any] | None:
    """`TrainingArguments.deepspeed` with a preset's name replaced by its file, and another file read.

    Raises:
        ValueError: For a name that is neither a preset nor a file, and for a file that is not JSON.
    """
    if not isinstance(value, str) or value.startswith("{"):
        return value
    if Path(value).is_file():
        try:
            return json.loads(read_text(value))
        except (OSError, ValueError) as error:
            raise ValueError(f"deepspeed {value} cannot be read as JSON: {error}") from error
    if value not in DEEPSPEED_PRESETS:
        raise ValueError(f"deepspeed {value!r} is neither a file nor one of {', '.join(DEEPSPEED_PRESETS)}")
    return str(_FOLDER / f"{value}.json")
