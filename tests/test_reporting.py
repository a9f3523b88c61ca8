"""The report: what it reads, what it says, what it draws. All run folders here are made by the tests."""

from __future__ import annotations

import http.client
import json
import math
import re
import shutil
import subprocess
import threading

import pytest
from tiny_reports import (
    TagBalance,
    add_grids,
    chart_of,
    data_of,
    make_run,
    report,
    rl_lines,
    rows_of,
    text_of,
    without_scripts,
)

from marval_rl.cli import main as cli
from marval_rl.reporting import read_metrics, write_report
from marval_rl.reporting.metrics import series
from marval_rl.reporting.run_folder import load_runs
from marval_rl.reporting.watch import make_server

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


def test_a_folder_that_is_not_a_run_is_refused(tmp_path):
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
        ("recipe.yaml", "a: [", "not YAML"),
        ("evaluation.json", "{", "not JSON"),
        ("evaluation.json", "[]", "mapping"),
        ("environment.json", "3", "mapping"),
        ("samples/rows.json", "{}", "list"),
    ],
)
def test_broken_files_are_named(tmp_path, name, content, message):
    run = make_run(tmp_path / "a", rl_lines())
    (run / "samples").mkdir()
    (run / name).write_text(content)
    with pytest.raises(ValueError, match=rf"{name}.*{message}"):
        load_runs([run])


def test_runs_of_equal_name_are_distinguished(tmp_path):
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


def test_page_is_complete_and_self_contained(tmp_path):
    folders = [make_run(tmp_path / name, rl_lines()) for name in ("a", "b", "c")]
    for folder in folders:
        add_grids(folder, [0, 10, 20])
        (folder / "evaluation.json").write_text(json.dumps({"frechet_distance": 6.5, "settings": {"steps": 4}}))
    page = report(*folders)
    tags = TagBalance()
    tags.feed(without_scripts(page))
    assert not tags.open
    assert not tags.seen & {"link", "iframe", "object"} and tags.links == []
    assert "default-src 'none'; img-src data:;" in page and "connect-src 'none'" in page  # the browser refuses the rest
    assert not re.search(r"https?:|url\(|@import", without_scripts(page))
    strips = data_of(page)["strips"]
    assert [[grid["step"] for grid in strip] for strip in strips] == [[0, 10, 20]] * 3
    assert all(grid["src"].startswith("data:image/png;base64,") for strip in strips for grid in strip)


def test_text_from_runs_is_escaped(tmp_path):
    evil = "<script>\"&'"
    lines = [*rl_lines(), {"step": 21, "time": 1.0, f"{evil}": 1.0}, {"step": 22, "time": 1.0, f"{evil}": 2.0}]
    lines += [{"step": step, "time": 1.0, f"rewards/{evil}/mean": 0.5 * step, "once<b>": 1.0} for step in (23, 24)]
    lines += [{"step": 25, "time": 1.0, "only<once>": math.nan}]
    run = make_run(
        tmp_path / evil.replace("/", ""), lines, f"method: '{evil.replace(chr(39), '')}'\n'{evil[:3]}': '<i>'\n"
    )
    (run / "evaluation.json").write_text(
        json.dumps({evil: evil, "settings": {"<s>": ["<t>"]}, "per_class": {evil: {"<q>": 1.0}}})
    )
    (run / "environment.json").write_text(json.dumps({"<v>": "</script>"}))
    add_grids(run, [0])
    (run / "samples" / "rows.json").write_text(json.dumps(["</ol><w>"]))
    other = make_run(tmp_path / "b", rl_lines(), "method: '<u>'")
    for page in (report(run), report(run, other)):
        tags = TagBalance()
        tags.feed(without_scripts(page))
        assert not tags.open and not tags.seen & {"script", "t", "s", "q", "v", "w", "once", "sc", "u", "b<"}
        assert page.count("<script") == 3 == page.count("</script>")
        assert "&lt;script&gt;" in page


