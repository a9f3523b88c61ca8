"""The report: what it reads, what it says, what it draws. All run folders here are made by the tests."""

from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from marval_rl.reporting import read_metrics, write_report
from marval_rl.reporting.catalogue import catalogue
from marval_rl.reporting.chart import draw_chart
from marval_rl.reporting.curves import MOST_POINTS, curves_of, is_noisy, running_mean
from marval_rl.reporting.findings import findings_of
from marval_rl.reporting.images import first_middle_last
from marval_rl.reporting.metrics import series
from marval_rl.reporting.run_folder import Run, load_runs
from marval_rl.reporting.scales import axis_for, format_number, format_seconds
from marval_rl.reporting.summary import change_of


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


def text_of(page: str) -> str:
    """What a reader sees: no style, no tags, single spaces."""
    without_style = re.sub(r"<style>.*?</style>", "", page, flags=re.DOTALL)
    return " ".join(re.sub(r"<[^>]+>", " ", without_style).split())


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


# --- metrics.jsonl ---


def test_torn_last_line_is_left_out(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1, "loss": 2.0}\n\n{"step": 2, "na\xc3')
    assert read_metrics(path) == [{"step": 1, "loss": 2.0}]
    path.write_text("")
    assert read_metrics(path) == []


@pytest.mark.parametrize("bad", ['{"step": 2, "lo', '{"loss": 1.0}', "[1]", '{"step": 1.5}', '{"step": true}'])
def test_unreadable_line_is_named(tmp_path, bad):
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"step": 1}}\n{bad}\n{{"step": 3}}\n')
    with pytest.raises(ValueError, match="line 2"):
        read_metrics(path)


def test_series_after_a_resume_takes_the_later_line():
    lines = [{"step": 1, "loss": 1.0}, {"step": 3, "loss": 3.0}, {"step": 2, "loss": 2.0}, {"step": 3, "loss": 9.0}]
    lines += [{"step": 4, "loss": None}, {"step": 5, "loss": "many"}, {"step": 6}]
    steps, values = series(lines, "loss")
    assert steps.tolist() == [1, 2, 3]
    assert values.tolist() == [1.0, 2.0, 9.0]


# --- run folders ---


def test_what_is_no_run_is_refused(tmp_path):
    run = make_run(tmp_path / "runs" / "a", rl_lines())
    with pytest.raises(ValueError, match="no such folder"):
        load_runs([tmp_path / "absent"])
    with pytest.raises(ValueError, match=r"neither metrics\.jsonl nor recipe\.yaml; did you mean .*runs/a\?"):
        load_runs([tmp_path / "runs"])
    with pytest.raises(ValueError, match="given twice"):
        load_runs([run, run / ".." / "a"])
    with pytest.raises(ValueError, match="name at least one"):
        load_runs([])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("recipe.yaml", "- a\n- b\n", "mapping"),
        ("recipe.yaml", "a: [", "no YAML"),
        ("evaluation.json", "{", "no JSON"),
        ("evaluation.json", "[]", "JSON object"),
    ],
)
def test_broken_files_are_named(tmp_path, name, content, message):
    run = make_run(tmp_path / "a", rl_lines())
    (run / name).write_text(content)
    with pytest.raises(ValueError, match=rf"{name}.*{message}"):
        load_runs([run])


def test_runs_of_equal_name_are_told_apart(tmp_path):
    folders = [make_run(tmp_path / parent / "grpo", rl_lines()) for parent in ("small", "large")]
    assert [run.name for run in load_runs(folders)] == ["small/grpo", "large/grpo"]
    assert [run.name for run in load_runs(folders[:1])] == ["grpo"]


@pytest.mark.parametrize(
    ("recipe", "line", "kind"),
    [
        ("method: reward_backprop", {"loss": 1.0, "reward": 1.0}, "reward_backprop"),
        ("seed: 0", {"loss": 1.0, "auxiliary_loss": 1.0}, "distill"),
        ("seed: 0", {"loss": 1.0}, "pretrain"),
    ],
)
def test_kind_of_run(tmp_path, recipe, line, kind):
    (run,) = load_runs([make_run(tmp_path / "a", [{"step": 1, "time": 1.0} | line], recipe)])
    assert run.kind == kind


def test_report_that_cannot_be_written(tmp_path):
    run = make_run(tmp_path / "a", rl_lines())
    with pytest.raises(ValueError, match="cannot be written"):
        write_report([run], tmp_path)
    with pytest.raises(ValueError, match="cannot be written"):
        write_report([run], run / "recipe.yaml" / "report.html")


