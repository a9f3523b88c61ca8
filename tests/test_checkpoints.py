"""Checkpoints are complete or absent: how they are sealed, how damage is found, and a disk that fills."""

from __future__ import annotations

import json
import resource
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from tiny_models import tiny_model
from tiny_trainers import distiller

from marval_rl.errors import CheckpointError
from marval_rl.runtime.checkpoints import (
    MANIFEST,
    STATE_FILE,
    UNFINISHED,
    CheckpointWriter,
    Layout,
    checkpoints_in,
    complete_checkpoints,
    find_problem,
    layout_of,
)
from marval_rl.runtime.resume import find_checkpoint
from marval_rl.trainers.base import MARTrainer
from marval_rl.trainers.distill import DistillTrainer


def saving_trainer(folder: Path, **settings: object) -> DistillTrainer:
    return distiller(folder, tiny_model(), **{"max_steps": 6, "save_strategy": "steps", "save_steps": 2, **settings})


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run that kept its checkpoints 4 and 6."""
    folder = tmp_path_factory.mktemp("run")
    saving_trainer(folder, save_total_limit=2).train()
    return folder


@pytest.fixture
def copy(run, tmp_path) -> Path:
    shutil.copytree(run, tmp_path / "copy")
    return tmp_path / "copy"


def test_the_newest_are_kept_and_nothing_unfinished(run):
    assert [folder.name for folder in checkpoints_in(run)] == ["checkpoint-4", "checkpoint-6"]
    assert not (run / UNFINISHED).exists()
    assert [find_problem(folder) for folder in checkpoints_in(run)] == [None, None]


def test_the_manifest_lists_every_file_and_who_wrote_it(run):
    folder = run / "checkpoint-6"
    manifest = json.loads((folder / MANIFEST).read_text())
    assert manifest["step"] == 6 and layout_of(folder) == Layout(world_size=1, zero_stage=None)
    assert manifest["files"].keys() == {path.name for path in folder.iterdir()} - {MANIFEST}
    assert manifest["versions"]["torch"] != "not installed"


def test_a_checkpoint_is_visible_only_when_it_is_complete(tmp_path, monkeypatch):
    """At each call that writes a file of the checkpoint, the run's folder holds complete ones only."""
    seen = []
    original = MARTrainer._save_optimizer_and_scheduler

    def look(self: MARTrainer, output_dir: str) -> None:
        seen.append(([find_problem(folder) for folder in checkpoints_in(tmp_path)], Path(output_dir).parent.name))
        original(self, output_dir)

    monkeypatch.setattr(MARTrainer, "_save_optimizer_and_scheduler", look)
    saving_trainer(tmp_path, save_total_limit=1).train()
    assert seen == [([], UNFINISHED), ([None], UNFINISHED), ([None], UNFINISHED)]


def truncate(path: Path) -> str:
    path.write_bytes(path.read_bytes()[:-1])
    return f"{path.name} has {path.stat().st_size} bytes where {path.stat().st_size + 1} were written"


def flip_a_bit(path: Path) -> str:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    return f"{path.name} is not what was written"


def remove(path: Path) -> str:
    path.unlink()
    return f"{path.name} is missing"


DAMAGES = [
    ("optimizer.pt", truncate),
    ("model.safetensors", flip_a_bit),
    ("buffer_0.safetensors", remove),
    (STATE_FILE, truncate),
]


@pytest.mark.parametrize(("file", "harm"), DAMAGES, ids=[f"{file}-{harm.__name__}" for file, harm in DAMAGES])
def test_a_damaged_checkpoint_is_passed_over_and_refused_by_name(copy, capsys, file, harm):
    newest = copy / "checkpoint-6"
    wrong = harm(newest / file)
    assert find_checkpoint(copy, "latest") == copy / "checkpoint-4"
    message = capsys.readouterr().out
    assert message.startswith(f"{newest} is damaged ({wrong}") and message.endswith(
        f"; resuming from {copy}/checkpoint-4\n"
    )
    with pytest.raises(CheckpointError, match=f"checkpoint-6 is not a complete checkpoint: {wrong}"):
        find_checkpoint(copy, str(newest))


def test_a_damaged_manifest_is_noticed(copy):
    (copy / "checkpoint-6" / MANIFEST).write_text('{"format": 1, "fil')
    assert find_problem(copy / "checkpoint-6") == "manifest.json is damaged"


