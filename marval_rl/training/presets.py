"""The DeepSpeed configurations that come with the library, by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

_FOLDER = Path(__file__).parents[1] / "presets"
DEEPSPEED_PRESETS = ("zero1", "zero2", "zero3", "zero2_offload", "zero3_offload")


def deepspeed_config(value: str | dict[str, Any] | None) -> str | dict[str, Any] | None:
    """`TrainingArguments.deepspeed` with a preset's name replaced by its file; all else as it is.

    Raises:
        ValueError: For a name that is neither a preset nor a file.
    """
    if not isinstance(value, str) or value.startswith("{") or Path(value).is_file():
        return value
    if value not in DEEPSPEED_PRESETS:
        raise ValueError(f"deepspeed {value!r} is neither a file nor one of {', '.join(DEEPSPEED_PRESETS)}")
    return str(_FOLDER / f"{value}.json")
