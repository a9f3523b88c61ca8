"""What is installed: every package, and nothing at the top level but marval_rl."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib.resources import files
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SETUPTOOLS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]


def test_every_package_is_listed():
    mapped = {ROOT / folder: name for name, folder in SETUPTOOLS["package-dir"].items()}
    folders = [path.parent for path in (ROOT / "marval_rl").rglob("__init__.py")] + list(mapped)
    found = [mapped.get(folder) or ".".join(folder.relative_to(ROOT).parts) for folder in folders]
    assert SETUPTOOLS["packages"] == sorted(found)
    # A folder of modules without an __init__.py would be forgotten as well.
    assert {path.parent for path in (ROOT / "marval_rl").rglob("*.py")} <= set(folders)


@pytest.mark.parametrize(("package", "folder"), SETUPTOOLS["package-dir"].items())
def test_the_folders_are_imported_from_inside_marval_rl(package, folder):
    assert Path(str(files(package))) == ROOT / folder


TINY = (
    *(
        "--max_steps",
        "4",
        "--per_device_train_batch_size",
        "16",
        "--eval_num_images",
        "20",
        "--eval_unmasking_steps",
        "2",
    ),
    *("--hidden_size", "32", "--encoder_num_layers", "1", "--decoder_num_layers", "1", "--num_heads", "2"),
    *("--head_hidden_size", "32", "--head_num_layers", "1", "--eval_diffusion_steps", "4"),
    *("--lr_scheduler_type", "constant", "--lr_scheduler_kwargs", "null", "--overwrite_output_dir", "true"),
)


@pytest.mark.wheel
@pytest.mark.timeout(1200)  # about 90 s of one core, on machines that may be busy
def test_a_wheel_works_in_an_empty_folder(tmp_path):
    source = tmp_path / "source"  # without build/, since a wheel would hold its files of yesterday as well
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("marval_rl", "rewards", "recipes"):
        shutil.copytree(ROOT / name, source / name, symlinks=True)
    build = ("wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(tmp_path), str(source))
    run(tmp_path, sys.executable, "-m", "pip", *build)
    (wheel,) = tmp_path.glob("marval_rl-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"marval_rl"}
    recipes = [path.relative_to(ROOT).as_posix() for path in (ROOT / "recipes").rglob("*.yaml")]
    recipes += [f"recipes/deepspeed/{path.name}" for path in (ROOT / "marval_rl" / "presets").glob("*.json")]
    assert {f"marval_rl/shipped_{name}" for name in recipes} <= set(names)

    # A fresh environment that sees what this one has installed, but no `pip install -e` of it: a folder that a .pth
    # file names is searched, while the .pth files within it are not read.
    run(tmp_path, sys.executable, "-m", "venv", "--without-pip", "venv")
    python = str(tmp_path / "venv" / "bin" / "python")
    run(tmp_path, sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", str(wheel))
    packages = run(tmp_path, python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip()
    installed = [folder for folder in sys.path if Path(folder).name in ("site-packages", "dist-packages")]
    Path(packages, "dependencies.pth").write_text("\n".join(installed) + "\n")

    empty = tmp_path / "empty"
    empty.mkdir()
    program = str(tmp_path / "venv" / "bin" / "marval-rl")
    assert run(empty, python, "-c", "import marval_rl.rewards as found; print(found.__file__)").startswith(packages)
    assert "marval_rl.rewards.clip:Clip" in run(empty, program, "rewards", "list")
    endings = {"digits/teacher.yaml": TINY, "recipes/digits/teacher.yaml": [*TINY, "--dry_run"]}
    for recipe, options in endings.items():
        printed = run(empty, program, "pretrain", recipe, *options)
        assert f"recipe: {packages}/marval_rl/shipped_recipes/digits/teacher.yaml" in printed
        assert "output_dir: runs/digits/teacher" in printed or "done: runs/digits/teacher/final holds" in printed
    assert "report:  runs/demo/report.html" in run(empty, program, "demo", "--quick")


def run(folder: Path, *command: str) -> str:
    """What the command prints; it must end well."""
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    ended = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=900)
    assert ended.returncode == 0, f"{' '.join(command)}:\n{ended.stdout}\n{ended.stderr}"
    return ended.stdout
