"""The SLURM script of docs/distributed.md in a shell: killed before and after its first checkpoint, and requeued."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from tiny_recipes import comparable_lines, run_recipe

PAGE = Path(__file__).parents[1] / "docs" / "distributed.md"
STAND_INS = {
    "srun": '#!/bin/bash\nSLURM_NODEID=0 exec "$@"\n',
    "scontrol": "#!/bin/bash\necho 127.0.0.1\necho 127.0.0.9\n",
}


def script(recipe: Path, run: Path) -> str:
    """The page's script, for one machine of one process, a tiny recipe, and plain data parallelism."""
    (text,) = re.findall(r"```[^\n]*\n(#!/bin/bash\n#SBATCH.*?)```", PAGE.read_text(), re.DOTALL)
    for old, new in (
        ("recipes/huge.yaml --output_dir runs/huge", f"{recipe} --output_dir {run}"),
        ("$((8 * SLURM_NNODES))", "$SLURM_NNODES"),
        (" --accelerate_config zero2", ""),
    ):
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    return text


@pytest.mark.timeout(600)
def test_the_script_of_the_docs_is_killed_and_requeued_until_it_is_done(tiny_runs, tmp_path):
    programs = tmp_path / "programs"
    programs.mkdir()
    stand_ins = {**STAND_INS, "marval-rl": f'#!/bin/bash\nexec {sys.executable} -m marval_rl "$@"\n'}
    for name, text in stand_ins.items():
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    settings = {"teacher": tiny_runs.teacher, "max_steps": 60, "save_steps": 30, "eval_strategy": "no"}
    undisturbed, run = tmp_path / "undisturbed", tmp_path / "run"
    assert run_recipe("distill", undisturbed, **settings) == 0
    job = tmp_path / "job.sh"
    job.write_text(script(undisturbed / "recipe.yaml", run))

    def start(until: Callable[[], bool] | None) -> tuple[int, str]:
        """Runs the job; kills it, with all its processes, when `until` holds."""
        environment = {"SLURM_NNODES": "1", "SLURM_JOB_NODELIST": "node[1-2]", "OMP_NUM_THREADS": "1"}
        environment["PATH"] = f"{programs}:{os.environ['PATH']}"
        output = tmp_path / "output.txt"
        with output.open("w") as file:
            process = subprocess.Popen(
                ["bash", str(job)],
                env=os.environ | environment,
                stdout=file,
                stderr=subprocess.STDOUT,
            )
            while process.poll() is None:
                if until is not None and until():
                    for each in (psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)):
                        each.kill()
                time.sleep(0.01)
        return process.wait(), output.read_text()

    def steps() -> int:
        return len((run / "metrics.jsonl").read_text().splitlines()) if (run / "metrics.jsonl").exists() else 0

    assert start(lambda: steps() >= 3)[0] == -signal.SIGKILL
    assert not list(run.glob("checkpoint-*")) and steps() < 30
    assert start(lambda: (run / "checkpoint-30").exists() and steps() >= 33)[0] == -signal.SIGKILL
    assert [folder.name for folder in run.glob("checkpoint-*")] == ["checkpoint-30"]
    code, output = start(None)
    assert code == 0 and "done: " in output, output
    assert comparable_lines(run) == comparable_lines(undisturbed)
    assert (run / "final/model.safetensors").read_bytes() == (undisturbed / "final/model.safetensors").read_bytes()
