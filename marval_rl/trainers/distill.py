"""Distilling a MAR teacher into a one-step student with GSIM (MARVAL, arXiv 2511.15190)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from marval_rl.models import MaskedModel
from marval_rl.runtime.settings import setting
from marval_rl.trainers.arguments import MARTrainingArguments
from marval_rl.trainers.base import MARTrainer
from marval_rl.trainers.score_matching import AuxiliaryArguments, GSIMArguments, ScoreMatching
from marval_rl.trainers.student_networks import StudentNetworks, auxiliary_network


@dataclass
class DistillConfig(AuxiliaryArguments, GSIMArguments, MARTrainingArguments):
    """Arguments of `DistillTrainer`. One step updates the auxiliary network; every `auxiliary_updates`-th the
    student too."""

    max_steps: int = setting(2000, "Optimizer steps, counted in auxiliary updates.")
    learning_rate: float = setting(2e-4, "Learning rate of the student.")
    adam_beta1: float = setting(0.0, "beta1 of Adam; 0 as the two networks chase each other.")
    weight_decay: float = setting(0.0, "Weight decay of both networks.")
    ema_decay: float = setting(0.998, "Decay of the student's average, per student update.")
    student_timestep: int = setting(700, "t*, the timestep at which the student denoises.")


def student_from_teacher(teacher: MaskedModel, student_timestep: int) -> MaskedModel:
    """A student that starts as the teacher, and is trained without dropout."""
    student = type(teacher)(teacher.config.as_student(student_timestep))
    student.load_state_dict(teacher.state_dict())
    student.share_conditions(teacher)
    return student.to(teacher.device)


class DistillTrainer(MARTrainer):
    """Trains a student. `train_dataset` yields {"images": [C, H, W] in 0..1, "class_labels": int}, or cached "moments"
    [2c, h, w] instead of images; a batch is read for each student update and serves the auxiliary updates after it.

    Args:
        teacher: A MAR teacher; stays as it is.
        args: The settings.
        student: None starts the student from the teacher.
    """

    method = "distill"

    args: DistillConfig

    def __init__(self, teacher: MaskedModel, args: DistillConfig, student: MaskedModel | None = None, **kwargs: Any):
        if teacher.config.is_one_step:
            raise ValueError("the teacher is itself a one-step student: give a many-step MAR model")
        student = student_from_teacher(teacher, args.student_timestep) if student is None else student
        super().__init__(StudentNetworks(student, auxiliary_network(teacher)), student, args, **kwargs)
        self.matching = ScoreMatching(teacher.to(args.device), args)

    def frozen_models(self) -> list[MaskedModel]:
        return [self.matching.teacher]

    def parameter_groups(self) -> list[dict[str, Any]]:
        return self.model.parameter_groups(self.args)

    def training_loss(self, model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
        return model(self._losses, inputs)

    def _losses(self, networks: StudentNetworks, inputs: dict[str, Tensor]) -> Tensor:
        step, contexts = self.state.global_step, None
        if self.args.starts_cycle(step):
            contexts = self.matching.contexts(self.tokens_of(inputs), inputs["class_labels"])
        moves_student = self.args.moves_model(step)
        loss, metrics = self.matching.losses(networks, contexts, moves_student, self.buffer, self.micro_batch)
        self.record(metrics)
        return loss

    def save_final(self, folder: Path) -> None:
        """The student, and the auxiliary network beside it: RL's anchor starts from it."""
        super().save_final(folder)
        self.model.save_auxiliary(folder, self.args.should_save)
