"""Hiding what libraries print for developers, so that the user sees this library's own output and real warnings."""

from __future__ import annotations

import logging
import os
import warnings

NOISE = (  # warnings of transformers that ask nothing of the user; all others are shown
    "does not expose input embeddings",  # of language models' adapters
    "do not match the ones in the `trainer_state.json`",  # a resumed run says itself what has changed
)


def quiet_libraries() -> None:
    """No warnings meant for developers, and no progress bars of loading and saving."""
    import torch
    from transformers.utils import logging as transformers_logging

    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else deepspeed, where installed, warns that it finds no GPU
    for library in ("transformers", "huggingface_hub", "diffusers"):
        for category in (FutureWarning, DeprecationWarning):  # of what will be renamed in their next release
            warnings.filterwarnings("ignore", category=category, module=library)
    transformers_logging.set_verbosity_warning()
    transformers_logging.disable_progress_bar()
    for handler in logging.getLogger("transformers").handlers:
        handler.addFilter(_is_for_the_user)


def _is_for_the_user(record: logging.LogRecord) -> bool:
    return not any(noise in record.getMessage() for noise in NOISE)
