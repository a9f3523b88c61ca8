"""Evaluation in several real processes: the same images, no process left behind, and an evaluation that continues."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import psutil
from tiny_evaluation import save_student

from marval_rl.cli.main import main

# Notes each batch that it scores, and while the file `hang` is there stays in a process's third one.
REWARD = """
import os, pathlib, time
HERE = pathlib.Path(__file__).parent

class Watched:
    calls = 0

    def __call__(self, *, images, **columns):
        self.calls += 1
        with open(HERE / "log", "a") as log:
            log.write(f"{os.getpid()} {images.double().sum().item()!r}\\n")
        while self.calls == 3 and (HERE / "hang").exists():
            time.sleep(0.1)
        return images.mean(dim=(1, 2, 3))
"""
NUM_IMAGES, BATCH_SIZE = 20, 2
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}


def read_log(folder: Path) -> list[list[str]]:
    file = folder / "log"
    return [line.split() for line in file.read_text().splitlines()] if file.exists() else []


def wait_until(done: Callable[[], bool], process: subprocess.Popen | None = None) -> None:
    deadline = time.monotonic() + 120
    while not done():
        assert time.monotonic() < deadline and (process is None or process.poll() is None)
        time.sleep(0.05)


def has_ended(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def test_after_a_kill_torchrun_completes_the_images_that_one_process_generates(tmp_path):
    student = save_student(tmp_path / "student")
    (tmp_path / "reward.py").write_text(REWARD)
    (tmp_path / "hang").touch()

    def arguments(name: str) -> list[str]:
        return [
            *("evaluate", str(student), "--steps", "2"),
            *("--num_images", str(NUM_IMAGES), "--batch_size", str(BATCH_SIZE)),
            *("--images_dir", str(tmp_path / name), "--output", str(tmp_path / f"{name}.json")),
            *("--rewards", f"{tmp_path / 'reward.py'}:Watched"),
        ]

    command = [sys.executable, "-m", "marval_rl", *arguments("two"), "--num_processes", "2"]
    process = subprocess.Popen(command, env=ENVIRONMENT)  # the workers end when it is gone
    wait_until(lambda: len(read_log(tmp_path)) == 6, process)
    process.kill()
    process.wait()
    workers = {int(pid) for pid, _ in read_log(tmp_path)}
    assert len(workers) == 2
    wait_until(lambda: all(map(has_ended, workers)))

    images, measures = tmp_path / "two" / "images", tmp_path / "two" / "measures"
    assert sorted(file.stem for file in measures.glob("*.safetensors")) == [f"{batch:06d}" for batch in range(4)]
    generated = {file: file.stat().st_mtime_ns for file in images.glob("*.png")}
    assert len(generated) == 12  # the third batch of each process is generated but not yet scored
    assert not (tmp_path / "two.json").exists()

    (tmp_path / "hang").unlink()
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    subprocess.run([*launcher, "-m", "marval_rl", *arguments("two")], env=ENVIRONMENT, check=True, timeout=120)
    assert {file: file.stat().st_mtime_ns for file in generated} == generated
    times_scored = Counter(batch for _, batch in read_log(tmp_path))
    assert sorted(times_scored.values()) == [1] * 8 + [2] * 2
    assert len({pid for pid, _ in read_log(tmp_path)}) == 4

    assert main(arguments("one")) == 0
    names = [f"{index:06d}.png" for index in range(NUM_IMAGES)]
    assert sorted(os.listdir(images)) == names
    for name in names:
        assert (images / name).read_bytes() == (tmp_path / "one" / "images" / name).read_bytes()
    two, one = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("two", "one"))
    figures = [name for name, value in one.items() if isinstance(value, float) and "per_" not in name]
    assert len(figures) > 5 and {name: two[name] for name in figures} == {name: one[name] for name in figures}
    assert (two["settings"]["processes"], one["settings"]["processes"]) == (2, 1)
