"""The report for papers: figures as PNG or PDF, metrics as CSV, the table of before and after as Markdown."""

from __future__ import annotations

import csv
import io
import json
import re
from pathlib import Path

import vl_convert

from marval_rl.reporting.charts import curve_chart, frontier_chart
from marval_rl.reporting.findings import findings_of
from marval_rl.reporting.page import metrics_of, write_text
from marval_rl.reporting.run_folder import load_runs
from marval_rl.reporting.summary import Change, comparison, format_number, headline, over_seeds, seed_groups

SMOOTHING = 0.04  # width of the running mean in figures, as a fraction of the run: the page's default
DRAW = {"png": lambda chart: vl_convert.vegalite_to_png(chart, scale=3), "pdf": vl_convert.vegalite_to_pdf}
_STYLE = Path(__file__).parent / "page" / "report.css"


def write_figures(runs: list[Path], output: Path, kind: str) -> list[Path]:
    """Write each chart of the page as a file of `kind` ("png" or "pdf") into the folder `output`; the files."""
    loaded = load_runs(runs)
    metrics = metrics_of(loaded)
    charts = {metric.key: curve_chart(metric, loaded, SMOOTHING) for metric in metrics}
    judges = [metric for metric in metrics if metric.section == "judges" or metric.key == "reward"]
    charts |= {f"frontier_{metric.key}": frontier_chart(metric, loaded, is_page=False) for metric in judges}
    written = []
    try:
        output.mkdir(parents=True, exist_ok=True)
        for name, chart in charts.items():
            if chart is not None:
                written.append(output / f"{re.sub(r'[^A-Za-z0-9_.-]+', '_', name)}.{kind}")
                written[-1].write_bytes(DRAW[kind](_on_paper(chart)))
    except OSError as error:
        raise ValueError(f"figures cannot be written to {output} ({error.strerror}): choose another folder") from error
    return written


def _on_paper(chart: dict) -> dict:
    """A chart with the light theme's colours in place of the style sheet's variables, on white."""
    light = dict(re.findall(r"--([\w-]+):\s*(#\w+)", _STYLE.read_text(encoding="utf-8").split("@media")[0]))
    text = re.sub(r"var\(--([\w-]+)\)", lambda match: light[match[1]], json.dumps(chart))
    return json.loads(text) | {"background": "white"}


def write_csv(runs: list[Path], output: Path) -> Path:
    """Write every logged number as a row: run, step, metric, value."""
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["run", "step", "metric", "value"])
    for run in load_runs(runs):
        for key in (key for key in run.keys if key != "step"):
            table.writerows([run.name, step, key, value] for step, value in zip(*run.series(key), strict=True))
    return write_text(text.getvalue(), output)


def write_markdown(runs: list[Path], output: Path) -> Path:
    """Write the table of before and after, the headline of each run and the findings."""
    loaded = load_runs(runs)
    rows = comparison(metrics_of(loaded), loaded)
    groups = seed_groups(loaded)
    heads = [run.name for run in loaded] + [f"mean ± deviation of {len(group)} seeds" for group in groups]
    lines = [f"| measure | {' | '.join(map(_cell, heads))} |", "|---" * (len(heads) + 1) + "|"]
    for metric, changes in rows:
        cells = [_ends(change) for change in changes] + [over_seeds(changes, group) for group in groups]
        hint = f" ({metric.direction})" if metric.better else ""
        lines.append(f"| {_cell(metric.label + hint)} | {' | '.join(cells)} |")
    lines += ["", *(f"- {_cell(run.name)}: {_cell(headline(run, loaded))}" for run in loaded)]
    lines += [f"- {_cell(run.name)}: {_cell(sentence)}" for run in loaded for sentence in findings_of(run)]
    return write_text("\n".join(lines) + "\n", output)


def _ends(change: Change | None) -> str:
    if change is None:
        return "not measured"
    before = "" if change.before is None else f"{format_number(change.before)} → "
    spread = f" ± {format_number(change.spread, 2)}" if change.averaged > 1 else ""
    return f"{before}{format_number(change.after)}{spread}"


def _cell(text: str) -> str:
    return re.sub(r"([\\`*_|<>\[\]])", r"\\\1", text)
