"""Versions and hardware, for bug reports and run folders; imports torch only where it is asked."""

from __future__ import annotations

import os
import platform
from importlib import metadata

from marval_rl import __version__

PACKAGES = (
    "torch",
    "transformers",
    "trl",
    "accelerate",
    "datasets",
    "safetensors",
    "numpy",
    "scipy",
    "scikit-learn",
    "pillow",
    "diffusers",
    "torchvision",
    "deepspeed",
    "open_clip_torch",
    "timm",
    "torch-fidelity",
    "fastapi",
)


def environment() -> dict[str, str]:
    """Versions and hardware by name; a run and an evaluation keep them beside their results."""
    rows = [("marval_rl", __version__), ("python", platform.python_version()), ("platform", platform.platform())]
    rows += [(package, _version(package)) for package in PACKAGES]
    return dict(rows + _hardware())


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _hardware() -> list[tuple[str, str]]:
    rows = [("CPU cores", str(os.cpu_count()))]
    try:
        import torch
    except (ImportError, OSError) as error:  # OSError: a shared library that does not load
        return [*rows, ("torch", f"cannot be imported: {' '.join(str(error).split())}")]
    rows.append(("torch threads", str(torch.get_num_threads())))
    rows.append(("CUDA of torch", torch.version.cuda or "none"))
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        rows.append((f"GPU {index}", f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"))
    if not torch.cuda.is_available():
        rows.append(("device", "cpu"))
    return rows
