"""The examples run from top to bottom, shortly: the scripts, which build on each other, and the notebook."""

from __future__ import annotations

import ast
import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture(scope="module")
def workplace(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("examples")


def script(name: str) -> ModuleType:
    specification = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def test_the_scripts_run_one_after_the_other(workplace, monkeypatch, capsys):
    monkeypatch.chdir(workplace)
    script("python_api").main(max_steps=10)
    assert (workplace / "runs/examples/rl/samples/step_000001.png").exists()
    before, after = script("custom_reward").main(max_steps=12)
    assert before != after
    assert (workplace / "runs/examples/bold/bold.png").exists()
    table = script("evaluate_and_compare").main(num_images=20, redraws=2)
    assert len(table) == 4 and table["frechet_distance"][0] > 0
    assert "deviations" in capsys.readouterr().out


def test_the_notebook_runs_from_top_to_bottom(workplace, monkeypatch):
    monkeypatch.chdir(workplace)
    monkeypatch.setenv("TOUR_STEPS", "10")
    notebook = json.loads((EXAMPLES / "tour.ipynb").read_text())
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert all(cell["outputs"] == [] for cell in cells)  # kept clean: what a reader sees is what they ran
    space: dict = {"__name__": "__main__"}
    for cell in cells:
        text = "".join(cell["source"])
        exec(compile(ast.parse(text), cell["id"], "exec"), space)
    assert (space["FOLDER"] / "report.html").exists()
