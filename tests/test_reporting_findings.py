"""What a report concludes from a run, its charts, and its exports for papers."""

from __future__ import annotations

import csv
import math

import numpy as np
import pytest
import vl_convert
from PIL import Image
from tiny_reports import add_grids, make_run, rl_lines, rows_of

from marval_rl.reporting import export
from marval_rl.reporting.catalogue import catalogue
from marval_rl.reporting.charts import MOST_POINTS, curve_chart, curve_points, frontier_chart
from marval_rl.reporting.findings import findings_of
from marval_rl.reporting.images import BUDGET, MOST_GRIDS, SIDES, sample_strips
from marval_rl.reporting.metrics import add_speed, time_spent
from marval_rl.reporting.run_folder import Run, load_runs
from marval_rl.reporting.summary import change_of, format_number, format_seconds, over_seeds, seed_groups


def run_of(lines: list[dict], **fields) -> Run:
    return Run(name="a", path=fields.pop("path", None), lines=lines, finished=True, **fields)


def metric_of(key: str):
    return catalogue([key], set())[0]


# --- findings ---


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
    assert [step for step, _ in run.samples[""]] == [0, 10]


# --- charts ---


def test_downsampling_keeps_extremes_and_means():
    values = np.random.default_rng(0).normal(size=50_000)
    values[31_234], values[40_000] = 99.0, -77.0
    lines = [{"step": step, "kl": float(value)} for step, value in enumerate(values)]
    rows = curve_points(metric_of("kl"), [run_of(lines)])
    assert len(rows) == MOST_POINTS
    assert max(row["h"] for row in rows) == 99.0 and min(row["l"] for row in rows) == -77.0
    means = [part.mean() for part in np.array_split(values, MOST_POINTS)]
    np.testing.assert_allclose([row["v"] for row in rows], means, rtol=1e-4)


def test_not_a_number_breaks_the_line():
    lines = [{"step": step, "kl": value} for step, value in enumerate([1.0, math.nan, math.inf, 4.0])]
    rows = curve_points(metric_of("kl"), [run_of(lines)])
    assert [row["v"] for row in rows] == [1.0, None, None, 4.0]
    spec = vl_convert.vegalite_to_svg(curve_chart(metric_of("kl"), [run_of(lines)], smoothing=1.0))
    assert "NaN" not in spec
    assert curve_chart(metric_of("kl"), [run_of([{"step": s, "kl": math.nan} for s in (0, 1)])]) is None
    assert curve_chart(metric_of("kl"), [run_of([{"step": 0, "kl": 1.0}])]) is None


def test_band_is_the_logged_deviation():
    lines = [{"step": step, "reward": 0.5 * step, "reward_std": 0.25} for step in range(5)]
    assert [row["d"] for row in curve_points(metric_of("reward"), [run_of(lines)])] == [0.25] * 5


@pytest.mark.parametrize(
    ("values", "scale"), [((1.0, 300.0), "log"), ((1.0, 20.0), "linear"), ((0.0, 300.0), "linear")]
)
def test_logarithmic_axis_where_values_span_decades(values, scale):
    lines = [{"step": step, "loss": value} for step, value in enumerate(values)]
    spec = vl_convert.vegalite_to_vega(curve_chart(metric_of("loss"), [run_of(lines)]))
    assert next(one["type"] for one in spec["scales"] if one["name"] == "y") == scale


def test_frontier_pairs_each_evaluation_with_the_reward_since_the_one_before():
    lines = [{"step": step, "reward": float(step)} for step in range(1, 21)]
    lines += [{"step": step, "eval_frechet_distance": fd} for step, fd in ((0, 5.0), (10, 6.0), (20, 8.0))]
    rows = rows_of({"data": [frontier_chart(metric_of("reward"), [run_of(lines)])["data"]]})
    assert [(row["s"], row["x"], row["y"], row["end"]) for row in rows] == [(10, 6.0, 5.5, 0), (20, 8.0, 15.5, 1)]
    assert frontier_chart(metric_of("reward"), [run_of(lines[:20])]) is None


# --- time ---