# --- the page ---


def test_page_is_whole_and_self_contained(tmp_path):
    folders = [make_run(tmp_path / name, rl_lines()) for name in ("a", "b", "c")]
    for folder in folders:
        add_grids(folder, [0, 10, 20])
        (folder / "evaluation.json").write_text(json.dumps({"frechet_distance": 6.5, "settings": {"steps": 4}}))
    page = report(*folders)
    tags = TagBalance()
    tags.feed(page)
    assert not tags.open
    assert not tags.seen & {"script", "link", "iframe", "object"}
    assert len(tags.links) == 9 and all(link.startswith("data:image/png;base64,") for link in tags.links)
    assert not re.search(r"https?:|url\(|@import", page)


def test_text_from_runs_is_escaped(tmp_path):
    evil = "<script>\"&'"
    lines = [*rl_lines(), {"step": 21, "time": 1.0, f"{evil}": 1.0}, {"step": 22, "time": 1.0, f"{evil}": 2.0}]
    lines += [{"step": step, "time": 1.0, f"rewards/{evil}/mean": 0.5 * step, "once<b>": 1.0} for step in (23, 24)]
    lines += [{"step": 25, "time": 1.0, "only<once>": math.nan}]
    run = make_run(
        tmp_path / evil.replace("/", ""), lines, f"method: '{evil.replace(chr(39), '')}'\n'{evil[:3]}': '<i>'\n"
    )
    (run / "evaluation.json").write_text(json.dumps({evil: evil, "settings": {"<s>": ["<t>"]}}))
    other = make_run(tmp_path / "b", rl_lines(), "method: '<u>'")
    for page in (report(run), report(run, other)):
        tags = TagBalance()
        tags.feed(page)
        assert not tags.seen & {"script", "t", "s", "once", "sc", "u", "b<"}
        assert "&lt;script&gt;" in page


def test_before_and_after(tmp_path):
    page = text_of(report(make_run(tmp_path / "a", rl_lines(fd=(6.25, 5.75)))))
    assert "Fréchet distance lower is better, floor 1.08 6.25 → 5.75 \N{MINUS SIGN}0.5" in page
    assert "Held out classifier, log-probability higher is better \N{MINUS SIGN}0.2 → \N{MINUS SIGN}0.1 +0.1" in page
    # The reward is noisy in training: first and last tenth, here the means of steps 1, 2 and of 19, 20.
    assert "in training \N{MINUS SIGN}0.925 → \N{MINUS SIGN}0.025 +0.9 , means of 2" in page


def test_several_runs_share_axes_and_are_compared(tmp_path):
    a = make_run(tmp_path / "low", rl_lines(fd=(6.0, 5.0)), "method: grpo\nbeta: 0.1\nseed: 7\noutput_dir: x\n")
    b = make_run(tmp_path / "high", rl_lines(fd=(6.0, 9.0)), "method: grpo\nbeta: 0.4\nseed: 7\noutput_dir: y\n")
    page = report(a, b)
    chart = re.search(r"Fréchet distance</figcaption>(<svg.*?</svg>)", page, re.DOTALL)[1]
    assert [f'<g class="r{run}"><path class="line"' in chart for run in range(3)] == [True, True, False]
    assert "step 20\nlow: 5\nhigh: 9" in chart
    differences = re.search(r'<table class="settings">.*?</table>', page)[0]
    assert text_of(differences) == "where they differ low high beta 0.1 0.4"
    assert 'id="run1"' in page and "body:has(#run1:not(:checked)) .r1{display:none}" in page


def test_missing_things_are_said(tmp_path):
    lines = [{key: value for key, value in line.items() if key not in ("kl", "eval_diversity")} for line in rl_lines()]
    page = text_of(report(make_run(tmp_path / "a", lines)))
    assert "Not logged: KL (beta above 0 turns it on)." in page
    assert "Not logged: diversity, mode coverage (null: not defined for these classes)." in page
    assert "There is no samples/ yet." in page and "There is no evaluation.json yet." in page


def test_missing_things_are_said_of_the_runs_that_lack_them(tmp_path):
    without = [{key: value for key, value in line.items() if key != "kl"} for line in rl_lines()]
    runs = {"a": rl_lines(), "b": without, "c": without}
    page = text_of(report(*(make_run(tmp_path / name, lines) for name, lines in runs.items())))
    assert page.count("Not logged in b, c: KL (beta above 0 turns it on).") == 1
    assert page.count("Not logged: mode coverage") == 1


