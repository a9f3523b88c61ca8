"""`marval-rl pretrain`: train a MAR teacher."""

from __future__ import annotations

import argparse

import torch

from marval_rl.cli.arguments import add_recipe_arguments
from marval_rl.cli.training import read_recipe, run_training
from marval_rl.models.checkpoints import new_model
from marval_rl.recipes.conditions import find_conditions
from marval_rl.recipes.data_arguments import DataArguments
from marval_rl.recipes.network_arguments import ModelArguments
from marval_rl.recipes.planning.plan import plan_pretraining, pretrained_config
from marval_rl.trainers.pretrain import PretrainConfig, PretrainTrainer


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_recipe_arguments(parser)


def run(args: argparse.Namespace, extra: list[str]) -> None:
    """Train a teacher as the recipe says."""
    (data, sizes, config), settings = read_recipe(args, extra, (DataArguments, ModelArguments, PretrainConfig))

    def make_trainer() -> PretrainTrainer:
        dataset = data.load_training(None, config.seed)
        data.announce(dataset, config.process_index)
        torch.manual_seed(config.seed)
        model = new_model(pretrained_config(data, sizes, dataset))
        conditions = find_conditions(model.config, "the model", dataset.class_names, eval_prompts=data.eval_prompts)
        conditions.give(model)
        return PretrainTrainer(
            model,
            config,
            train_dataset=dataset,
            evaluator=data.evaluator(model.config) if config.evaluates else None,
            eval_classes=conditions.eval_classes,
        )

    run_training(args, settings, (data, sizes, config), make_trainer, lambda: plan_pretraining(data, sizes, config))