def test_speed_leaves_evaluations_out():
    lines = [
        {"step": 0, "time": 8.0, "eval_frechet_distance": 1.0},
        {"step": 10, "time": 18.0, "loss": 1.0},
        {"step": 20, "time": 28.0, "loss": 1.0},
        {"step": 20, "time": 48.0, "eval_frechet_distance": 1.0},
        {"step": 30, "time": 58.0, "loss": 1.0},
    ]
    add_speed(lines, images_per_step=4)
    assert [line.get("seconds_per_step") for line in lines] == [None, 1.0, 1.0, None, 1.0]
    assert lines[1]["images_per_second"] == 4.0
    assert time_spent(lines) == {"total": 58.0, "evaluation": 28.0}
    assert time_spent([]) == {"total": 0.0, "evaluation": 0.0}


# --- figures ---


def test_change_over_a_run_with_its_spread():
    change = change_of(metric_of("reward"), run_of([{"step": s, "reward": float(s % 2)} for s in range(40)]))
    assert (change.before, change.after, change.averaged) == (0.5, 0.5, 4)
    assert change.spread == pytest.approx(np.std([0, 1, 0, 1], ddof=1))
    once = change_of(metric_of("eval_diversity"), run_of([{"step": 20, "eval_diversity": 0.9}]))
    assert once.before is None and once.after == 0.9 and once.first_step == 20
    assert change_of(metric_of("eval_diversity"), run_of([{"step": 20}])) is None


def test_runs_that_differ_in_the_seed_alone_are_averaged():
    recipes = [{"beta": 0.1, "seed": 0}, {"beta": 0.1, "seed": 1}, {"beta": 0.2, "seed": 0}, {"beta": 0.2, "seed": 0}]
    runs = [run_of([{"step": 1, "kl": float(i)}], recipe=recipe) for i, recipe in enumerate(recipes)]
    assert seed_groups(runs) == [[0, 1]]
    changes = [change_of(metric_of("kl"), run) for run in runs]
    assert over_seeds(changes, [0, 1]) == "0.5 ± 0.71"
    assert over_seeds([None, *changes], [0, 1]) == ""


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


# --- samples ---


def test_grids_keep_the_first_and_the_last_and_fit_the_budget(tmp_path):
    folder = make_run(tmp_path / "a", rl_lines())
    add_grids(folder, list(range(0, 1000, 10)))
    noise = np.random.default_rng(0).integers(0, 255, (SIDES[0], SIDES[0], 3), dtype=np.uint8)
    for step in range(0, 60, 10):
        Image.fromarray(noise).save(folder / "samples" / f"exploration_step_{step}.png", compress_level=0)
    small, large = sample_strips(load_runs([folder]))
    assert (small["title"], large["title"]) == ("", "exploration")
    assert len(small["grids"]) == MOST_GRIDS and small["of"] == 100
    assert (small["grids"][0]["step"], small["grids"][-1]["step"]) == (0, 990)
    assert small["grids"][0]["src"].startswith("data:image/png;")  # a small file is embedded as it is
    assert (large["grids"][0]["step"], large["grids"][-1]["step"]) == (0, 50)
    assert sum(len(grid["src"]) for strip in (small, large) for grid in strip["grids"]) <= BUDGET
    assert all(max(grid["width"], grid["height"]) <= SIDES[0] for grid in large["grids"])


# --- for papers ---


def test_figures_and_tables_for_papers(tmp_path):
    a, b = (make_run(tmp_path / name, rl_lines(), f"method: grpo\nseed: {seed}\n") for seed, name in enumerate("a|"))
    (csv_file, markdown) = export.write_csv([a], tmp_path / "x.csv"), export.write_markdown([a, b], tmp_path / "x.md")
    rows = list(csv.DictReader(csv_file.open()))
    assert {"run": "a", "step": "20", "metric": "eval_frechet_distance", "value": "6.1"} in rows
    text = markdown.read_text(encoding="utf-8")
    assert "| Fréchet distance (lower is better) | 6 → 6.1 | 6 → 6.1 | 6.1 ± 0 |" in text and "| \\| |" in text
    files = export.write_figures([a, b], tmp_path / "figures", "png")
    assert {"reward.png", "eval_frechet_distance.png", "frontier_reward.png"} - {file.name for file in files} == {
        "frontier_reward.png"  # its two evaluations give the reward one point
    }
    assert all(Image.open(file).size[0] > 1000 for file in files)
    with pytest.raises(ValueError, match="cannot be written"):
        export.write_figures([a], a / "recipe.yaml", "png")
