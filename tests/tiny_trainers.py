"""Trainers of tiny models for tests: images of 1 x 4 x 4 pixels, 4 tokens, 3 classes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import tiny_model, tiny_student
from tiny_text import text_model
from torch import Tensor, nn

from marval_rl.data import class_rows
from marval_rl.models import MaskedModel
from marval_rl.rewarding import RewardSet
from marval_rl.runtime.callbacks import AverageCallback
from marval_rl.trainers.base import MARTrainer
from marval_rl.trainers.distill import DistillConfig, DistillTrainer
from marval_rl.trainers.grpo import MARGRPOConfig, MARGRPOTrainer
from marval_rl.trainers.pretrain import PretrainConfig, PretrainTrainer
from marval_rl.trainers.reward_backprop import RewardBackpropConfig, RewardBackpropTrainer

QUIET = {
    "eval_strategy": "no",
    "eval_on_start": False,
    "save_strategy": "no",
    "logging_steps": 1,
    "lr_scheduler_type": "constant",
    "per_device_train_batch_size": 8,
}
GRPO = {**QUIET, "num_generations": 4, "num_unmasking_steps": 2, "policy_std": 0.2}
MATCHED = {"distribution_weight": 10.0, "distribution_queue": 12}
ANCHOR = {"gsim_weight": 1.0, "gsim_batch_size": 8, "auxiliary_updates": 3, "auxiliary_warmup_steps": 3}


def grey_student() -> MaskedModel:
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


def pretrainer(folder: Path, model: MaskedModel, **settings: Any) -> PretrainTrainer:
    return PretrainTrainer(model, PretrainConfig(str(folder), **{**QUIET, **settings}), train_dataset=tiny_images())


def distiller(folder: Path, teacher: MaskedModel, **settings: Any) -> DistillTrainer:
    settings = {**QUIET, "auxiliary_updates": 3, "auxiliary_warmup_steps": 3, **settings}
    return DistillTrainer(teacher, DistillConfig(str(folder), **settings), train_dataset=tiny_images())


def grpo_trainer(folder: Path, student: MaskedModel, reward: Any = darkness, **settings: Any) -> MARGRPOTrainer:
    config = MARGRPOConfig(str(folder), **{**GRPO, **settings})
    rewards = RewardSet(reward if isinstance(reward, list) else [reward]) if reward else []
    return MARGRPOTrainer(student, rewards, config, train_dataset=class_rows(3), **anchor_of(config, student))


def backprop_trainer(folder: Path, student: MaskedModel, reward: Any = darkness, **settings: Any):
    config = RewardBackpropConfig(str(folder), **{**QUIET, "num_unmasking_steps": 2, **settings})
    rewards = [] if reward is None else RewardSet([reward])
    return RewardBackpropTrainer(student, rewards, config, train_dataset=class_rows(3), **anchor_of(config, student))


def anchor_of(config: Any, student: MaskedModel) -> dict[str, Any]:
    """Teacher, of the student's backbone, and data, where an anchor needs them."""
    make = text_model if student.config.takes_prompts else tiny_model
    teacher = {"teacher": make(3)} if config.gsim_weight > 0 else {}
    return {**teacher, "anchor_dataset": tiny_images()} if config.reads_images else {}


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

    average = next(c for c in trainer.callback_handler.callbacks if isinstance(c, AverageCallback))
    average.update = after_each_step
    trainer.train()
    return states


@contextmanager
def power_cut_in_step(step: int) -> Iterator[None]:
    """Within this context every training ends in this optimizer step, and writes nothing more."""
    original = MARTrainer.training_step

    def training_step(self: MARTrainer, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == step:
            raise OSError("the lights went out")
        return original(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MARTrainer, "training_step", training_step)
        yield
