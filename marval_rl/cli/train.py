"""`marval-rl train`: RL on a one-step student."""

from __future__ import annotations

import argparse
from pathlib import Path

from marval_rl.cli.arguments import add_recipe_arguments
from marval_rl.cli.training import read_recipe, run_training
from marval_rl.errors import RecipeError, nearest
from marval_rl.models.checkpoints import load_config, load_model, resolve_model
from marval_rl.recipes.conditions import find_conditions
from marval_rl.recipes.data_arguments import DataArguments
from marval_rl.recipes.network_arguments import LoraArguments, RewardArguments, TeacherArguments
from marval_rl.recipes.planning.plan import TrainingPlan, plan_reward_training
from marval_rl.recipes.reading import peek_setting
from marval_rl.rewarding import RewardSet
from marval_rl.trainers.grpo import MARGRPOConfig, MARGRPOTrainer
from marval_rl.trainers.reward_backprop import RewardBackpropConfig, RewardBackpropTrainer
from marval_rl.trainers.reward_trainer import RewardTrainer

METHODS = {
    "grpo": (MARGRPOConfig, MARGRPOTrainer),
    "reward_backprop": (RewardBackpropConfig, RewardBackpropTrainer),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_recipe_arguments(parser)


def run(args: argparse.Namespace, extra: list[str]) -> None:
    """Train as the recipe says; its `method` picks the trainer."""
    method = peek_setting(args.recipe, extra, "method") or "grpo"
    if method not in METHODS:
        raise RecipeError(f"unknown method {method!r}{nearest(str(method), METHODS)}; there are {', '.join(METHODS)}")
    config_class, trainer_class = METHODS[method]
    config_types = (DataArguments, RewardArguments, TeacherArguments, LoraArguments, config_class)
    (data, rewarded, source, lora, config), settings = read_recipe(args, extra, config_types)
    peft_config = lora.config()
    if rewarded.model is None:
        raise RecipeError("model is not set: name the student's folder, its run folder or a hub id (--model ...)")
    if not rewarded.reward_funcs and (method == "grpo" or config.distribution_weight == 0):
        raise RecipeError(
            "reward_funcs is empty: name at least one reward (`marval-rl rewards list` shows some), or train by "
            "reward_backprop on distribution_weight alone"
        )
    if config.gsim_weight > 0 and source.teacher is None:
        raise RecipeError(f"gsim_weight {config.gsim_weight} needs the teacher the student came from (--teacher ...)")
    if method == "grpo" and lora.lora_dropout > 0:
        raise RecipeError(f"grpo needs lora_dropout 0, not {lora.lora_dropout}: its ratios must begin at 1")

    def make_trainer() -> RewardTrainer:
        offers = data.offers(lambda: load_config(rewarded.model))
        rewards = []
        if rewarded.reward_funcs:
            rewards = RewardSet(rewarded.reward_funcs, config.reward_weights, rewarded.reward_kwargs, offers)
        judges = None
        if rewarded.eval_reward_funcs:
            judges = RewardSet(rewarded.eval_reward_funcs, None, rewarded.eval_reward_kwargs, offers)
        student = load_model(rewarded.model, one_step=True)
        source.check_size(student.config, rewarded.model)
        anchored = config.gsim_weight > 0
        reads = config.reads_images or data.is_bundled
        images = data.load_training(student.config.image_size, config.seed) if reads else None
        if images is not None:
            data.announce(images, config.process_index)
        data.fit(student.config, rewarded.model, images)
        teacher = source.load() if anchored else None
        names = None if images is None else images.class_names
        asked = {**rewarded.rolled_out(), "eval_prompts": data.eval_prompts}
        conditions = find_conditions(student.config, str(rewarded.model), names, **asked)
        conditions.give(student, teacher)
        return trainer_class(
            student,
            rewards,
            config,
            train_dataset=conditions.rows,
            teacher=teacher,
            auxiliary=Path(resolve_model(rewarded.model)) if anchored else None,
            anchor_dataset=images if config.reads_images else None,
            peft_config=peft_config,
            evaluator=data.evaluator(student.config) if config.evaluates else None,
            eval_rewards=judges,
            eval_classes=conditions.eval_classes,
        )

    def make_plan() -> TrainingPlan:
        return plan_reward_training(data, rewarded, source, peft_config, config, trainer_class)

    run_training(args, settings, (data, rewarded, source, lora, config), make_trainer, make_plan)
