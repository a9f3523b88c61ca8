"""The four trainers as a whole: what their recipes leave behind, which networks they move, and whether RL learns."""

from __future__ import annotations

import signal
from itertools import pairwise
from pathlib import Path
from statistics import mean
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file
from tiny_models import tiny_model, tiny_student
from tiny_recipes import (
    COMMANDS,
    RECIPES,
    command_line,
    comparable_lines,
    is_finite,
    read_lines,
    run_recipe,
    training_lines,
)
from torch import Tensor, nn

from marval_rl.cli import main
from marval_rl.commands.networks import ModelArguments, RewardArguments, TeacherArguments
from marval_rl.commands.sources import DataArguments
from marval_rl.data import class_rows
from marval_rl.models import MARModel
from marval_rl.models.checkpoints import load_model
from marval_rl.models.unmasking import unmasking_steps
from marval_rl.recipes import parse_recipe
from marval_rl.rewarding import RewardSet
from marval_rl.trainers import grpo as grpo_module
from marval_rl.trainers import rollout as rollout_module
from marval_rl.trainers.base import MARTrainer
from marval_rl.trainers.distill import DistillConfig, DistillTrainer
from marval_rl.trainers.grpo import MARGRPOConfig, MARGRPOTrainer
from marval_rl.trainers.pretrain import PretrainConfig, PretrainTrainer
from marval_rl.trainers.reward_backprop import RewardBackpropConfig, RewardBackpropTrainer
from marval_rl.trainers.rollout import differentiable_rollout

# What a recipe leaves behind


@pytest.fixture(scope="module")
def runs(tiny_runs, tmp_path_factory) -> dict[str, Path]:
    """The run folder of each recipe."""
    folder = tmp_path_factory.mktemp("runs")
    runs = {"teacher": tiny_runs.teacher, "distill": tiny_runs.student}
    for recipe in ("grpo", "reward_backprop"):
        runs[recipe] = folder / recipe
        assert run_recipe(recipe, runs[recipe], **tiny_runs.models_of(recipe)) == 0
    return runs


@pytest.mark.parametrize("recipe", COMMANDS)
def test_a_recipe_leaves_a_complete_run_folder(runs, recipe):
    run = runs[recipe]
    files = {path.relative_to(run).as_posix() for path in run.rglob("*") if path.is_file()}
    assert {"recipe.yaml", "metrics.jsonl", "final/config.json", "final/model.safetensors"} <= files
    assert {path.name for path in run.glob("checkpoint-*")} == {"checkpoint-3", "checkpoint-6"}
    for checkpoint in ("checkpoint-3", "checkpoint-6"):
        for file in ("model.safetensors", "optimizer.pt", "scheduler.pt", "ema.safetensors", "trainer_state.json"):
            assert f"{checkpoint}/{file}" in files
    grids = sorted(path.name for path in (run / "samples").iterdir())
    assert grids == ["step_000000.png", "step_000003.png", "step_000006.png"]
    for grid in grids:
        with Image.open(run / "samples" / grid) as picture:
            width, height = picture.size
            assert picture.mode == "RGB"
            assert (width / (2 * 9 - 1), height / (10 * 9 - 1)) == (3, 3)  # 10 classes, 2 images each, 8 pixels


@pytest.mark.parametrize("recipe", COMMANDS)
def test_final_is_the_averaged_model(runs, recipe):
    model = load_model(runs[recipe], one_step=recipe != "teacher")
    averaged = load_file(runs[recipe] / "checkpoint-6" / "ema.safetensors")
    assert averaged.pop("num_updates") == {"teacher": 6, "distill": 2, "grpo": 2, "reward_backprop": 2}[recipe]
    assert_equal_states(averaged, model.state_dict())
    assert (runs[recipe] / "final" / "auxiliary.safetensors").exists() == (recipe != "teacher")


