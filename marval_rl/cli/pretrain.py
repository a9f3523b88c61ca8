"""`marval-rl pretrain`: train a MAR teacher."""

from __future__ import annotations

import argparse

import torch

from marval_rl.cli.arguments import add_recipe_arguments
from marval_rl.cli.training import read_recipe, run_training
from marval_rl.models import MARModel
from marval_rl.recipes.data_arguments import DataArguments
from marval_rl.recipes.network_arguments import ModelArguments
from marval_rl.recipes.planning.plan import plan_pretraining
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
        model = MARModel(sizes.config(data.latents(dataset)))
        return PretrainTrainer(
            model, config, train_dataset=dataset, evaluator=data.evaluator(model.config) if config.evaluates else None
        )

    run_training(args, settings, (data, sizes, config), make_trainer, lambda: plan_pretraining(data, sizes, config))
