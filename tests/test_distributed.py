"""All four trainers in two real processes, by plain DDP and by DeepSpeed's ZeRO 1, 2 and 3, against one process that
accumulates two micro-batches."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import distributed_work
import pytest
import torch
from distributed_work import DISTRIBUTION, STAGES, STUDENT_STEPS, TRAINERS
from forked_processes import start
from safetensors.torch import load_file
from torch import Tensor

LONGEST = 600  # seconds a launch; half a minute is usual
pytestmark = pytest.mark.timeout(LONGEST + 60)
# Sums of two processes are rounded otherwise; DDP's of two are not.
TOLERANCE = {"ddp": 0.0, "zero1": 2e-6, "zero2": 2e-6, "zero3": 2e-6}


@dataclass(frozen=True)
class Runs:
    """What the four trainers left behind."""

    stage: str
    folder: Path

    def weights(self, name: str) -> dict[str, Tensor]:
        return load_file(self.folder / f"{name}.safetensors")

    def report(self, name: str, rank: int = 0) -> dict[str, Any]:
        return json.loads((self.folder / f"{name}_{rank}.json").read_text())


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    folder = tmp_path_factory.mktemp("one")
    for name in TRAINERS:
        (folder / f"{name}_0.json").write_text(json.dumps(distributed_work.run(name, folder)))
    return Runs("one", folder)


@pytest.fixture(scope="module", params=STAGES)
def two_processes(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """One launch per stage."""
    folder = tmp_path_factory.mktemp(request.param)
    launched = start(folder, 2, distributed_work.run_all, request.param, folder)
    assert launched.wait(timeout=LONGEST) == [0, 0], launched.output()
    return Runs(request.param, folder)


@pytest.mark.parametrize("name", TRAINERS)
def test_two_processes_end_with_the_weights_of_one_that_accumulates(one_process, two_processes, name):
    expected, weights = one_process.weights(name), two_processes.weights(name)
    assert weights.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(weights[key], value, rtol=0, atol=TOLERANCE[two_processes.stage], msg=key)


@pytest.mark.parametrize("name", TRAINERS)
def test_two_processes_log_the_metrics_of_one_that_accumulates(one_process, two_processes, name):
    expected, metrics = one_process.report(name)["metrics"], two_processes.report(name)["metrics"]
    assert len(metrics) == len(expected) == distributed_work.SETTINGS["max_steps"]
    for line, reference in zip(metrics, expected, strict=True):
        assert line == pytest.approx(reference, rel=1e-5, abs=1e-6)
    assert two_processes.report(name, rank=1)["metrics"] == metrics


@pytest.mark.parametrize("name", [name for name in TRAINERS if name != "pretrain"])
def test_what_gets_no_gradient_in_a_step_does_not_move_in_it(two_processes, name):
    for rank in (0, 1):
        moved = two_processes.report(name, rank)["moved"]
        assert [step for step, which in enumerate(moved) if which["model"]] == list(STUDENT_STEPS)
        assert [step for step, which in enumerate(moved) if which["optimizer"]] == list(STUDENT_STEPS)
        assert [step for step, which in enumerate(moved) if which["average"]] == list(STUDENT_STEPS)
        assert all(which["auxiliary"] for which in moved)


@pytest.mark.parametrize("name", TRAINERS)
def test_the_final_folder_holds_the_complete_average_and_auxiliary_network(two_processes, name):
    weights, final = two_processes.weights(name), two_processes.folder / name / "final"
    files = {"average": "model.safetensors", "auxiliary": "auxiliary.safetensors"}
    for network in ("average",) if name == "pretrain" else files:
        saved = load_file(final / files[network])
        assert saved, network
        for key, value in saved.items():
            assert torch.equal(value, weights[f"{network}.{key}"]), key


def test_rows_metrics_and_errors_reach_all_processes(two_processes):
    for rank in (0, 1):
        found = two_processes.report("collectives", rank)
        assert found["rows"] == [[0], [10], [1], [11]]
        assert found["means"] == {"shared": 3.0, "own": 1.0}
        assert found["errors"] == {"own": "the disk is gone" if rank == 0 else "process 0 failed: the disk is gone"}


@pytest.mark.parametrize("name", DISTRIBUTION)
def test_the_distribution_anchor_trains_in_two_processes(two_processes, name):
    """All processes see the same losses, and only one network is trained."""
    metrics, others = (two_processes.report(name, rank)["metrics"] for rank in (0, 1))
    assert metrics == others and len(metrics) == distributed_work.SETTINGS["max_steps"]
    assert all(0 < abs(line["mmd"]) < 1 and line["grad_norm"] > 0 for line in metrics)  # unbiased: also below 0
    assert all(which["model"] for which in two_processes.report(name)["moved"])


def test_the_distribution_loss_does_not_depend_on_how_images_are_distributed(two_processes, tmp_path):
    if two_processes.stage != "ddp":
        pytest.skip("it knows nothing of the engine")
    whole = distributed_work.matching(tmp_path)
    halves = [two_processes.report("matching", rank) for rank in (0, 1)]
    for half in halves:
        assert half["losses"] == pytest.approx(whole["losses"], abs=1e-6)
    # Gradients of parameters are averaged over the processes, so each process has twice its share of the sum.
    gradients = torch.cat([torch.tensor(half["gradient"]) for half in halves]) / 2
    torch.testing.assert_close(gradients, torch.tensor(whole["gradient"]), rtol=1e-4, atol=1e-7)
    assert whole["losses"][0] != whole["losses"][1]  # the second one looked at recent images, too