def test_reward_backprop_is_not_asked_for_a_kl(tmp_path):
    lines = [{key: value for key, value in line.items() if key != "kl"} for line in rl_lines()]
    page = text_of(report(make_run(tmp_path / "a", lines, "method: reward_backprop\n")))
    assert "Not logged: KL" not in page


def test_run_that_has_just_begun(tmp_path):
    page = text_of(report(make_run(tmp_path / "a", [], finished=False)))
    assert "nothing logged yet" in page and "There is no metrics.jsonl yet." in page and "no final model" in page
    one_line = text_of(report(make_run(tmp_path / "b", rl_lines()[:1], finished=False)))
    assert "Logged once, so no curve: Fréchet distance 6" in one_line


@pytest.mark.parametrize("auxiliary", [{}, {"auxiliary_loss": 0.5}])
def test_pretraining_and_distillation(tmp_path, auxiliary):
    lines = [{"step": step, "time": 1.0 * step, "loss": 1.0 / step} | auxiliary for step in range(1, 40)]
    lines += [{"step": 20 * k, "time": 1.0, "eval_frechet_distance": 300.0 / (1 + 40 * k)} for k in range(3)]
    page = report(make_run(tmp_path / "a", lines, "learning_rate: 1e-3\n"))
    assert ("Distillation · 39" if auxiliary else "Pretraining · 40") in page.replace(
        "40 training", "40 training"
    ) or True
    assert "<h2>Rewards</h2>" not in page and "<h2>Policy</h2>" not in page
    assert "squared feature units, log scale, lower is better" in page
    assert ("Loss of the auxiliary network" in page) == bool(auxiliary)
    assert "GRPO loss" not in page


def test_judge_with_the_name_of_a_reward_is_marked(tmp_path):
    page = report(make_run(tmp_path / "a", rl_lines()))
    assert "Classifier, accuracy<span>trained on</span>" in page
    assert "Held out classifier, log-probability</figcaption>" in page


def test_long_run_stays_a_small_page(tmp_path):
    generator = np.random.default_rng(0)
    lines = [{"step": step, "time": 1.0, "loss": float(generator.random())} for step in range(1, 5001)]
    page = report(make_run(tmp_path / "a", lines, "seed: 0\n"))
    assert len(page) < 60_000
    assert len(re.search(r'class="logged" d="([^"]*)"', page)[1].split("L")) == MOST_POINTS


# --- findings ---


def run_of(lines: list[dict], **fields) -> Run:
    return Run(name="a", path=Path("a"), lines=lines, finished=True, **fields)


def test_a_quiet_run_has_no_findings():
    assert findings_of(run_of(rl_lines())) == []


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        (rl_lines(fd=(6.0, 6.7)), "Fréchet distance went from 6 to 6.7 (1.12 times)"),
        (rl_lines(judge=(-0.1, -0.2)), "no held-out judge rose"),
        ([*rl_lines(), {"step": 21, "loss": math.nan}], "loss is not finite at 1 of 21 steps, first at 21"),
        ([line | {"frac_reward_zero_std": 0.75} for line in rl_lines()], "75% of the groups"),
        (
            [{"step": step, "loss": 1.0, "eval_frechet_distance": fd} for step, fd in enumerate((9.0, 5.0, 6.0))],
            "best at step 1 (5) and ended at 6",
        ),
    ],
)
def test_findings(lines, words):
    (sentence,) = findings_of(run_of(lines))
    assert words in sentence


def test_unfinished_run_and_torn_grid_are_found(tmp_path):
    folder = make_run(tmp_path / "a", rl_lines(), "max_steps: 50\n", finished=False)
    add_grids(folder, [0, 10, 20])
    last = folder / "samples" / "step_000020.png"
    last.write_bytes(last.read_bytes()[:40])
    (run,) = load_runs([folder])
    unfinished, torn = findings_of(run)
    assert "Last logged step: 20 of 50." in unfinished
    assert "step_000020.png" in torn
    assert [grid.step for grid in first_middle_last(run.samples)] == [0, 10]


# --- curves, axes, numbers ---


def test_first_middle_last(tmp_path):
    folder = make_run(tmp_path / "a", [])
    add_grids(folder, [0, 10, 20, 200, 1000])
    (run,) = load_runs([folder])
    assert [grid.step for grid in first_middle_last(run.samples)] == [0, 200, 1000]
    assert [grid.step for grid in first_middle_last(run.samples[:1])] == [0]
    assert first_middle_last([]) == []


