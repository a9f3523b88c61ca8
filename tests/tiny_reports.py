"""Run folders made by hand, and what a report of them says, for tests."""

from __future__ import annotations

import html
import json
import re
from html.parser import HTMLParser
from pathlib import Path

from PIL import Image

from marval_rl.reporting import write_report


def rl_lines(
    steps: int = 20, fd: tuple[float, float] = (6.0, 6.1), judge: tuple[float, float] = (-0.2, -0.1)
) -> list[dict]:
    """Training lines of a GRPO run, and two evaluations: at step 0 and at the end."""
    lines = []
    for step in range(steps + 1):
        if step in (0, steps):
            end = int(step > 0)
            lines.append(
                {
                    "step": step,
                    "time": 2.0 * step,
                    "eval_frechet_distance": fd[end],
                    "eval_frechet_floor": 1.08,
                    "eval_diversity": 0.9,
                    "eval_mode_coverage": None,
                    "eval_classifier/accuracy": 0.9 + 0.05 * end,
                    "eval_held_out_classifier/log_probability": judge[end],
                }
            )
        if step > 0:
            lines.append(
                {
                    "step": step,
                    "time": 2.0 * step,
                    "loss": 0.0,
                    "learning_rate": 3e-5,
                    "grad_norm": 0.5,
                    "reward": -1.0 + step / steps,
                    "reward_std": 0.25,
                    "rewards/classifier/mean": -1.0 + step / steps,
                    "rewards/classifier/std": 0.25,
                    "frac_reward_zero_std": 0.0,
                    "kl": 0.001 * step,
                    "clip_ratio/region_mean": 0.1,
                }
            )
    return lines


def make_run(folder: Path, lines: list[dict], recipe: str = "method: grpo\nseed: 3\n", finished: bool = True) -> Path:
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "recipe.yaml").write_text(recipe)
    if finished:
        (folder / "final").mkdir()
    return folder


def add_grids(folder: Path, steps: list[int]) -> None:
    (folder / "samples").mkdir()
    for step in steps:
        Image.new("L", (20, 10), step % 256).save(folder / "samples" / f"step_{step:06d}.png")


def report(*folders: Path) -> str:
    return write_report(list(folders), folders[0].parent / "report.html").read_text(encoding="utf-8")


def without_scripts(page: str) -> str:
    return re.sub(r"<script.*?</script>", "", page, flags=re.DOTALL)


def text_of(page: str) -> str:
    """What a reader sees: no style, no script, no tags, single spaces."""
    without_style = re.sub(r"<style>.*?</style>", "", without_scripts(page), flags=re.DOTALL)
    return " ".join(html.unescape(re.sub(r"<[^>]+>", " ", without_style)).split())


def data_of(page: str) -> dict:
    """What the page's script draws: charts (Vega), names of the runs, strips of sample grids."""
    return json.loads(re.search(r'<script type="application/json" id="page">(.*?)</script>', page)[1])


def rows_of(chart: dict) -> list[dict]:
    """The points of a chart."""
    return next(data["values"] for data in chart["data"] if data["name"] == "rows")


def chart_of(page: str, label: str, kind: str = "curve") -> dict:
    """The chart below a label."""
    pattern = rf'<figure class="chart {kind}" data-chart="(\d+)"[^>]*>\s*<figcaption><b>{re.escape(label)}</b>'
    return data_of(page)["charts"][int(re.search(pattern, page)[1])]


class TagBalance(HTMLParser):
    """Fails on a tag that is closed out of order; collects what could reach for the network."""

    VOID = frozenset({"meta", "img", "input", "br"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: set[str] = set()
        self.links: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.seen.add(tag)
        self.links += [value for name, value in attrs if name in ("src", "href", "srcset", "data")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.seen.add(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag
