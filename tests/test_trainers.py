"""The trainers: which networks they move, evaluation, averages, failures."""

from __future__ import annotations

import signal
from itertools import pairwise
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import tiny_model, tiny_student
from tiny_recipes import read_lines, run_recipe, training_lines
from tiny_trainers import (
    ANCHOR,
    assert_equal_states,
    backprop_trainer,
    distiller,
    grpo_trainer,
    logged,
    pretrainer,
    same,
    snapshot,
    snapshots_by_step,
)
from torch import Tensor

from marval_rl.trainers.distill import DistillConfig
from marval_rl.trainers.grpo_config import MARGRPOConfig
from marval_rl.trainers.pretrain import PretrainConfig
from marval_rl.trainers.reward_backprop import RewardBackpropConfig

# Who moves


@pytest.mark.parametrize("make", [distiller, grpo_trainer, backprop_trainer])
def test_both_networks_get_the_weight_decay_and_the_rate_that_are_set(tmp_path, make):
    settings = {"weight_decay": 0.07, "learning_rate": 1e-3, "auxiliary_learning_rate": 2e-3, "adam_beta1": 0.5}
    anchor = {} if make is distiller else ANCHOR
    model = tiny_model(3) if make is distiller else tiny_student(1)
    trainer = make(tmp_path, model, **settings, **anchor)
    groups = trainer.create_optimizer().param_groups
    assert [(group["lr"], group["weight_decay"], group["betas"][0]) for group in groups] == [
        (1e-3, 0.07, 0.5),
        (2e-3, 0.07, 0.5),
    ]


@pytest.mark.parametrize("kind", ["distill", "grpo", "reward_backprop"])
def test_only_the_networks_whose_turn_it_is_move(tmp_path, kind):
    teacher = tiny_model(3)
    # Decay would move weights that get no gradient, were they not left out of the step.
    settings = {"max_steps": 8, "weight_decay": 0.1, "learning_rate": 1e-2}
    if kind == "distill":
        trainer = distiller(tmp_path, teacher, **settings)
    else:
        make = {"grpo": grpo_trainer, "reward_backprop": backprop_trainer}[kind]
        extra = {"beta": 0.1, "num_iterations": 2} if kind == "grpo" else {}
        trainer = make(tmp_path, tiny_student(1), **ANCHOR, **settings, **extra)
        teacher = trainer.anchors.gsim.teacher
    modules = {"student": trainer.mar, "auxiliary": trainer.model.auxiliary, "average": trainer.ema.module}
    modules["teacher"] = teacher
    if kind == "grpo":
        modules["reference"] = trainer.anchors.reference
    states = snapshots_by_step(trainer, modules)

    assert len(states) == 9
    for step, (before, after) in enumerate(pairwise(states)):
        student_turn = step >= 3 and step % 3 == 0
        assert same(before["student"], after["student"]) != student_turn, step
        assert same(before["average"], after["average"]) != student_turn, step
        assert not same(before["auxiliary"], after["auxiliary"]), step
        assert same(before["teacher"], after["teacher"])
        if kind == "grpo":
            assert same(before["reference"], after["reference"])
    moved = {
        name for name, value in states[-1]["student"].items() if not torch.equal(value, states[0]["student"][name])
    }
    assert states[0]["student"].keys() - moved == {"fake_latent"}  # a student is never asked for the null class


@pytest.mark.parametrize("make", [grpo_trainer, backprop_trainer])
def test_without_an_anchor_there_is_no_auxiliary_network_and_each_step_moves_the_student(tmp_path, make):
    trainer = make(tmp_path, tiny_student(1), max_steps=3, learning_rate=1e-3)
    assert trainer.model.auxiliary is None and trainer.anchors.gsim is None
    states = snapshots_by_step(trainer, {"student": trainer.mar})
    assert len(states) == 4
    assert not any(same(a["student"], b["student"]) for a, b in pairwise(states))
    assert not (tmp_path / "final" / "auxiliary.safetensors").exists()
    assert not any("gsim_loss" in line or "auxiliary_loss" in line for line in trainer.state.log_history)


def test_the_anchor_pulls_the_student_whatever_the_reward_says(tmp_path):
    trainer = backprop_trainer(tmp_path, tiny_student(1), constant_but_differentiable, **ANCHOR, max_steps=4)
    start = snapshot(trainer.mar)
    trainer.train()
    assert not same(start, snapshot(trainer.mar))


def constant_but_differentiable(images: Tensor, **_: Any) -> Tensor:
    return 0 * images.sum(dim=(1, 2, 3))


constant_but_differentiable.differentiable = True


