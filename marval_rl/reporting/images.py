"""Sample grids as data URIs, so that the report is one file."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from html import escape
from pathlib import Path

from PIL import Image

from marval_rl.reporting.run_folder import Run

LONGEST_SIDE = 1200  # pixels; larger grids are reduced
SMALL_SIDE = 480  # pixels; smaller grids are enlarged with hard edges, so that each pixel shows


@dataclass(frozen=True)
class Grid:
    """One embedded grid; `width` and `height` in pixels."""

    step: int
    uri: str
    width: int
    height: int


def first_middle_last(samples: list[tuple[int, Path]]) -> list[Grid]:
    """Embed the first grid, the one nearest to the middle step, and the last; fewer where there are fewer."""
    if not samples:
        return []
    middle_step = (samples[0][0] + samples[-1][0]) / 2
    middle = min(samples, key=lambda sample: abs(sample[0] - middle_step))
    return [_embed(step, path) for step, path in dict.fromkeys([samples[0], middle, samples[-1]])]


def _embed(step: int, path: Path) -> Grid:
    with Image.open(path) as opened:
        image = opened.convert("L" if opened.mode in ("1", "L") else "RGB")
    image.thumbnail((LONGEST_SIDE, LONGEST_SIDE), Image.Resampling.LANCZOS)
    png, jpeg = io.BytesIO(), io.BytesIO()
    image.save(png, "PNG", optimize=True)
    image.save(jpeg, "JPEG", quality=88)
    # Photographs are far smaller as JPEG; digits are not, and would lose their edges.
    kind, data = ("jpeg", jpeg) if png.tell() > 300_000 else ("png", png)
    text = base64.b64encode(data.getvalue()).decode("ascii")
    return Grid(step, f"data:image/{kind};base64,{text}", *image.size)


def image_rows(runs: list[Run]) -> str:
    """HTML: for each run with grids, its first, middle and last one side by side; "" where there are none."""
    rows = []
    for index, run in enumerate(runs):
        grids = first_middle_last(run.samples)
        if not grids:
            continue
        name = f'<h3 class="s{index}"><i></i>{escape(run.name)}</h3>' if len(runs) > 1 else ""
        figures = "".join(_figure(grid, run) for grid in grids)
        rows.append(f'<div class="r{index}">{name}<div class="grids">{figures}</div></div>')
    return "".join(rows)


def _figure(grid: Grid, run: Run) -> str:
    crisp = ' class="crisp"' if max(grid.width, grid.height) < SMALL_SIDE else ""
    alt = f"Samples of {run.name} at step {grid.step}"
    return (
        f'<figure><img{crisp} src="{grid.uri}" width="{grid.width}" height="{grid.height}" alt="{escape(alt)}">'
        f"<figcaption>step {grid.step:,}{', before training' if grid.step == 0 else ''}</figcaption></figure>"
    )
