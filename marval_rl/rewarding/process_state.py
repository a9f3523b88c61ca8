"""Settings of the whole process that a reward may change for everybody without meaning to."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class GlobalSetting:
    """How a setting is read and restored, and what a reward should do instead."""

    read: Callable[[], Any]
    restore: Callable[[Any], Any]
    remedy: str


def _working_directory() -> str | None:
    try:
        return os.getcwd()
    except FileNotFoundError:  # somebody removed it
        return None


GLOBAL_SETTINGS = {
    "default dtype": GlobalSetting(
        torch.get_default_dtype, torch.set_default_dtype, "give its own tensors a dtype (torch.zeros(3, dtype=...))"
    ),
    "default device": GlobalSetting(
        torch.get_default_device, torch.set_default_device, "give its own tensors a device (images.device)"
    ),
    "gradient mode": GlobalSetting(
        torch.is_grad_enabled, torch.set_grad_enabled, "use `with torch.no_grad():` around what needs it"
    ),
    "working directory": GlobalSetting(_working_directory, os.chdir, "use absolute paths, or `with contextlib.chdir`"),
}


def global_settings() -> dict[str, Any]:
    return {name: setting.read() for name, setting in GLOBAL_SETTINGS.items()}


@contextmanager
def kept_settings(before: Mapping[str, Any]) -> Iterator[None]:
    """Restores the settings at the end to what they were `before`."""
    try:
        yield
    finally:
        for name, value in global_settings().items():
            if value != before[name] and before[name] is not None:
                GLOBAL_SETTINGS[name].restore(before[name])