def test_the_auxiliary_network_of_the_distillation_is_taken_over(tiny_runs, tmp_path):
    settings = tiny_runs.models_of("grpo")
    # Nothing moves: both learning rates are 0, so the run writes down what it began with.
    still = {"max_steps": 1, "learning_rate": 0.0, "auxiliary_learning_rate": 0.0, "eval_on_start": False}
    assert run_recipe("grpo", tmp_path, **settings, **still, eval_steps=9, save_steps=9) == 0
    assert_equal_states(
        load_file(tmp_path / "final" / "auxiliary.safetensors"),
        load_file(tiny_runs.student / "final" / "auxiliary.safetensors"),
    )


# Evaluation, averages, failures


def test_evaluation_leaves_training_as_it_is(tmp_path):
    runs = []
    for name, settings in (("quiet", {}), ("watched", {"eval_strategy": "steps", "eval_steps": 1})):
        trainer = pretrainer(
            tmp_path / name, tiny_model(0), max_steps=3, eval_num_images=6, eval_diffusion_steps=2, **settings
        )
        trainer.train()
        runs.append(trainer)
    assert len(list((tmp_path / "watched" / "samples").glob("*.png"))) == 3
    assert logged(runs[0], "loss") == logged(runs[1], "loss")
    assert_equal_states(runs[0].mar.state_dict(), runs[1].mar.state_dict())


def test_equal_weights_give_equal_sample_grids(tmp_path):
    trainer = pretrainer(
        tmp_path,
        tiny_model(0),
        max_steps=2,
        learning_rate=0.0,
        eval_strategy="steps",
        eval_steps=1,
        eval_num_images=6,
        eval_diffusion_steps=2,
    )
    trainer.train()
    first, second = sorted((tmp_path / "samples").glob("*.png"))
    assert first.read_bytes() == second.read_bytes()


def test_a_failed_run_gives_the_signals_back(tmp_path):
    def broken(images: Tensor, **_: Any) -> Tensor:
        raise RuntimeError("no reward today")

    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(Exception, match="no reward today"):
            grpo_trainer(tmp_path, tiny_student(1), broken, max_steps=2).train()
        after = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    finally:
        signal.signal(signal.SIGINT, before[0])
        signal.signal(signal.SIGTERM, before[1])
    assert after == before


@pytest.mark.parametrize("make", [distiller, grpo_trainer, backprop_trainer])
def test_gradient_checkpointing_changes_memory_alone(tmp_path, make):
    finals = []
    for checkpointing in (False, True):
        model = tiny_model(3) if make is distiller else tiny_student(1)
        settings = {"max_steps": 4, "gradient_checkpointing": checkpointing, "auxiliary_warmup_steps": 0}
        trainer = make(tmp_path / str(checkpointing), model, **settings)
        trainer.train()
        assert trainer.mar.is_gradient_checkpointing == checkpointing
        finals.append(snapshot(trainer.mar))
    assert_equal_states(*finals)
    start = snapshot(tiny_model(3) if make is distiller else tiny_student(1))
    assert not same(finals[0], start)


@pytest.mark.parametrize("config", [PretrainConfig, DistillConfig, MARGRPOConfig, RewardBackpropConfig])
def test_the_defaults_of_the_arguments_fit_each_other(tmp_path, config):
    config(str(tmp_path))


def test_metrics_stay_json_when_a_reward_leaves_every_sample_out(tmp_path):
    trainer = grpo_trainer(tmp_path, tiny_student(1), lambda images, **_: [None] * len(images), max_steps=2)
    start = snapshot(trainer.mar)
    trainer.train()
    assert_equal_states(start, trainer.mar.state_dict())
    assert len(training_lines(tmp_path)) == 2  # refuses NaN: other readers of JSON do


def test_the_metrics_file_holds_what_the_trainer_logged(tmp_path):
    trainer = pretrainer(tmp_path, tiny_model(0), max_steps=4, logging_steps=2)
    trainer.train()
    lines = training_lines(tmp_path)
    assert [line["step"] for line in lines] == [2, 4]
    for name in ("loss", "loss_mse", "loss_vb", "grad_norm", "learning_rate"):
        assert [line[name] for line in lines] == logged(trainer, name)
    for line in lines:  # means over the steps since the last line
        assert line["loss"] == pytest.approx(line["loss_mse"] + line["loss_vb"], rel=1e-4)


def test_an_evaluation_between_two_lines_takes_nothing_from_them(tmp_path):
    settings = {"logging_steps": 2, "eval_strategy": "steps", "eval_steps": 3}
    images = {"eval_num_images": 6, "eval_diffusion_steps": 2}
    pretrainer(tmp_path, tiny_model(0), max_steps=4, **settings, **images).train()
    lines = read_lines(tmp_path)
    assert [line["step"] for line in lines if "loss_mse" in line] == [2, 4]
    for line in training_lines(tmp_path):
        assert line["loss"] == pytest.approx(line["loss_mse"] + line["loss_vb"], rel=1e-4)
