"""The examples run from top to bottom, shortly: the scripts, which build on each other, and the notebook."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture(scope="module")
def workplace(tmp_path_factory) -> Path:
    """A folder in which python_api.py has been run: the other scripts build on it."""
    folder = tmp_path_factory.mktemp("examples")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        script("python_api").main(max_steps=4)
    return folder


def script(name: str) -> ModuleType:
    specification = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def test_python_api_trains_all_three(workplace):
    grids = {path.relative_to(workplace / "runs/examples").as_posix() for path in workplace.rglob("step_*.png")}
    assert grids == {f"{run}/samples/step_00000{step}.png" for run, steps in
                     (("teacher", "04"), ("student", "04"), ("rl", "01")) for step in steps}  # fmt: skip


def test_custom_reward_moves_the_ink(workplace, monkeypatch):
    monkeypatch.chdir(workplace)
    before, after = script("custom_reward").main(max_steps=4)
    assert before != after
    assert (workplace / "runs/examples/bold/bold.png").exists()


def test_evaluate_and_compare_prints_deviations(workplace, monkeypatch, capsys):
    monkeypatch.chdir(workplace)
    table = script("evaluate_and_compare").main(num_images=20, redraws=2)
    assert len(table) == 4 and table["frechet_distance"][0] > 0
    output = capsys.readouterr().out
    assert output.count(" -> ") == 4 and " deviations\n" in output  # a figure may be the same in all draws


def test_the_notebook_runs_from_top_to_bottom(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TOUR_STEPS", "4")
    notebook = json.loads((EXAMPLES / "tour.ipynb").read_text())
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert all(cell["outputs"] == [] for cell in cells)  # kept clean: what a reader sees is what they ran
    space: dict = {"__name__": "__main__"}
    for cell in cells:
        exec(compile("".join(cell["source"]), cell["id"], "exec"), space)
    assert (space["FOLDER"] / "report.html").exists()
