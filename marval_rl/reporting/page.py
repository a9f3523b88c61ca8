"""The report: one HTML file that needs nothing else, not even a script."""

from __future__ import annotations

import re
from collections.abc import Iterable
from html import escape
from pathlib import Path

from marval_rl.reporting.catalogue import SECTIONS, Metric, Section, catalogue
from marval_rl.reporting.chart import draw_chart
from marval_rl.reporting.curves import curves_of
from marval_rl.reporting.findings import findings_of
from marval_rl.reporting.images import image_rows
from marval_rl.reporting.reading import reading_notes
from marval_rl.reporting.recipe_view import headline, recipe_section
from marval_rl.reporting.run_folder import EVALUATION_FILE, METRICS_FILE, RECIPE_FILE, Run, load_runs
from marval_rl.reporting.scales import format_number
from marval_rl.reporting.style import STYLE, run_style
from marval_rl.reporting.summary import evaluation_table, reference_levels, summary


def write_report(runs: list[Path], output: Path) -> Path:
    """Write one self-contained HTML page about one run folder, or about several in the same axes; returns `output`.

    Raises ValueError where a folder is no run, a file in it cannot be read, or `output` cannot be written.
    """
    page = render_page(load_runs(runs))
    output = Path(output)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(page, encoding="utf-8")
    except OSError as error:
        raise ValueError(f"the report cannot be written to {output} ({error.strerror}): choose another file") from error
    return output


def render_page(runs: list[Run]) -> str:
    """The page as text. Text from the runs is escaped wherever it is put in."""
    trained_on = set().union(*(run.reward_names for run in runs))
    keys = [key for run in runs for key in run.keys]
    metrics = catalogue(keys, trained_on)
    title = runs[0].name if len(runs) == 1 else f"{len(runs)} runs compared"
    body = [
        _header(title, runs),
        _legend(runs),
        "<main>",
        _findings(runs),
        _block("Before and after", "", summary(_summarised(metrics, runs), runs) or _none_of(METRICS_FILE)),
        _block(
            "Samples",
            "The same seeds at every step; one row a class, unless there are many.",
            image_rows(runs) or _none_of("samples/"),
        ),
        *(_charts(section, metrics, runs) for section in SECTIONS),
        _block(
            "Evaluation",
            "The model as it was evaluated last, with the settings that decide the figures.",
            evaluation_table(runs) or _none_of(EVALUATION_FILE),
        ),
        _block("Recipe", "", recipe_section(runs) or _none_of(RECIPE_FILE)),
        _block("Reading this page", "", reading_notes(runs, set(keys))) if keys else "",
        "</main>",
    ]
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>{escape(title)} - marval_rl report</title><style>{STYLE}{run_style(len(runs))}</style></head>"
        f"<body{' class=several' if len(runs) > 1 else ''}>{''.join(body)}</body></html>\n"
    )


def _header(title: str, runs: list[Run]) -> str:
    if len(runs) == 1:
        return f'<header><h1>{escape(title)}</h1><p class="facts">{escape(headline(runs[0], runs))}</p></header>'
    names = [f'<li class="s{index}"><i></i><b>{escape(run.name)}</b> ' for index, run in enumerate(runs)]
    lines = [f'<span class="facts">{escape(headline(run, runs))}</span></li>' for run in runs]
    facts = "".join(name + line for name, line in zip(names, lines, strict=True))
    return f'<header><h1>{escape(title)}</h1><ul class="runs">{facts}</ul></header>'


def _legend(runs: list[Run]) -> str:
    """Sticks to the top; unticking a run hides it everywhere (by CSS alone)."""
    if len(runs) == 1:
        return ""
    boxes = "".join(
        f'<label class="s{index}"><input type="checkbox" id="run{index}" checked><i></i>{escape(run.name)}</label>'
        for index, run in enumerate(runs)
    )
    return f'<nav class="legend" aria-label="Runs shown">{boxes}</nav>'


def _findings(runs: list[Run]) -> str:
    items = [
        f'<li class="s{index}">{f"<i></i><b>{escape(run.name)}</b> " if len(runs) > 1 else ""}{escape(sentence)}</li>'
        for index, run in enumerate(runs)
        for sentence in findings_of(run)
    ]
    return f'<section class="findings"><h2>Worth a look</h2><ul>{"".join(items)}</ul></section>' if items else ""


def _summarised(metrics: list[Metric], runs: list[Run]) -> list[Metric]:
    """Rewards, held-out judges and distribution; losses too, unless every run is RL, whose loss measures nothing."""
    sections = {"rewards", "judges", "distribution"}
    losses = {"loss", "auxiliary_loss"} if any(run.kind in ("pretrain", "distill") for run in runs) else set()
    shown = [metric for metric in metrics if metric.section in sections or metric.key in losses]
    return [metric for metric in shown if not metric.trained_on]


def _charts(section: Section, metrics: list[Metric], runs: list[Run]) -> str:
    figures, once = [], []
    for metric in (metric for metric in metrics if metric.section == section.name):
        curves = curves_of(metric, runs)
        if curves:
            chart = draw_chart(metric, curves, reference_levels(metric, runs), max(run.last_step for run in runs))
            hint = "<span>trained on</span>" if metric.trained_on else ""
            figures.append(f"<figure><figcaption>{escape(metric.label)}{hint}</figcaption>{chart}</figure>")
        else:
            values = [value for run in runs for value in run.series(metric.key)[1]]
            once.append(f"{escape(metric.label)} {' / '.join(map(format_number, values))}")
    notes = [f"Logged once, so no curve: {', '.join(once)}."] if once else []
    notes += _missing(section, runs)
    if not figures and not notes:
        return ""
    content = f'<div class="charts">{"".join(figures)}</div>' if figures else ""
    content += "".join(f'<p class="missing">{note}</p>' for note in notes)
    if section.name == "other":
        return f"<section><details><summary>{section.title}</summary>{content}</details></section>"
    return _block(section.title, section.text, content)


def _missing(section: Section, runs: list[Run]) -> list[str]:
    """Sentences (HTML) on what runs of this kind should have logged and did not, one for runs that lack the same."""
    expecting = [run for run in runs if run.lines and (not section.kinds or run.kind in section.kinds)]
    lacking: dict[str, list[str]] = {}
    for run in expecting:
        metrics = catalogue(run.keys, run.reward_names)
        keys = [metric.key for metric in metrics if section.name != "judges" or metric.is_held_out]
        nulls = {key for line in run.lines for key, value in line.items() if value is None}
        absent = [
            words + (" (null: not defined for these classes)" if _any_matches(pattern, nulls) else "")
            for words, pattern in section.expected
            if not _any_matches(pattern, keys)
        ]
        if absent:
            lacking.setdefault(", ".join(absent), []).append(run.name)
    where = {what: "" if len(names) == len(runs) else f" in {', '.join(names)}" for what, names in lacking.items()}
    return [f"Not logged{escape(where[what])}: {what}." for what in lacking]


def _any_matches(pattern: str, keys: Iterable[str]) -> bool:
    return any(re.fullmatch(pattern, key) for key in keys)


def _none_of(what: str) -> str:
    return f'<p class="missing">There is no {what} yet.</p>'


def _block(title: str, text: str, content: str) -> str:
    lead = f'<p class="lead">{text}</p>' if text else ""
    return f"<section><h2>{title}</h2>{lead}{content}</section>"
