"""Files that are either complete or missing, whatever kills the process that writes them."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from marval_rl.errors import DataError


def write_atomically(path: Path, data: bytes) -> None:
    """Write to a temporary file beside `path`, force it to the disk, and rename it.

    A killed process leaves at most the temporary file, `<name>.tmp-<process id>`. Raises DataError where the disk is
    full or may not be written to; nothing is left behind then.
    """
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    try:
        try:
            with open(temporary, "wb") as stream:
                stream.write(data)
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # the rename itself
        finally:
            os.close(folder)
    except OSError as error:
        raise DataError(
            f"cannot write {path}: {error.strerror}; what is finished stays, and the same command continues from there"
        ) from error


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Atomically. Raises DataError."""
    write_atomically(path, (json.dumps(content, indent=1) + "\n").encode())


def read_json(path: Path) -> dict[str, Any] | None:
    """The object in a file, or None if there is none or it is damaged. Raises DataError if it cannot be read."""
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error
    except ValueError:  # no JSON, or no UTF-8
        return None
    return content if isinstance(content, dict) else None


def remove_leftovers(folder: Path, pattern: str) -> None:
    """Remove the temporary files that killed processes left for names that match."""
    for path in folder.glob(f"{pattern}.tmp-*"):
        path.unlink(missing_ok=True)
