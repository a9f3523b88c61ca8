"""Two real processes: a full disk, a step that is not finite, and a resume under another layout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from forked_processes import start
from layout_work import work
from safetensors.torch import load_file
from torch.testing import assert_close

pytestmark = pytest.mark.timeout(900)  # the first test waits for the processes of all

WRITTEN = ("ddp", "zero2", "zero3")
AMONG_TWO = ("zero2:zero1", "zero2:zero3", "zero3:zero2")
IN_ONE = ("zero2:ddp", "ddp:ddp", "zero2:zero2", "zero3:zero3")
# Between two stages the same sums come out in another order. Momentum left behind would move a weight by about 1e-4.
TOLERANCE = 1e-6


def run(folder: Path, processes: int, *tasks: str) -> list[dict[str, Any]]:
    """What each process found."""
    launched = start(folder, processes, work, folder, tasks)
    codes = launched.wait(timeout=840)
    assert codes == [0] * processes, launched.output()
    return [json.loads((folder / f"found_{processes}_{rank}.json").read_text()) for rank in range(processes)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("layouts")


@pytest.fixture(scope="module")
def two(folder) -> list[dict[str, Any]]:
    return run(folder, 2, *WRITTEN, *AMONG_TWO)


@pytest.fixture(scope="module")
def one(folder, two) -> list[dict[str, Any]]:
    return run(folder, 1, *IN_ONE)


@pytest.mark.parametrize("layout", WRITTEN)
def test_a_disk_that_is_full_for_one_process_stops_both_with_the_same_error(two, folder, layout):
    message = two[0][layout]["full"]
    assert two[1][layout]["full"] == message
    copy = folder / f"{layout}_full"
    assert message.startswith(f"{copy}/checkpoint-5 could not be written: process 1: ")
    assert message.endswith(f"; {copy}/checkpoint-3 is complete, --resume continues from it")


@pytest.mark.parametrize("layout", WRITTEN)
def test_a_loss_that_is_nan_in_one_process_moves_nothing_in_either(two, layout):
    """Neither weights nor average nor optimizer; and the steps around it do."""
    for found in two:
        assert found[layout]["moved"] == [True, False, True]
        assert found[layout]["skipped"] == [None, 1.0, None]


@pytest.mark.parametrize(
    ("processes", "task"), [(2, task) for task in AMONG_TWO] + [(1, task) for task in IN_ONE if task != "zero2:ddp"]
)
def test_a_run_that_continues_under_another_layout_ends_with_the_same_weights(two, one, folder, processes, task):
    found = two if processes == 2 else one
    assert [report[task] for report in found] == [None] * processes
    written, layout = task.split(":")
    expected = load_file(folder / f"{written}.safetensors")
    for name, value in load_file(folder / f"{written}_to_{layout}_{processes}.safetensors").items():
        assert_close(value, expected[name], rtol=0, atol=TOLERANCE, msg=lambda text, name=name: f"{name}: {text}")


def test_a_checkpoint_of_deepspeed_is_refused_by_a_plain_run(one, folder):
    checkpoint = folder / "zero2_to_ddp_1" / "checkpoint-3"
    assert one[0]["zero2:ddp"] == (
        f"{checkpoint} was written by 2 processes under ZeRO-2, and this run has 1 process: DeepSpeed's states and "
        "plain ones cannot be exchanged. Continue with 2 processes under ZeRO-2, or start a new run from its weights"
    )