def test_before_and_after(tmp_path):
    page = text_of(report(make_run(tmp_path / "a", rl_lines(fd=(6.25, 5.75)))))
    assert "Fréchet distance lower is better, floor 1.08 6.25 → 5.75 \N{MINUS SIGN}0.5 , between 5.75 and 6.25" in page
    assert "Held out classifier, log-probability higher is better \N{MINUS SIGN}0.2 → \N{MINUS SIGN}0.1 +0.1" in page
    # The reward is noisy in training: first and last tenth, here the means of steps 1, 2 and of 19, 20.
    assert "in training \N{MINUS SIGN}0.925 → \N{MINUS SIGN}0.025 ± 0.035 +0.9 , means of 2" in page


def test_several_runs_share_axes_and_are_compared(tmp_path):
    a = make_run(tmp_path / "low", rl_lines(fd=(6.0, 5.0)), "method: grpo\nbeta: 0.1\nseed: 7\noutput_dir: x\n")
    b = make_run(tmp_path / "high", rl_lines(fd=(6.0, 9.0)), "method: grpo\nbeta: 0.4\nseed: 7\noutput_dir: y\n")
    page = report(a, b)
    rows = rows_of(chart_of(page, "Fréchet distance"))
    assert [(row["r"], row["s"], row["v"]) for row in rows] == [(0, 0, 6.0), (0, 20, 5.0), (1, 0, 6.0), (1, 20, 9.0)]
    path = rows_of(chart_of(page, "Held out classifier, log-probability", "frontier"))
    assert [(row["run"], row["x"], row["end"]) for row in path][2:] == [("high", 6.0, 0), ("high", 9.0, 1)]
    assert "where they differ low high beta 0.1 0.4 low" in text_of(page)
    assert 'class="run" value="1"' in page


def test_missing_figures_and_files_are_named(tmp_path):
    lines = [{key: value for key, value in line.items() if key not in ("kl", "eval_diversity")} for line in rl_lines()]
    page = text_of(report(make_run(tmp_path / "a", lines)))
    assert "Not logged: KL (beta above 0 turns it on)." in page
    assert "Not logged: diversity, mode coverage (null: not defined for these classes)." in page
    assert "There is no samples/ yet." in page and "There is no evaluation.json yet." in page


def test_missing_figures_are_named_for_each_run(tmp_path):
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
    assert "Too few finite values for a curve: Fréchet distance 6, Diversity 0.9." in one_line


@pytest.mark.parametrize("auxiliary", [{}, {"auxiliary_loss": 0.5}])
def test_pretraining_and_distillation(tmp_path, auxiliary):
    lines = [{"step": step, "time": 1.0 * step, "loss": 1.0 / step} | auxiliary for step in range(1, 40)]
    lines += [{"step": 20 * k, "time": 1.0, "eval_frechet_distance": 300.0 / (1 + 40 * k)} for k in range(3)]
    page = report(make_run(tmp_path / "a", lines, "learning_rate: 1e-3\n"))
    assert f"{'Distillation' if auxiliary else 'Pretraining'} · 40 training steps" in page
    assert "<h2>Rewards</h2>" not in page and "<h2>Policy</h2>" not in page
    assert ("Loss of the auxiliary network" in page) == bool(auxiliary)
    assert "GRPO loss" not in page


def test_judge_with_the_name_of_a_reward_is_marked(tmp_path):
    page = report(make_run(tmp_path / "a", rl_lines()))
    assert "<b>Classifier, accuracy</b> <em>trained on</em>" in page
    label = "<b>Held out classifier, log-probability</b>"
    assert label in page and f"{label} <em>" not in page


def test_classes_rows_and_environment_are_shown_where_the_run_has_them(tmp_path):
    run = make_run(tmp_path / "a", rl_lines())
    add_grids(run, [0, 20])
    (run / "samples" / "rows.json").write_text('["cat", "dog"]')
    (run / "evaluation.json").write_text('{"per_class": {"cat": {"accuracy": 0.5}, "dog": {"accuracy": null}}}')
    (run / "environment.json").write_text('{"torch": "2.14.1"}')
    page = report(run)
    assert page.count("<li>cat</li><li>dog</li>") == 2  # before training, and at the slider
    assert "Each class class accuracy cat 0.5 dog none" in text_of(page)
    assert "Environment All 1 versions torch 2.14.1" in text_of(page)


