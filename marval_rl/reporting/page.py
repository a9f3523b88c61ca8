"""The report: one HTML file that needs nothing else, filled in by Jinja from the folder page/ beside this file."""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import cache
from pathlib import Path

import vl_convert
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from marval_rl.reporting import summary
from marval_rl.reporting.catalogue import KINDS, SECTIONS, Metric, catalogue
from marval_rl.reporting.charts import NUM_COLOURS, curve_chart, frontier_chart
from marval_rl.reporting.findings import FD_LIMIT, KEPT_LIMIT, findings_of
from marval_rl.reporting.images import sample_strips
from marval_rl.reporting.run_folder import Run, load_runs
from marval_rl.reporting.summary import format_number, format_seconds

_TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).parent / "page"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
_TEMPLATES.filters |= {"number": format_number, "seconds": format_seconds, "setting": summary.setting}


def write_report(runs: list[Path], output: Path) -> Path:
    """Write one self-contained HTML page about one run folder, or about several in the same axes; returns `output`.

    Raises:
        ValueError: Where a folder is not a run, a file in it cannot be read, or `output` cannot be written.
    """
    return write_text(render_page(load_runs(runs)), Path(output))


def write_text(text: str, output: Path) -> Path:
    """Write a file of the report; returns `output`. Raises ValueError where that is impossible."""
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ValueError(f"the report cannot be written to {output} ({error.strerror}): choose another file") from error
    return output


def render_page(runs: list[Run], version: str = "") -> str:
    """The page as text. Text from the runs is escaped wherever it is put in.

    Args:
        version: What /version of the local server says as long as the page is up to date; "" for a page that stays.
    """
    metrics = metrics_of(runs)
    charts: list[dict] = []  # Vega specifications, in the order of their places on the page
    sections = [_section(name, metrics, runs, charts) for name in SECTIONS]
    judged = [metric for metric in metrics if metric.key == "reward" or metric.section == "judges"]
    drawn = [(metric, _place(frontier_chart(metric, runs), charts)) for metric in judged]
    strips = sample_strips(runs)
    page = {
        "charts": charts,
        "names": [run.name for run in runs],
        "strips": [strip["grids"] for strip in strips],
        "last": max(max(run.last_step for run in runs), 1),
        "version": version,
    }
    return _TEMPLATES.get_template("report.html").render(
        runs=runs,
        title=runs[0].name if len(runs) == 1 else f"{len(runs)} runs compared",
        findings=[(index, sentence) for index, run in enumerate(runs) for sentence in findings_of(run)],
        summary=summary,
        metrics=metrics,
        strips=strips,
        frontier=[(metric, place) for metric, place in drawn if place is not None],
        sections=[section for section in sections if section["charts"] or section["notes"]],
        keys={key for run in runs for key in run.keys},
        limits=(FD_LIMIT, KEPT_LIMIT),
        colours=[index % NUM_COLOURS for index in range(len(runs))],
        page=page,
        vega=vega_runtime(),
    )


def metrics_of(runs: list[Run]) -> list[Metric]:
    """Every metric that any of the runs logged, in the order of the page."""
    trained_on = set().union(*(run.reward_names for run in runs))
    return catalogue([key for run in runs for key in run.keys], trained_on)


@cache
def vega_runtime() -> Markup:
    """The JavaScript of Vega and vega-embed, from the installed package."""
    return Markup(vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed").replace("</script", "<\\/script"))


def _place(chart: dict | None, charts: list[dict]) -> int | None:
    """Compile a chart and append it to those of the page; its index, or None for None."""
    if chart is None:
        return None
    spec = vl_convert.vegalite_to_vega(chart)
    if any(signal["name"] == "at" for signal in spec["signals"]):
        spec["signals"].append({"name": "half", "value": 0})  # Vega-Lite's frames are constants; Vega's need not be
        for data in spec["data"]:
            for transform in data.get("transform", []):
                if transform["type"] == "window":
                    transform["frame"] = {"signal": "[-half, half]"}
    charts.append(spec)
    return len(charts) - 1


def _section(name: str, metrics: list[Metric], runs: list[Run], charts: list[dict]) -> dict:
    """What the template needs of a section: the metrics and places of its charts, and notes."""
    drawn, once = [], []
    for metric in (metric for metric in metrics if metric.section == name):
        place = _place(curve_chart(metric, runs), charts)
        if place is not None:
            drawn.append((metric, place))
        else:
            values = [value for run in runs for value in run.series(metric.key)[1]]
            once.append(f"{metric.label} {' / '.join(map(format_number, values[:9]))}")
    notes = [f"Too few finite values for a curve: {', '.join(once)}."] if once else []
    return {"name": name, "charts": drawn, "notes": notes + _missing(name, runs)}


def _missing(section: str, runs: list[Run]) -> list[str]:
    """Sentences on what runs of this kind should have logged and did not, one for runs that miss the same."""
    missing: dict[str, list[str]] = {}
    for run in runs:
        if not run.lines or (section in KINDS and run.kind not in KINDS[section]):
            continue
        keys = [m.key for m in catalogue(run.keys, run.reward_names) if section != "judges" or m.is_held_out]
        nulls = [key for line in run.lines for key, value in line.items() if value is None]
        absent = [
            words + (" (null: not defined for these classes)" if _any_matches(pattern, nulls) else "")
            for words, pattern in SECTIONS[section].items()
            if not _any_matches(pattern, keys)
        ]
        if absent:
            missing.setdefault(", ".join(absent), []).append(run.name)
    where = {what: "" if len(names) == len(runs) else f" in {', '.join(names)}" for what, names in missing.items()}
    return [f"Not logged{where[what]}: {what}." for what in missing]


def _any_matches(pattern: str, keys: Iterable[str]) -> bool:
    return any(re.fullmatch(pattern, key) for key in set(keys))
