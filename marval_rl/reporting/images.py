"""Sample grids as data URIs, as many and as large as fit: the report is one file that can be mailed."""

from __future__ import annotations

import base64
import io
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image

from marval_rl.reporting.run_folder import Run

BUDGET = 4_500_000  # characters of all grids together, so that a page stays well below 8 MB
MOST_GRIDS = 40  # of one strip: as many places on the slider
SIDES = (1400, 1000, 700, 500)  # pixels, of the longest side; larger grids are reduced
SMALL_FILE = 60_000  # bytes; a file below this is embedded as it is


def sample_strips(runs: list[Run]) -> list[dict]:
    """For each run and kind of grid: {"run", "title", "rows": names of its rows, "grids", "of": how many there are}."""
    strips = [(index, title) for index, run in enumerate(runs) for title in run.samples]
    return [
        {
            "run": index,
            "title": title.replace("_", " "),
            # A grid `by_REWARD` has the best images above the worst.
            "rows": ["best", "worst"] if title.startswith("by_") else [str(name) for name in runs[index].row_names],
            "grids": _fit(runs[index].samples[title], BUDGET // len(strips)),
            "of": len(runs[index].samples[title]),
        }
        for index, title in strips
    ]


def _fit(samples: list[tuple[int, Path]], budget: int) -> list[dict]:
    """Grids evenly spread over training, the first and the last among them, in at most `budget` characters."""
    for side in SIDES:
        probe = max(len(_embed(samples[place][1], side)[0]) for place in (0, len(samples) // 2, -1))
        room = max(min(budget // probe, MOST_GRIDS), 2)
        if room >= min(len(samples), 12):
            break
    places = np.unique(np.linspace(0, len(samples) - 1, room).round().astype(int))
    grids = []
    for place in places:
        step, path = samples[place]
        uri, width, height = _embed(path, side)
        grids.append({"step": step, "src": uri, "width": width, "height": height})
    while len(grids) > 2 and sum(len(grid["src"]) for grid in grids) > budget:
        del grids[1:-1:2]
    return grids


def _embed(path: Path, side: int) -> tuple[str, int, int]:
    return _embed_as_written(path, side, path.stat().st_mtime_ns)


@lru_cache(maxsize=256)  # a page that is watched shows most grids again
def _embed_as_written(path: Path, side: int, written: int) -> tuple[str, int, int]:
    """The data URI of a grid `written` at that time, and its size in pixels."""
    with Image.open(path) as opened:
        image = opened.convert("RGB")
    kind, data = "png", path.read_bytes()
    if max(image.size) > side or len(data) > SMALL_FILE:
        image.thumbnail((side, side), Image.Resampling.LANCZOS)
        buffer = io.BytesIO()
        image.save(buffer, "WEBP", quality=85, method=2)
        kind, data = "webp", buffer.getvalue()
    return f"data:image/{kind};base64,{base64.b64encode(data).decode('ascii')}", *image.size
