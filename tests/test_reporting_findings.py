"""What a report concludes from a run, and how its curves are drawn."""

from __future__ import annotations

import math
import re
from pathlib import Path

import numpy as np
import pytest
from tiny_reports import add_grids, make_run, rl_lines

from marval_rl.reporting.catalogue import catalogue
from marval_rl.reporting.chart import draw_chart
from marval_rl.reporting.curves import curves_of, is_noisy, running_mean
from marval_rl.reporting.findings import findings_of
from marval_rl.reporting.images import first_middle_last
from marval_rl.reporting.run_folder import Run, load_runs
from marval_rl.reporting.scales import axis_for, format_number, format_seconds
from marval_rl.reporting.summary import change_of

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