TRAINING_NAMES = {
    "teacher": {"loss_mse", "loss_vb"},
    "distill": {"student_loss", "auxiliary_loss", "score_gap"},
    "grpo": {
        *("reward", "reward_std", "rewards/classifier/mean", "rewards/classifier/std", "frac_reward_zero_std", "kl"),
        *("clip_ratio/low_mean", "clip_ratio/high_mean", "clip_ratio/region_mean", "anchor_loss", "auxiliary_loss"),
    },
    "reward_backprop": {
        *("reward", "reward_std", "rewards/classifier/mean", "rewards/classifier/std", "anchor_loss"),
        "auxiliary_loss",
    },
}
EVALUATION_NAMES = {
    *("eval_frechet_distance", "eval_frechet_floor", "eval_diversity"),
    *(f"eval_{judge}/{what}" for judge in ("classifier", "held_out_classifier") for what in ("accuracy", "confidence")),
    *(f"eval_{judge}/log_probability" for judge in ("classifier", "held_out_classifier")),
}


@pytest.mark.parametrize("recipe", COMMANDS)
def test_the_metrics_have_the_promised_names(runs, recipe):
    lines = read_lines(runs[recipe])
    training = [line for line in lines if "loss" in line]
    assert [line["step"] for line in training] == [1, 2, 3, 4, 5, 6]
    for line in training:
        assert {"time", "loss", "learning_rate", "grad_norm"} <= line.keys()
        assert all(map(is_finite, line.values()))
    seen = set().union(*training)
    assert TRAINING_NAMES[recipe] <= seen, TRAINING_NAMES[recipe] - seen

    evaluations = [line for line in lines if "eval_frechet_distance" in line]
    assert [line["step"] for line in evaluations] == [0, 3, 6]
    rewarded = {"eval_rewards/held_out_classifier/mean"} if COMMANDS[recipe] == "train" else set()
    for line in evaluations:
        assert all(is_finite(line[name]) for name in EVALUATION_NAMES | rewarded)
        assert line["eval_mode_coverage"] is None  # a class of this labelling is one digit
        assert not line.keys() & TRAINING_NAMES[recipe]
    times = [line["time"] for line in lines]
    assert times == sorted(times) and [line["step"] for line in lines] == sorted(line["step"] for line in lines)


CONFIGS = {
    "teacher": (DataArguments, ModelArguments, PretrainConfig),
    "distill": (DataArguments, TeacherArguments, DistillConfig),
    "grpo": (DataArguments, RewardArguments, TeacherArguments, MARGRPOConfig),
    "reward_backprop": (DataArguments, RewardArguments, TeacherArguments, RewardBackpropConfig),
}


@pytest.mark.parametrize("recipe", COMMANDS)
def test_the_written_recipe_parses_back_to_the_same_settings(runs, tiny_runs, recipe):
    arguments = command_line(recipe, runs[recipe], **tiny_runs.models_of(recipe))
    given = parse_recipe(RECIPES / f"{recipe}.yaml", arguments[2:], CONFIGS[recipe])
    written = parse_recipe(runs[recipe] / "recipe.yaml", [], CONFIGS[recipe])
    for one, other in zip(given, written, strict=True):
        assert public(one) == public(other)


def public(config: Any) -> dict[str, Any]:
    """What the user sets, without the handle to the machine that transformers keeps beside it."""
    return {name: value for name, value in vars(config).items() if name[0] != "_" and name != "distributed_state"}


def test_parity_measures_mode_coverage_and_the_same_recipe_twice_gives_the_same_metrics(tmp_path):
    settings = {"labelling": "parity", "max_steps": 2, "eval_steps": 2, "eval_num_images": 12}
    assert run_recipe("teacher", tmp_path / "a", **settings) == 0
    torch.manual_seed(99)  # whatever ran before in this process must not matter
    assert main(["pretrain", str(tmp_path / "a" / "recipe.yaml"), "--output_dir", str(tmp_path / "b")]) == 0
    lines = comparable_lines(tmp_path / "a")
    assert lines == comparable_lines(tmp_path / "b")
    coverage = [line["eval_mode_coverage"] for line in lines if "eval_mode_coverage" in line]
    assert len(coverage) == 2 and all(0 <= value <= 1.5 for value in coverage)


# Trainers of tiny models: 1 x 4 x 4 pixels, 4 tokens, 3 classes

QUIET = {
    "use_cpu": True,
    "eval_strategy": "no",
    "eval_on_start": False,
    "save_strategy": "no",
    "logging_steps": 1,
    "lr_scheduler_type": "constant",
    "per_device_train_batch_size": 8,
}
GRPO = {**QUIET, "num_generations": 4, "num_unmasking_steps": 2, "sigma": 0.2}
ANCHOR = {"anchor_weight": 1.0, "anchor_batch_size": 8, "auxiliary_updates": 3, "auxiliary_warmup_steps": 3}