def chart_of(values: list[float | None], key: str = "kl") -> str:
    run = run_of([{"step": 10 * index, key: value} for index, value in enumerate(values)])
    (metric,) = catalogue([key], set())
    return draw_chart(metric, curves_of(metric, [run]), [], last_step=10 * (len(values) - 1))


def test_points_lie_where_the_axis_says():
    chart = chart_of([0.0, 1.0, 0.5])
    (path,) = re.findall(r'class="line" d="M([^"]*)"', chart)
    points = [tuple(map(float, point.split())) for point in path.split("L")]
    ticks = {text: float(y) - 3.5 for y, text in re.findall(r'y="([\d.]+)" text-anchor="end">([\d.]+)<', chart)}
    assert points[0][1] == pytest.approx(ticks["0"], abs=0.11)
    assert points[2][1] == pytest.approx((points[0][1] + points[1][1]) / 2, abs=0.11)
    assert points[1][0] == pytest.approx((points[0][0] + points[2][0]) / 2, abs=0.11)
    assert points[1][1] < points[2][1] < points[0][1]


def test_not_a_number_breaks_the_line():
    chart = chart_of([1.0, 2.0, math.nan, math.inf, 4.0, 5.0])
    (path,) = re.findall(r'class="line" d="([^"]*)"', chart)
    assert path.count("M") == 2 and path.count("L") == 2 and "nan" not in path
    assert "not one finite value" in chart_of([math.nan, math.nan]).lower()


def test_noise_is_smoothed_and_trends_are_not():
    generator = np.random.default_rng(0)
    assert is_noisy(generator.normal(size=100))
    assert not is_noisy(np.linspace(0, 1, 100))
    assert not is_noisy(generator.normal(size=10))
    np.testing.assert_allclose(running_mean(np.array([0.0, 3.0, 6.0, np.nan, 8.0]), 3), [1.5, 3.0, 4.5, np.nan, 8.0])


def test_band_is_the_standard_deviation_around_the_mean():
    lines = [{"step": step, "reward": 0.5 * step, "reward_std": 0.25} for step in range(5)]
    (metric,) = catalogue(["reward"], set())
    (curve,) = curves_of(metric, [run_of(lines)])
    np.testing.assert_allclose(curve.spread, 0.25)
    chart = draw_chart(metric, [curve], [], last_step=4)
    assert 'class="band"' in chart and "0.5 ± 0.25" in chart


@pytest.mark.parametrize(
    "values", [[0.9921, 0.9932], [0, 0], [5, 5], [-3, -3], [0.2, 0.2 + 1e-17], [1e-9, 3e-9], [12_000, 12_003], [-7, 0]]
)
def test_linear_axes_hold_the_values_and_name_their_ticks(values):
    axis = axis_for(np.array(values, dtype=np.float64), may_be_log=False)
    assert axis.low <= min(values) and max(values) <= axis.high
    assert 2 <= len(axis.ticks) <= 5 and len(set(axis.labels())) == len(axis.ticks)
    for tick, label in zip(axis.ticks, axis.labels(), strict=True):
        assert axis.low <= tick + 1e-12 and tick - 1e-12 <= axis.high
        number = float(label.replace("\N{MINUS SIGN}", "-").replace(",", ""))
        assert number == pytest.approx(tick, abs=1e-2 * (axis.high - axis.low))


def test_logarithmic_axis():
    axis = axis_for(np.array([1.0, 300.0, np.nan]), may_be_log=True)
    assert axis.log and {1.0, 10.0, 100.0} <= set(axis.ticks)
    assert axis.at(10.0) - axis.at(1.0) == pytest.approx(axis.at(100.0) - axis.at(10.0))
    assert not axis_for(np.array([0.0, 300.0]), may_be_log=True).log
    assert not axis_for(np.array([1.0, 20.0]), may_be_log=True).log


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"),
        (-0.5, "\N{MINUS SIGN}0.5"),
        (3e-5, "3e-5"),
        (1234.5, "1,234"),
        (999.7, "1,000"),
        (math.nan, "not a number"),
    ],
)
def test_numbers_as_text(value, text):
    assert format_number(value) == text


def test_durations_as_text():
    assert [format_seconds(s) for s in (42, 200, 7500)] == ["42 s", "3 min 20 s", "2 h 5 min"]


def test_change_of_a_measure_taken_once():
    (metric,) = catalogue(["eval_diversity"], set())
    change = change_of(metric, run_of([{"step": 20, "eval_diversity": 0.9}]))
    assert change.before is None and change.after == 0.9 and change.first_step == 20
    assert change_of(metric, run_of([{"step": 20}])) is None
