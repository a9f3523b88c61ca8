"""Limits that end a run, and the best model among those within them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import tiny_student
from tiny_recipes import read_lines
from tiny_trainers import GRPO, darkness, logged, power_cut_in_step, same, snapshot

from marval_rl.cli.main import main
from marval_rl.data import class_rows
from marval_rl.evaluation import ImageEvaluator
from marval_rl.evaluation.references import Rows
from marval_rl.models.checkpoints import load_model
from marval_rl.rewarding import RewardSet
from marval_rl.runtime.limits import Limit, broken_limit, is_new_best
from marval_rl.trainers.base import MARTrainer
from marval_rl.trainers.grpo import MARGRPOConfig, MARGRPOTrainer

EVALUATED = {"eval_strategy": "steps", "eval_steps": 2, "eval_on_start": True, "eval_num_images": 6, "max_steps": 8}


class ScriptedEvaluator(ImageEvaluator):
    """Measures what a table says of each step; of others, what it says of the step before."""

    def __init__(self, **tables: dict[int, float | None]):
        super().__init__()
        self.tables = tables
        self.trainer: MARTrainer

    def names(self, num_images: int, num_classes: int | None = None) -> list[str]:
        return list(self.tables)

    def figures(self, rows: Rows) -> dict[str, float | None]:
        now = self.trainer.state.global_step
        return {name: table[max(step for step in table if step <= now)] for name, table in self.tables.items()}


def scripted_trainer(folder: Path, figures: dict[str, dict[int, Any]], **settings: Any) -> MARGRPOTrainer:
    evaluator = ScriptedEvaluator(**figures)
    args = MARGRPOConfig(str(folder), **{**GRPO, "learning_rate": 1e-2, **EVALUATED, **settings})
    rewards = RewardSet([darkness])
    trainer = MARGRPOTrainer(tiny_student(1), rewards, args, train_dataset=class_rows(3), evaluator=evaluator)
    evaluator.trainer = trainer
    return trainer


def history(name: str, *values: float | None) -> list[dict[str, Any]]:
    return [{"step": 10 * index, name: value} for index, value in enumerate(values)]


# The two questions to a history


@pytest.mark.parametrize(
    ("limit", "values", "broken"),
    [
        (Limit("x", "max_x", 1.5, upper=True), (4.0,), False),
        (Limit("x", "max_x", 1.5, upper=True), (4.0, 6.0), False),
        (Limit("x", "max_x", 1.5, upper=True), (4.0, 6.1), True),
        (Limit("x", "max_x", 1.5, upper=True), (4.0, 6.1, 5.0), False),
        (Limit("x", "min_x", 0.5), (0.8, 0.4), False),
        (Limit("x", "min_x", 0.5), (0.8, 0.39), True),
        (Limit("x", "min_x", 0.5), (0.8, None), False),
        (Limit("x", "max_x", 0.2, relative=False, upper=True), (0.0, 0.2), False),
        (Limit("x", "max_x", 0.2, relative=False, upper=True), (0.0, 0.21), True),
        (Limit("x", "max_x", 0.2, relative=False, upper=True), (0.0, float("nan")), True),
        (Limit("x", "max_x", 0.2, relative=False, upper=True), (), False),
    ],
)
def test_a_limit_is_broken_by_the_newest_value(limit, values, broken):
    assert (broken_limit([limit], [{"step": 0, "loss": 1.0}, *history("x", *values)]) is not None) == broken


def test_the_message_of_a_broken_limit():
    limit = Limit("eval_diversity", "min_diversity", 0.9)
    assert limit.broken_by(history("eval_diversity", 0.8, 0.7)) == (
        "eval_diversity is 0.7 at step 10, below the limit 0.72 (min_diversity 0.9 x 0.8 at step 0)"
    )


def test_the_newest_value_is_the_best_if_it_beats_all_before():
    assert is_new_best("eval_reward", history("eval_reward", 1.0))
    assert is_new_best("eval_reward", history("eval_reward", 1.0, None, 2.0))
    assert not is_new_best("eval_reward", history("eval_reward", 1.0, 3.0, 2.0))
    assert not is_new_best("eval_reward", history("eval_reward", 1.0, 1.0))
    for lower in ("eval_frechet_distance", "eval_kid/pixels"):
        assert is_new_best(lower, history(lower, 2.0, 1.0)) and not is_new_best(lower, history(lower, 1.0, 2.0))


# A run


def test_a_run_that_breaks_a_limit_stops_with_a_checkpoint_and_its_final_model(tmp_path, capsys):
    figures = {"frechet_distance": {0: 10.0, 4: 12.1, 6: 9.0}}
    trainer = scripted_trainer(tmp_path, figures, max_frechet_ratio=1.2)
    trainer.train()
    assert trainer.state.global_step == 4
    assert capsys.readouterr().out.splitlines()[-1] == (
        "stopped at step 4: eval_frechet_distance is 12.1 at step 4, above the limit 12 (max_frechet_ratio 1.2 x 10 at "
        "step 0)"
    )
    assert (tmp_path / "checkpoint-4" / "trainer_state.json").is_file()
    assert same(load_model(tmp_path / "final").state_dict(), snapshot(trainer.ema.module))
    resumed = scripted_trainer(tmp_path, figures, max_frechet_ratio=1.2)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert resumed.state.global_step == 4, "a run that was stopped is over"
    relaxed = scripted_trainer(tmp_path, figures, max_frechet_ratio=1.3)
    relaxed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert relaxed.state.global_step == 8, "until its limit is moved"


@pytest.mark.parametrize("figure", ["diversity", "mode_coverage", "recall"])
def test_each_share_of_the_start_is_a_limit(tmp_path, figure):
    names = ("diversity", "mode_coverage", "recall")
    figures = {name: {0: 0.8} for name in names} | {figure: {0: 0.8, 2: 0.76, 4: 0.71, 6: 0.9}}
    trainer = scripted_trainer(tmp_path, figures, **{f"min_{name}": 0.9 for name in names})
    trainer.train()
    assert trainer.state.global_step == 4


def test_the_divergence_is_looked_at_wherever_it_is_logged(tmp_path):
    free = scripted_trainer(tmp_path / "free", {}, beta=0.01)
    free.train()
    kl = logged(free, "kl")
    step = next(index for index, value in enumerate(kl) if value > 0) + 2  # not the first that is above zero
    bound = (kl[step - 1] + max(kl[: step - 1])) / 2
    trainer = scripted_trainer(tmp_path / "run", {}, beta=0.01, max_kl=bound)
    trainer.train()
    assert trainer.state.global_step == 1 + next(index for index, value in enumerate(kl) if value > bound)


# The best model


def test_the_best_model_is_kept_with_its_step_and_value(tmp_path):
    trainer = scripted_trainer(tmp_path, {"score": {0: 1.0, 2: 3.0, 4: 2.0, 6: 3.0}}, best_metric="score")
    average, update = {}, trainer.update_average

    def update_average() -> None:
        update()
        average[trainer.state.global_step] = snapshot(trainer.ema.module)

    trainer.update_average = update_average
    next(c for c in trainer.callback_handler.callbacks if type(c).__name__ == "AverageCallback").update = update_average
    trainer.train()
    assert json.loads((tmp_path / "best" / "best.json").read_text()) == {"step": 2, "metric": "score", "value": 3.0}
    assert same(load_file(tmp_path / "best" / "model.safetensors"), average[2])
    assert same(load_model(tmp_path / "best").state_dict(), average[2])
    assert not same(average[2], average[8])
    assert not (tmp_path / "best.unfinished").exists()


def test_a_model_that_breaks_a_limit_is_not_the_best(tmp_path):
    figures = {"score": {0: 1.0, 2: 2.0, 4: 5.0}, "diversity": {0: 1.0, 4: 0.5}}
    scripted_trainer(tmp_path, figures, best_metric="score", min_diversity=0.9).train()
    assert json.loads((tmp_path / "best" / "best.json").read_text())["step"] == 2


def test_the_start_may_be_the_best(tmp_path):
    scripted_trainer(tmp_path, {"frechet_distance": {0: 1.0, 2: 2.0}}, best_metric="frechet_distance").train()
    assert json.loads((tmp_path / "best" / "best.json").read_text())["step"] == 0
    assert same(load_model(tmp_path / "best").state_dict(), tiny_student(1).state_dict())


def test_a_resumed_run_keeps_the_best_of_before(tmp_path):
    settings = {"best_metric": "score", "save_strategy": "steps", "save_steps": 4}
    figures = {"score": {0: 1.0, 2: 3.0, 4: 2.0, 6: 2.5}}
    with power_cut_in_step(5), pytest.raises(OSError, match="lights"):
        scripted_trainer(tmp_path, figures, **settings).train()
    before = load_file(tmp_path / "best" / "model.safetensors")
    trainer = scripted_trainer(tmp_path, figures, **settings)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert trainer.state.global_step == 8
    assert json.loads((tmp_path / "best" / "best.json").read_text())["step"] == 2
    assert same(load_file(tmp_path / "best" / "model.safetensors"), before)


# What is refused


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_frechet_ratio": 0.9}, "max_frechet_ratio is a ratio to the run's first evaluation, at least 1, not 0.9"),
        ({"min_diversity": 1.1}, r"min_diversity is a share of the run's first evaluation, in \(0, 1\], not 1.1"),
        ({"min_mode_coverage": 0.0}, r"min_mode_coverage is a share .* not 0.0"),
        ({"max_kl": -1.0, "beta": 0.1}, "max_kl must be positive, not -1.0"),
        ({"max_kl": 1.0}, "max_kl 1.0 needs a reference model: set beta > 0"),
        ({"min_diversity": 0.9, "eval_strategy": "no"}, 'look at evaluations, but eval_strategy is "no"'),
    ],
)
def test_a_limit_that_could_not_work_is_refused(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        MARGRPOConfig(str(tmp_path), **{**GRPO, **EVALUATED, **settings})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"best_metric": "rewards/judge/mean"}, "best_metric needs rewards/judge/mean, which evaluation does not"),
        ({"min_mode_coverage": 0.9}, "min_mode_coverage needs mode_coverage, .* it measures diversity, score$"),
    ],
)
def test_a_figure_that_is_not_measured_is_refused_when_the_trainer_is_made(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        scripted_trainer(tmp_path, {"diversity": {0: 1.0}, "score": {0: 1.0}}, **settings)


def test_a_figure_without_a_value_is_refused_before_the_first_step(tmp_path):
    figures = {"diversity": {0: 1.0}, "mode_coverage": {0: None}}
    trainer = scripted_trainer(tmp_path, figures, min_mode_coverage=0.9)
    with pytest.raises(ValueError, match=r"min_mode_coverage needs mode_coverage, .* it measures diversity$"):
        trainer.train()
    assert trainer.state.global_step == 0


# Through the command line


def test_a_stopped_run_ends_well_and_says_why(train, tiny_runs, tmp_path, capsys):
    run = tmp_path / "run"
    limits = {"beta": 0.1, "max_kl": 1e-12, "best_metric": "rewards/held_out_classifier/mean"}
    evaluated = {"max_steps": 6, "eval_strategy": "steps", "eval_on_start": True, "save_strategy": "steps"}
    assert train(**limits, **evaluated, learning_rate=1e-3) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("stopped at step 2: kl is ") and "(max_kl 1e-12)" in line for line in lines)
    assert lines[-1].startswith(f"done: {run / 'final'} holds the model")
    assert max(line["step"] for line in read_lines(run)) == 2
    best = json.loads((run / "best" / "best.json").read_text())
    judged = [line["eval_rewards/held_out_classifier/mean"] for line in read_lines(run) if "loss" not in line]
    assert best == {"step": 0, "metric": "rewards/held_out_classifier/mean", "value": judged[0]}
    assert (
        main(["sample", str(run / "best"), "--per_class", "1", "--steps", "2", "--output", str(tmp_path / "a.png")])
        == 0
    )
    assert torch.equal(load_model(run / "best").fake_latent, load_model(tiny_runs.student).fake_latent)