def grey_student() -> MARModel:
    """A student whose pixels are of all greys: few are black or white, where a reward has no slope."""
    student = tiny_student(1, one_step_timestep=400)
    with torch.no_grad():
        for parameter in student.diffloss.net.final_layer.linear.parameters():
            parameter *= 0.3
    return student


def darkness(images: Tensor, **_: Any) -> Tensor:
    return 1 - images.mean(dim=(1, 2, 3))


darkness.differentiable = True


def constant(images: Tensor, **_: Any) -> list[float]:
    return [0.5] * len(images)


def tiny_images(count: int = 24) -> list[dict[str, Tensor]]:
    """Random images of 3 classes."""
    images = torch.rand(count, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    return [{"images": image, "class_labels": torch.tensor(index % 3)} for index, image in enumerate(images)]


def pretrainer(folder: Path, model: MARModel, **settings: Any) -> PretrainTrainer:
    return PretrainTrainer(model, PretrainConfig(str(folder), **{**QUIET, **settings}), train_dataset=tiny_images())


def distiller(folder: Path, teacher: MARModel, **settings: Any) -> DistillTrainer:
    settings = {**QUIET, "auxiliary_updates": 3, "auxiliary_warmup_steps": 3, **settings}
    return DistillTrainer(teacher, DistillConfig(str(folder), **settings), train_dataset=tiny_images())


def grpo_trainer(folder: Path, student: MARModel, reward: Any = darkness, **settings: Any) -> MARGRPOTrainer:
    config = MARGRPOConfig(str(folder), **{**GRPO, **settings})
    return MARGRPOTrainer(student, RewardSet([reward]), config, train_dataset=class_rows(3), **anchor_of(config))


def backprop_trainer(folder: Path, student: MARModel, reward: Any = darkness, **settings: Any):
    config = RewardBackpropConfig(str(folder), **{**QUIET, "num_unmasking_steps": 2, **settings})
    return RewardBackpropTrainer(student, RewardSet([reward]), config, train_dataset=class_rows(3), **anchor_of(config))


def anchor_of(config: Any) -> dict[str, Any]:
    """Teacher and data, as both are needed by an anchor."""
    return {"teacher": tiny_model(3), "anchor_dataset": tiny_images()} if config.anchor_weight > 0 else {}


def snapshot(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def assert_equal_states(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


def logged(trainer: MARTrainer, name: str) -> list[float]:
    """The values of a metric, in the order of the steps that logged it."""
    return [line[name] for line in trainer.state.log_history if name in line]


def snapshots_by_step(trainer: MARTrainer, modules: dict[str, nn.Module]) -> list[dict[str, dict[str, Tensor]]]:
    """Trains; returns the weights before the first step and after each."""
    states = [{name: snapshot(module) for name, module in modules.items()}]
    optimizer_step = trainer.update_average

    def after_each_step() -> None:
        optimizer_step()
        states.append({name: snapshot(module) for name, module in modules.items()})

    trainer.callback_handler.callbacks[-1].update = after_each_step  # the callback that was added last
    trainer.train()
    return states


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


# Who moves


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
        teacher = trainer.matcher.teacher
    modules = {"student": trainer.mar, "auxiliary": trainer.model.auxiliary, "average": trainer.ema.module}
    modules["teacher"] = teacher
    if kind == "grpo":
        modules["reference"] = trainer.reference
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
    trainer = make(tmp_path, tiny_student(1), max_steps=3, learning_rate=1e-3, auxiliary_updates=3)
    assert trainer.model.auxiliary is None and trainer.matcher is None
    states = snapshots_by_step(trainer, {"student": trainer.mar})
    assert len(states) == 4
    assert not any(same(a["student"], b["student"]) for a, b in pairwise(states))
    assert not (tmp_path / "final" / "auxiliary.safetensors").exists()
    assert not any("anchor_loss" in line or "auxiliary_loss" in line for line in trainer.state.log_history)


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


# GRPO


def test_before_the_first_update_every_ratio_is_one(tiny_runs, tmp_path, monkeypatch):
    ratios = []
    original = grpo_module.clipped_policy_loss

    def recording(log_prob: Tensor, old_log_prob: Tensor, *args: Any) -> Any:
        ratios.append((log_prob - old_log_prob).exp().detach())
        return original(log_prob, old_log_prob, *args)

    monkeypatch.setattr(grpo_module, "clipped_policy_loss", recording)
    student = load_model(tiny_runs.student, one_step=True)  # its teacher was trained with dropout
    config = MARGRPOConfig(
        str(tmp_path), **{**GRPO, "num_unmasking_steps": 8, "num_iterations": 2}, max_steps=2, learning_rate=1e-3
    )
    MARGRPOTrainer(student, RewardSet([darkness]), config, train_dataset=class_rows(10)).train()
    count = len(unmasking_steps(16, 8))
    assert len(ratios) == 2 * count
    torch.testing.assert_close(torch.cat(ratios[:count]), torch.ones(8 * count), atol=1e-5, rtol=0)
    assert (torch.cat(ratios[count:]) - 1).abs().max() > 1e-3  # the second pass over the same rollout


def test_grpo_raises_a_learnable_reward(tmp_path):
    settings = {"per_device_train_batch_size": 192, "num_generations": 16, "sigma": 0.4, "max_steps": 12}
    trainer = grpo_trainer(tmp_path, grey_student(), **settings, learning_rate=3e-3)
    trainer.train()
    rewards = logged(trainer, "reward")
    assert len(rewards) == 12
    assert mean(rewards[-3:]) > mean(rewards[:3]) + 0.15
    assert logged(trainer, "rewards/darkness/mean") == pytest.approx(rewards)
    assert logged(trainer, "frac_reward_zero_std") == [0.0] * 12


def test_grpo_learns_nothing_from_a_constant_reward(tmp_path):
    trainer = grpo_trainer(tmp_path, tiny_student(1), constant, max_steps=3, learning_rate=1e-2)
    start = snapshot(trainer.mar)
    trainer.train()
    assert logged(trainer, "frac_reward_zero_std") == [1.0] * 3
    assert logged(trainer, "reward") == [0.5] * 3
    assert logged(trainer, "reward_std") == [0.0] * 3
    assert logged(trainer, "loss") == [0.0] * 3
    assert_equal_states(start, trainer.mar.state_dict())


def recorded_use(monkeypatch, trainer: MARGRPOTrainer) -> list[tuple[int, Tensor]]:
    """Trains; returns (optimizer step, numbers that identify the images it used) for each micro-batch."""
    used, generated = [], []
    original, policy_loss = trainer.generate_rollouts, trainer._policy_loss

    def generate(rows: list[dict[str, Any]]) -> None:
        original(rows)
        generated.append(trainer.state.global_step)

    def loss(student: MARModel, rollout: dict[str, Tensor]) -> Tensor:
        used.append((trainer.state.global_step, rollout["noise"].flatten(1)[:, 0].clone()))
        return policy_loss(student, rollout)

    monkeypatch.setattr(trainer, "generate_rollouts", generate)
    monkeypatch.setattr(trainer, "_policy_loss", loss)
    trainer.train()
    trainer.generated_at = generated
    return used


def images_in(*uses: tuple[int, Tensor]) -> list[float]:
    return sorted(torch.cat([noise for _, noise in uses]).tolist())


def test_num_iterations_uses_each_rollout_that_often(tmp_path, monkeypatch):
    trainer = grpo_trainer(tmp_path, tiny_student(1), max_steps=6, num_iterations=2, learning_rate=1e-3)
    used = recorded_use(monkeypatch, trainer)
    assert trainer.generated_at == [0, 2, 4]
    for first in (0, 2, 4):
        assert images_in(used[first]) == images_in(used[first + 1])
        assert len(set(images_in(used[first]))) == 8
    assert not set(images_in(used[0])) & set(images_in(used[2]))
    ratios = logged(trainer, "ratio")
    assert all(ratios[step] == pytest.approx(1, abs=1e-5) for step in (0, 2, 4))
    assert all(abs(ratios[step] - 1) > 1e-5 for step in (1, 3, 5))


def test_steps_per_generation_spreads_a_rollout_over_several_updates(tmp_path, monkeypatch):
    settings = {"per_device_train_batch_size": 4, "steps_per_generation": 2, "num_iterations": 2, "max_steps": 8}
    trainer = grpo_trainer(tmp_path, tiny_student(1), **settings, learning_rate=1e-3)
    used = recorded_use(monkeypatch, trainer)
    assert trainer.generated_at == [0, 4]
    for first in (0, 4):
        halves = [images_in(used[first + k]) for k in range(4)]
        assert halves[0] == halves[2] and halves[1] == halves[3]
        assert len(halves[0]) == 4 and not set(halves[0]) & set(halves[1])
    assert not set(images_in(used[0])) & set(images_in(used[4]))


def test_two_accumulated_micro_batches_are_one_batch_of_twice_the_size(tmp_path, monkeypatch):
    settings = {"max_steps": 1, "learning_rate": 1e-2, "optim": "sgd"}  # Adam would blow up differences of rounding
    whole = grpo_trainer(tmp_path / "whole", grey_student(), **settings, per_device_train_batch_size=16)
    halves = grpo_trainer(tmp_path / "halves", grey_student(), **settings, gradient_accumulation_steps=2)
    start = nn.utils.parameters_to_vector(whole.mar.parameters()).detach().clone()
    used, in_halves = recorded_use(monkeypatch, whole), recorded_use(monkeypatch, halves)
    assert len(used) == 1 and len(in_halves) == 2
    assert images_in(*used) == images_in(*in_halves)
    for name in ("loss", "grad_norm", "reward"):
        assert logged(whole, name) == pytest.approx(logged(halves, name), rel=1e-3, abs=1e-5)
    one, other = (nn.utils.parameters_to_vector(trainer.mar.parameters()) for trainer in (whole, halves))
    assert (one - other).norm() < 1e-3 * (one - start).norm()


def test_a_subset_of_the_unmasking_steps_is_drawn_anew_each_time(tmp_path, monkeypatch):
    chosen = []
    original = grpo_module.step_mean

    def recording(student: MARModel, rollout: dict[str, Tensor], masked: int, kept: int) -> Any:
        chosen.append((masked, kept))
        return original(student, rollout, masked, kept)

    monkeypatch.setattr(grpo_module, "step_mean", recording)
    settings = {"num_unmasking_steps": 4, "num_trained_steps": 2, "max_steps": 8}
    grpo_trainer(tmp_path, tiny_student(1), **settings, learning_rate=1e-3).train()
    pairs = unmasking_steps(4, 4)
    assert len(chosen) == 2 * 8 and set(chosen) == set(pairs)
    assert all(chosen[i] != chosen[i + 1] for i in range(0, 16, 2))


def test_the_divergence_from_the_reference_is_logged_and_held_down(tmp_path):
    settings = {"max_steps": 8, "learning_rate": 3e-3, "num_iterations": 2}
    free = grpo_trainer(tmp_path / "free", tiny_student(1), **settings, beta=1e-6)
    held = grpo_trainer(tmp_path / "held", tiny_student(1), **settings, beta=1.0)
    start = snapshot(held.reference)
    for trainer in (free, held):
        trainer.train()
        kl = logged(trainer, "kl")
        assert len(kl) == 8 and kl[0] == pytest.approx(0, abs=1e-6) and all(value > 0 for value in kl[1:])
    assert logged(held, "kl")[-1] < 0.5 * logged(free, "kl")[-1]
    assert_equal_states(start, held.reference.state_dict())
    assert grpo_trainer(tmp_path / "none", tiny_student(1), max_steps=1, beta=0.0).reference is None


def test_rewards_are_asked_about_finished_images_with_their_prompts_and_columns(tmp_path):
    asked = []

    def reward(images: Tensor, prompts: list[str], class_names: list[str], class_labels: Tensor, hint: list[str], **_):
        asked.append((images, prompts, class_names, class_labels.tolist(), hint))
        return [0.0] * len(images)

    student = tiny_student(1, class_names=["cat", "dog", "eel"])
    config = MARGRPOConfig(str(tmp_path), **GRPO, max_steps=1, prompt_template="a {name}!")
    rows = [{"class_labels": 2, "hint": "long"}, {"class_labels": 0, "hint": "furry"}]
    MARGRPOTrainer(student, RewardSet([reward]), config, train_dataset=rows).train()
    images, prompts, names, labels, hints = asked[0]
    assert images.shape == (8, 3, 4, 4) and images.min() >= 0 and images.max() <= 1
    assert sorted(labels) == [0] * 4 + [2] * 4
    assert [labels[0]] * 4 + [labels[4]] * 4 == labels  # groups in a row
    expected = {0: ("a cat!", "cat", "furry"), 2: ("a eel!", "eel", "long")}
    assert list(zip(prompts, names, hints, strict=True)) == [expected[label] for label in labels]


# Reward back-propagation


def test_reward_backprop_raises_the_reward(tmp_path):
    trainer = backprop_trainer(tmp_path, grey_student(), max_steps=8, learning_rate=3e-3)
    trainer.train()
    rewards = logged(trainer, "reward")
    assert len(rewards) == 8 and mean(rewards[-3:]) > mean(rewards[:3]) + 0.15
    assert logged(trainer, "loss") == pytest.approx([-reward for reward in rewards], abs=1e-5)


LABELS = torch.tensor([0, 1, 2, 1])


def rollout_objective(student: MARModel) -> Tensor:
    """A smooth function of a rollout, the same noise and order each time."""
    torch.manual_seed(0)
    tokens = differentiable_rollout(student, LABELS, num_unmasking_steps=4)["tokens"]
    weights = torch.linspace(-1, 1, tokens.numel()).view_as(tokens)
    return (weights * tokens.tanh()).sum()


def rollout_gradient(student: MARModel) -> Tensor:
    """The gradient of the objective in all parameters that take one."""
    student.zero_grad()
    rollout_objective(student).backward()
    return torch.cat([p.grad.flatten() for p in student.parameters() if p.grad is not None])


def test_the_gradient_through_a_rollout_is_that_of_the_plain_one(monkeypatch):
    student = tiny_student(1)
    gradient = rollout_gradient(student)
    monkeypatch.setattr(rollout_module, "checkpoint", lambda reveal, *args, use_reentrant: reveal(*args))
    torch.testing.assert_close(gradient, rollout_gradient(student), rtol=1e-5, atol=1e-6)


def test_the_gradient_through_a_rollout_is_the_slope_of_its_objective(monkeypatch):
    student = tiny_student(1)
    gradient = rollout_gradient(student)
    direction = gradient / gradient.norm()
    parameters = [p for p in student.parameters() if p.grad is not None]
    start = nn.utils.parameters_to_vector(parameters).detach().clone()
    values = []
    with torch.no_grad():
        for step in (-1e-3, 1e-3):
            nn.utils.vector_to_parameters(start + step * direction, parameters)
            values.append(rollout_objective(student).item())
        nn.utils.vector_to_parameters(start, parameters)
    slope = (values[1] - values[0]) / 2e-3
    assert slope == pytest.approx(gradient.norm().item(), rel=1e-2)

    # Control: a gradient that is cut between the unmasking steps is another one.
    monkeypatch.setattr(
        rollout_module, "checkpoint", lambda reveal, tokens, *args, use_reentrant: reveal(tokens.detach(), *args)
    )
    assert (rollout_gradient(student) @ direction - slope).abs() > 0.05 * slope


# Evaluation, averages, failures


def test_evaluation_leaves_training_as_it_is(tmp_path):
    runs = []
    for name, settings in (("quiet", {}), ("watched", {"eval_strategy": "steps", "eval_steps": 1})):
        trainer = pretrainer(
            tmp_path / name, tiny_model(0), max_steps=3, eval_num_images=6, eval_diffusion_steps=2, **settings
        )
        trainer.train()
        runs.append(trainer)
    assert len(list((tmp_path / "watched" / "samples").iterdir())) == 3
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
    first, second = sorted((tmp_path / "samples").iterdir())
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


@pytest.mark.parametrize("recipe", COMMANDS)
def test_a_dry_run_says_what_would_be_done_and_does_nothing(tiny_runs, tmp_path, capsys, recipe):
    assert run_recipe(recipe, tmp_path / "run", "--dry_run", **tiny_runs.models_of(recipe)) == 0
    assert not (tmp_path / "run").exists()
    output = capsys.readouterr().out
    settings = yaml.safe_load(output[: output.index("\n\n")])
    assert settings["max_steps"] == 6 and settings["dataset"] == "digits"
    assert "images an update: 16 = per_device_train_batch_size 16 x gradient_accumulation_steps 1" in output
    assert "parameters: " in output and "MiB" in output
    assert ("8 groups of 4" in output) == (recipe == "grpo")


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