def test_a_missing_manifest_is_noticed(copy):
    (copy / "checkpoint-6" / MANIFEST).unlink()
    assert find_problem(copy / "checkpoint-6") == "manifest.json is missing"
    assert find_checkpoint(copy, "latest") == copy / "checkpoint-4"


def test_unfinished_checkpoints_of_a_killed_run_are_removed_and_never_resumed(copy):
    torn = copy / UNFINISHED / "checkpoint-8"
    shutil.copytree(copy / "checkpoint-6", torn)
    assert find_checkpoint(copy, "latest") == copy / "checkpoint-6"
    saving_trainer(copy, max_steps=7).train(resume_from_checkpoint=str(copy / "checkpoint-6"))
    assert not (copy / UNFINISHED).exists()


def test_a_torn_checkpoint_of_the_same_step_is_replaced(copy):
    remove(copy / "checkpoint-6" / "optimizer.pt")
    saving_trainer(copy).train(resume_from_checkpoint=str(copy / "checkpoint-4"))
    assert find_problem(copy / "checkpoint-6") is None


def test_the_files_of_each_process_must_be_there(tmp_path):
    """Machines that do not share the folder would write a checkpoint that none of them can resume."""
    writer = CheckpointWriter(tmp_path, 3, Layout(world_size=2), save_total_limit=2)
    writer.begin()
    (writer.folder / "buffer_0.safetensors").touch()
    with pytest.raises(CheckpointError, match="the files of process 1 are missing: output_dir must be one folder"):
        writer.seal()
    assert checkpoints_in(tmp_path) == []


# A disk that fills


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Within this context no file of this process can be larger, as on a disk with so much room."""
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize(
    ("size", "written"),
    [(1_000, "{}"), (50_000, "{}/checkpoint-8"), (110_000, "{}/checkpoint-8")],
    ids=["anything", "the average", "the weights"],
)
def test_a_disk_that_fills_stops_the_run_and_takes_nothing_away(copy, size, written):
    metrics = (copy / "metrics.jsonl").read_text()
    trainer = saving_trainer(copy, max_steps=9)
    with largest_file(size), pytest.raises(CheckpointError) as raised:
        trainer.train(resume_from_checkpoint=str(copy / "checkpoint-6"))
    message = str(raised.value)
    assert message.startswith(f"{written.format(copy)} could not be written: ")
    assert message.endswith(
        f" GB are free there, make room first); {copy / 'checkpoint-6'} is complete, --resume continues from it"
    )
    assert [find_problem(folder) for folder in checkpoints_in(copy)] == [None, None]
    assert not (copy / UNFINISHED).exists()
    assert (copy / "metrics.jsonl").read_text().startswith(metrics)
    saving_trainer(copy, max_steps=9).train(resume_from_checkpoint=str(complete_checkpoints(copy)[-1]))
    assert (copy / "final" / "model.safetensors").exists()


def test_with_a_disk_that_is_full_from_the_start_the_error_says_that_there_is_no_checkpoint(tmp_path):
    with (
        largest_file(1_000),
        pytest.raises(CheckpointError, match=r"; there is no checkpoint yet"),
    ):
        saving_trainer(tmp_path).train()


# Another number of processes


def written_by_two(checkpoint: Path) -> str:
    manifest = json.loads((checkpoint / MANIFEST).read_text())
    manifest["layout"]["world_size"] = 2
    (checkpoint / MANIFEST).write_text(json.dumps(manifest))
    return str(checkpoint)


def test_a_step_that_needs_the_state_of_other_processes_is_refused(copy):
    """The auxiliary network's steps 4 and 5 learn from the sample that each process drew in step 3."""
    checkpoint = written_by_two(copy / "checkpoint-4")
    with pytest.raises(CheckpointError, match=r"written by 2 processes, and this run has 1 process: step 4 continues"):
        saving_trainer(copy).train(resume_from_checkpoint=checkpoint)


def test_a_step_that_draws_afresh_fits_any_number_of_processes(copy, capsys):
    trainer = saving_trainer(copy, max_steps=7)
    trainer.train(resume_from_checkpoint=written_by_two(copy / "checkpoint-6"))
    assert trainer.state.global_step == 7
    assert "was written by 2 processes, and this run has 1 process: its state is resharded" in (capsys.readouterr().out)
