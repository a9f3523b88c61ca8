"""The report: what it reads, what it says, what it draws. All run folders here are made by the tests."""

from __future__ import annotations

import json
import math
import re

import numpy as np
import pytest
from tiny_reports import TagBalance, add_grids, make_run, report, rl_lines, text_of

from marval_rl.reporting import read_metrics, write_report
from marval_rl.reporting.curves import MOST_POINTS
from marval_rl.reporting.metrics import series
from marval_rl.reporting.run_folder import load_runs

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