def test_long_run_stays_a_small_page(tmp_path):
    def size(name: str, steps: int) -> int:
        lines = [{"step": step, "time": 1.0, "loss": math.sin(step)} for step in range(1, steps + 1)]
        return len(report(make_run(tmp_path / name, lines, "seed: 0\n")))

    assert size("long", 20_000) - size("short", 2) < 60_000


# --- while a run goes ---


def test_watched_page_changes_with_its_run(tmp_path):
    run = make_run(tmp_path / "a", rl_lines(steps=4), finished=False)

    def get(path: str, host: str = "127.0.0.1") -> tuple[int, str]:
        connection = http.client.HTTPConnection(*server.server_address, timeout=60)
        connection.request("GET", path, headers={"Host": host})
        answer = connection.getresponse()
        return answer.status, answer.read().decode("utf-8")

    with make_server([run], port=0) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        version = get("/version")[1]
        status, page = get("/")
        assert status == 200 and data_of(page)["version"] == version and "connect-src 'self'" in page
        with (run / "metrics.jsonl").open("a") as file:
            file.write('{"step": 5, "time": 9.0, "loss": 0.5}\n')
        assert get("/version")[1] != version and "5 training steps" in get("/")[1]
        with pytest.raises(ValueError, match="choose another with --port"):
            make_server([run], server.server_address[1])
        (run / "recipe.yaml").write_text("a: [")  # half written: said, and tried again
        assert "is not YAML" in get("/")[1] and 'http-equiv="refresh"' in get("/")[1]
        assert get("/metrics.jsonl")[0] == 404 and get("/", host="evil.example")[0] == 403
        server.shutdown()


def test_watch_writes_no_file(tmp_path, capsys):
    run = make_run(tmp_path / "a", rl_lines())
    assert cli.main(["report", str(run), "--watch", "--format", "csv"]) == 2
    assert "leave out --format and --output" in capsys.readouterr().err


# --- in a browser, where this machine has one ---

CHECKS = """<script type="module">
const seen = [];
addEventListener("error", event => seen.push(event.message));
addEventListener("securitypolicyviolation", event => seen.push(event.violatedDirective));
const wait = () => new Promise(done => setTimeout(done, 50));
while (!("drawn" in document.body.dataset)) await wait();
const cells = () => [...document.querySelectorAll(".sortable tbody tr")].map(row => row.cells[0].textContent).join();
const image = document.querySelector(".samples:not([data-pinned]) img"), slider = document.getElementById("training");
const last = image.alt;
slider.value = 0;
slider.dispatchEvent(new Event("input"));
const before = cells();
document.querySelectorAll(".sortable th button")[1].click();
document.body.dataset.result = [last, image.alt, image.naturalWidth > 0, before, cells(),
  document.querySelectorAll(".plot svg path").length > 20, document.documentElement.scrollWidth <= innerWidth,
  "errors " + seen.join()].join(" | ");
</script></body>"""


@pytest.mark.skipif(shutil.which("chromium") is None, reason="there is no chromium: this test looks at the page in it")
def test_page_in_a_browser(tmp_path):
    run = make_run(tmp_path / "a", rl_lines())
    add_grids(run, [0, 10, 20])
    (run / "evaluation.json").write_text('{"per_class": {"cat": {"accuracy": 0.9}, "dog": {"accuracy": 0.15}}}')
    page = tmp_path / "page.html"
    page.write_text(CHECKS.join(report(run).rsplit("</body>", 1)), encoding="utf-8")
    flags = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
    flags += ["--disable-component-update", "--disable-sync", f"--user-data-dir={tmp_path / 'profile'}"]
    # Charts are drawn when the browser is idle, in real time; waiting for them uses up virtual time.
    flags += ["--window-size=600,800", "--virtual-time-budget=6000000", "--dump-dom", page.as_uri()]
    shown = subprocess.run(["chromium", "--headless", *flags], capture_output=True, text=True, timeout=120)
    assert re.search(r'data-result="([^"]*)"', shown.stdout)[1] == (
        "samples of a, step 20 | samples of a, step 0, before training | true | cat,dog | dog,cat | true | true "
        "| errors "
    )
