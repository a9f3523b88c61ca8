"""Two real processes of which one dies, both die, or one hangs: nothing is lost, and nobody waits for ever."""

from __future__ import annotations

import random
import re
import time

import pytest
from kill_stress import RANKS, differences, finish, kill_and_resume, launch, wait_for_step

from marval_rl.runtime.checkpoints import checkpoints_in, find_problem

STEPS = 30  # with a checkpoint every third: they take longer than the longest delay
SEED = 20260


@pytest.mark.timeout(900)  # where many share a core
def test_killed_at_random_moments_and_resumed_it_ends_with_the_same_bits(tmp_path):
    """ZeRO-2; one process is killed once, then both. More of this: kill_stress.py."""
    chance = random.Random(SEED)
    finish(tmp_path / "undisturbed", STEPS, "2")
    for ranks in ((chance.choice(RANKS),), RANKS):
        delay = chance.uniform(0, 0.5)
        print(f"seed {SEED}: ranks {ranks} are killed {delay:.3f} s after the first step")
        kill_and_resume(tmp_path / "killed", STEPS, "2", ranks, delay)
    finish(tmp_path / "killed", STEPS, "2")
    assert differences(tmp_path / "undisturbed", tmp_path / "killed", STEPS) == []


def test_a_process_that_hangs_ends_the_run_with_a_message(tmp_path):
    """Process 1 goes to sleep in step 4, like a reward that never answers. The other gives up after ddp_timeout and
    says why; the sleeping one, which no error reaches, is ended too."""
    run = launch(tmp_path, 9, "ddp", timeout=10, hang=4)
    wait_for_step(run)
    start = time.monotonic()
    assert run.wait(timeout=60) == [1, 1], run.output()
    assert time.monotonic() - start < 60
    reason = "process 1 (in step 3) did not answer within 10 s (ddp_timeout)"
    kept = tmp_path / "checkpoint-3"
    waiting, hanging = ((tmp_path / f"output_{rank}.txt").read_text() for rank in RANKS)
    assert waiting.rstrip().endswith(f"marval-rl: error: {reason}; {kept} is complete, --resume continues from it")
    assert re.search(rf"error: process 1 ends: another one found that {re.escape(reason)}$", hanging.rstrip())
    assert [find_problem(folder) for folder in checkpoints_in(tmp_path)] == [None]
