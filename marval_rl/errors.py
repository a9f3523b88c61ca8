"""Errors that a user can act on: each message names the offending value and the remedy."""

from __future__ import annotations

import difflib
import tempfile
from collections.abc import Iterable
from pathlib import Path


class MarvalError(Exception):
    """Base of the errors that the command line shows as one line."""


class RecipeError(MarvalError, ValueError):
    """A recipe or a command-line override is wrong (exit code 2)."""


class RewardError(MarvalError):
    """A reward function broke its contract: it raised, or returned something that is not a valid reward."""


class CheckpointError(MarvalError):
    """A model folder or a checkpoint cannot be used as asked."""


class NonFiniteError(MarvalError):
    """The loss or the gradient is not finite, step after step."""


class PolicyMismatchError(MarvalError):
    """A rollout's log-probabilities cannot be found again, so a policy gradient would be wrong."""


class ProcessLostError(MarvalError):
    """Another process of the run does not answer, or is gone."""


class DataError(MarvalError):
    """Images, a data set or a cache cannot be read, or are not what they should be."""


def check_folder(folder: Path, setting: str) -> None:
    """Raises ValueError if no files could be written to a folder; makes it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise ValueError(f"{setting} {folder} cannot be written: {error.strerror}; choose another folder") from error


def check_output(file: Path, setting: str = "--output") -> None:
    """Raises ValueError if a result could not be written to a file in the end; makes its folder."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        # Without making the file: another process of the run may look for it at the same time.
        if file.exists():
            file.open("ab").close()
        else:
            tempfile.TemporaryFile(dir=file.parent).close()
    except OSError as error:
        raise ValueError(f"{setting} {file} cannot be written: {error.strerror}; choose another place") from error


def nearest(name: str, known: Iterable[str]) -> str:
    """Returns "; did you mean a or b?" with up to three of the known names, or "" where none is similar."""
    matches = difflib.get_close_matches(name, map(str, known), n=3, cutoff=0.6)
    return f"; did you mean {' or '.join(matches)}?" if matches else ""


def first_line(error: Exception) -> str:
    """The first line of an error's text that says anything, for a one-line message."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
