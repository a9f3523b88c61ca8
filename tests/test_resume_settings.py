"""What a run finds in its folder: settings that have changed since, an earlier run without a checkpoint, trackers."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny_recipes import comparable_lines, run_recipe

from marval_rl.runtime.resume import remove_earlier_run

SHORT = {"max_steps": 4, "save_steps": 2, "eval_strategy": "no", "lr_scheduler_type": "linear"}
FIRST = {**SHORT, "lr_scheduler_kwargs": "null", "warmup_steps": 1, "learning_rate": 1e-3}


@pytest.fixture(scope="module")
def finished(tiny_runs, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("finished") / "run"
    assert run_recipe("distill", run, teacher=tiny_runs.teacher, **FIRST) == 0
    return run


@pytest.fixture
def resume(finished, tiny_runs, tmp_path):
    """Resumes a copy of the finished run; settings win over those that it was started with."""
    run = tmp_path / "run"
    shutil.copytree(finished, run)

    def of(*flags: str, **settings: Any) -> int:
        return run_recipe(
            "distill", run, *(flags or ("--resume",)), **{"teacher": tiny_runs.teacher, **FIRST, **settings}
        )

    return of


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("learning_rate", 1e-7, "learning_rate is 1e-07, and was 0.001"),
        ("lr_scheduler_type", "cosine", "lr_scheduler_type is cosine, and was linear"),
        ("per_device_train_batch_size", 8, "per_device_train_batch_size is 8, and was 16"),
        ("gradient_accumulation_steps", 2, "gradient_accumulation_steps is 2, and was 1"),
        ("seed", 3, "seed is 3, and was 0"),
        ("student_timestep", 600, "student_timestep is 600, and was 700"),
        ("weight_decay", 0.1, "weight_decay is 0.1, and was 0.0"),
    ],
)
def test_a_resumed_run_refuses_settings_that_would_change_its_result(resume, tmp_path, complaint, name, value, message):
    recipe = (tmp_path / "run" / "recipe.yaml").read_text()
    line = complaint(2, resume(**{name: value}))
    assert message in line and "start a new run from its weights" in line and "recipe.yaml" in line
    assert (tmp_path / "run" / "recipe.yaml").read_text() == recipe


def test_another_length_counts_from_the_next_step_on_and_is_printed(resume, tmp_path, capsys):
    run = tmp_path / "run"
    assert resume(max_steps=8, logging_steps=2, save_steps=4, eval_strategy="steps", eval_steps=8) == 0
    output = capsys.readouterr().out
    for message in (
        "max_steps is 8, and was 4",
        "logging_steps is 2.0, and was 1.0",
        "eval_strategy is steps, and was no",
    ):
        assert f"from here on {message}" in output
    rates = {line["step"]: line["learning_rate"] for line in comparable_lines(run) if "learning_rate" in line}
    # The first four steps followed the old slope, the others follow the new one.
    assert [rates[step] for step in (1, 2, 3, 4)] == pytest.approx([0.0, 1e-3, 1e-3 * 2 / 3, 1e-3 / 3])
    assert [rates[step] for step in (6, 8)] == pytest.approx([1e-3 * 3 / 7, 1e-3 / 7])
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    assert recipe["max_steps"] == 8 and recipe["learning_rate"] == 1e-3


def test_the_step_after_a_longer_resumption_is_taken_at_the_new_rate(resume, finished, monkeypatch):
    from marval_rl.trainers.base import MARTrainer

    taken = {}
    original = MARTrainer.training_step

    def training_step(self: MARTrainer, *args: Any, **kwargs: Any) -> Any:
        taken[self.state.global_step] = self.optimizer.param_groups[0]["lr"]
        return original(self, *args, **kwargs)

    monkeypatch.setattr(MARTrainer, "training_step", training_step)
    assert resume(max_steps=8) == 0
    assert taken[4] == pytest.approx(1e-3 * 4 / 7)  # and not 0, at which the first part ended


def test_the_same_settings_say_nothing(resume, capsys):
    assert resume() == 0
    assert "from here on" not in capsys.readouterr().out


def test_resuming_and_overwriting_contradict_each_other(resume, tmp_path, complaint):
    assert "--resume keeps the run that overwrite_output_dir deletes" in complaint(2, resume(overwrite_output_dir=True))
    assert (tmp_path / "run" / "checkpoint-4").exists()


def test_the_wish_to_overwrite_is_not_recorded(resume, tmp_path):
    assert resume("--dry_run") == 0
    assert resume("--overwrite_output_dir", "true") == 0
    assert "overwrite_output_dir" not in yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())
    assert resume() == 0


# An earlier run without a checkpoint


@pytest.mark.parametrize("flags", [("--resume", "auto"), ()])
def test_a_run_that_ended_before_its_first_checkpoint_starts_from_the_beginning(finished, tiny_runs, tmp_path, flags):
    run = tmp_path / "run"
    (run / "samples").mkdir(parents=True)
    (run / "metrics.jsonl").write_text('{"step": 1, "time": 0.1, "loss": 7}\n')
    assert run_recipe("distill", run, *flags, teacher=tiny_runs.teacher, **FIRST) == 0
    assert comparable_lines(run) == comparable_lines(finished)


def test_auto_resumes_from_a_checkpoint(resume, tmp_path, capsys):
    shutil.rmtree(tmp_path / "run" / "checkpoint-4")
    shutil.rmtree(tmp_path / "run" / "final")
    before = comparable_lines(tmp_path / "run")
    assert resume("--resume", "auto") == 0
    assert comparable_lines(tmp_path / "run") == before
    assert "checkpoint-2" in {path.name for path in (tmp_path / "run").iterdir()}


@pytest.mark.parametrize("flags", [("--resume", "auto"), ("--resume",), ()])
def test_damaged_checkpoints_are_never_deleted_unasked_and_no_message_leads_back(tiny_runs, tmp_path, complaint, flags):
    (tmp_path / "run" / "checkpoint-2").mkdir(parents=True)
    code = run_recipe("distill", tmp_path / "run", *flags, teacher=tiny_runs.teacher, **FIRST)
    line = complaint(1 if flags else 2, code)
    assert "no complete checkpoint" in line and "--overwrite_output_dir" in line
    assert "(--resume)" not in line and "without" not in line
    assert (tmp_path / "run" / "checkpoint-2").exists()


def test_auto_keeps_a_model_without_a_checkpoint(tiny_runs, tmp_path, complaint):
    (tmp_path / "run" / "final").mkdir(parents=True)
    code = run_recipe("distill", tmp_path / "run", "--resume", "auto", teacher=tiny_runs.teacher, **FIRST)
    assert "--overwrite_output_dir deletes what is there" in complaint(1, code)
    assert (tmp_path / "run" / "final").exists()


def test_a_reward_that_failed_at_once_can_be_corrected_and_started_again(train, tmp_path, complaint):
    reward = tmp_path / "reward.py"
    reward.write_text("def score(images, **_):\n    raise ValueError('no lamp')\n")
    line = complaint(1, train(reward_funcs=f"{reward}:score"))
    assert "no step was completed" in line and "start the run again" in line
    corrected = tmp_path / "corrected.py"
    corrected.write_text("def score(images, **_):\n    return images.mean(dim=(1, 2, 3))\n")
    assert train(reward_funcs=f"{corrected}:score") == 0


# Trackers


def test_overwriting_removes_the_curves_of_the_run_and_of_no_other(tmp_path):
    mine = [tmp_path / "runs" / "Nov25_host" / "events.out.tfevents.1.host.1.0"]
    mine.append(tmp_path / "runs" / "Nov25_host" / "1764.5" / "events.out.tfevents.1.host.1.1")
    other = tmp_path / "runs" / "digits" / "teacher" / "runs" / "Nov25_host" / "events.out.tfevents.2.host.2.0"
    for path in (*mine, other):
        path.parent.mkdir(parents=True)
        path.write_text("")
    (tmp_path / "runs" / "notes.txt").write_text("mine")
    remove_earlier_run(tmp_path)
    assert not any(path.exists() for path in mine) and not (tmp_path / "runs" / "Nov25_host").exists()
    assert other.exists() and (tmp_path / "runs" / "notes.txt").exists()


@pytest.mark.parametrize("tracker", ["tensorboard", "wandb", "trackio"])
def test_a_tracker_that_is_not_installed_is_named_before_work(train, tmp_path, complaint, monkeypatch, tracker):
    from marval_rl.runtime import settings

    monkeypatch.setattr(settings, "get_available_reporting_integrations", lambda: [])
    line = complaint(2, train(report_to=tracker, model=tmp_path / "nowhere"))
    assert line == f"report_to {tracker} needs a package that is not installed: pip install {tracker}"


def test_an_unknown_tracker(train, complaint):
    line = complaint(2, train(report_to="wandbb"))
    assert line.startswith("report_to wandbb is not a known tracker: none, all, ") and "wandb" in line
