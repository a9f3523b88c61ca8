"""Keeping libraries from talking over the command line's own output."""

from __future__ import annotations

import os
import sys
import warnings

import torch


def quiet_libraries() -> None:
    """No warnings meant for developers, and no progress bars of loading and saving."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else deepspeed, where installed, warns that it finds no GPU
    for library in ("transformers", "huggingface_hub", "diffusers"):
        warnings.filterwarnings("ignore", module=library)  # of what will be renamed in their next release
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def is_watched() -> bool:
    """Whether a person sees the progress bars."""
    return sys.stderr.isatty()
