"""`marval-rl distill`: turn a teacher into a one-step student."""

from __future__ import annotations

import argparse

from marval_rl.cli.arguments import add_recipe_arguments
from marval_rl.cli.training import read_recipe, run_training
from marval_rl.errors import RecipeError
from marval_rl.recipes.conditions import find_conditions
from marval_rl.recipes.data_arguments import DataArguments
from marval_rl.recipes.network_arguments import TeacherArguments
from marval_rl.recipes.planning.plan import plan_distillation
from marval_rl.trainers.distill import DistillConfig, DistillTrainer


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_recipe_arguments(parser)


def run(args: argparse.Namespace, extra: list[str]) -> None:
    """Distil as the recipe says."""
    (data, source, config), settings = read_recipe(args, extra, (DataArguments, TeacherArguments, DistillConfig))
    if source.teacher is None:
        raise RecipeError("teacher is not set: name a model folder, a run folder or a hub id (--teacher ...)")

    def make_trainer() -> DistillTrainer:
        teacher = source.load()
        dataset = data.load_training(teacher.config.image_size, config.seed)
        data.announce(dataset, config.process_index)
        data.fit(teacher.config, source.teacher, dataset)
        conditions = find_conditions(
            teacher.config, str(source.teacher), dataset.class_names, eval_prompts=data.eval_prompts
        )
        conditions.give(teacher)
        return DistillTrainer(
            teacher,
            config,
            train_dataset=dataset,
            evaluator=data.evaluator(teacher.config) if config.evaluates else None,
            eval_classes=conditions.eval_classes,
        )

    run_training(args, settings, (data, source, config), make_trainer, lambda: plan_distillation(data, source, config))
