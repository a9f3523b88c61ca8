"""Distilling a MAR teacher into a one-step student with GSIM (MARVAL, arXiv 2511.15190)."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from marval_rl.models import MARConfig, MARModel
from marval_rl.models.head import DiffusionHead
from marval_rl.models.unmasking import random_order
from marval_rl.runtime.distributed import whole_weights
from marval_rl.runtime.settings import Conditions, Needs
from marval_rl.trainers.arguments import MARTrainingArguments, cycle_pattern
from marval_rl.trainers.base import MARTrainer
from marval_rl.trainers.gsim import ScoreMatcher, StudentNetworks
from marval_rl.trainers.masking import draw_num_masked
from marval_rl.trainers.optimizers import AUXILIARY, MODEL, adamw

AUXILIARY_FILE = "auxiliary.safetensors"


@dataclass
class DistillConfig(MARTrainingArguments):
    """Arguments of `DistillTrainer`. One step updates the auxiliary network; every `auxiliary_updates`-th the
    student too."""

    max_steps: int = field(default=2000, metadata={"help": "Optimizer steps, counted in auxiliary updates."})
    learning_rate: float = field(default=2e-4, metadata={"help": "Learning rate of the student."})
    auxiliary_learning_rate: float = field(default=3e-4, metadata={"help": "Learning rate of the auxiliary network."})
    adam_beta1: float = field(default=0.0, metadata={"help": "beta1 of Adam; 0 as the two networks chase each other."})
    weight_decay: float = field(default=0.0, metadata={"help": "Weight decay of both networks."})
    ema_decay: float = field(default=0.998, metadata={"help": "Decay of the student's average, per student update."})
    student_timestep: int = field(default=700, metadata={"help": "t*, the timestep at which the student denoises."})
    guidance_scale: float = field(default=1.2, metadata={"help": "Guidance of the teacher's score; 1.0 is none."})
    min_timestep: int = field(default=20, metadata={"help": "Lowest timestep at which scores are matched."})
    max_timestep: int = field(default=950, metadata={"help": "Highest timestep at which scores are matched."})
    timestep_draws: int = field(default=1, metadata={"help": "(t, noise) draws for each token and update."})
    huber_r: float = field(default=1e-5, metadata={"help": "r of the pseudo-Huber distance."})
    auxiliary_updates: int = field(default=4, metadata={"help": "Auxiliary updates for each student update."})
    auxiliary_warmup_steps: int = field(default=100, metadata={"help": "Steps that update the auxiliary network only."})
    mask_ratio_min: float = field(default=0.7, metadata={"help": "Smallest share of tokens masked."})
    mask_ratio_std: float = field(default=0.25, metadata={"help": "Deviation of the truncated normal of mask ratios."})

    counts_if: ClassVar[Conditions] = {
        Needs("a mask_ratio_min below 1", ("mask_ratio_min",), lambda ratio: ratio != 1): ("mask_ratio_std",),
    }

    def batch_pattern(self) -> list[bool]:
        return cycle_pattern(self.gradient_accumulation_steps, self.auxiliary_updates)


def student_config(teacher: MARConfig, student_timestep: int) -> MARConfig:
    """The teacher's configuration as a student has it."""
    settings = teacher.to_dict()
    settings |= {"one_step_timestep": student_timestep, "attention_dropout": 0.0, "projection_dropout": 0.0}
    return MARConfig.from_dict(settings)


def student_from_teacher(teacher: MARModel, student_timestep: int) -> MARModel:
    """A student that starts as the teacher, and is trained without dropout."""
    student = MARModel(student_config(teacher.config, student_timestep))
    student.load_state_dict(teacher.state_dict())
    return student.to(teacher.device)


class DistillTrainer(MARTrainer):
    """Trains a student. `train_dataset` yields {"images": [C, H, W] in 0..1, "class_labels": int}, or cached "moments"
    [2c, h, w] instead of images; a batch is read for each student update and serves the auxiliary updates after it.

    Args:
        teacher: A MAR teacher; stays as it is.
        args: The settings.
        student: None starts the student from the teacher.
    """

    args: DistillConfig

    def __init__(self, teacher: MARModel, args: DistillConfig, student: MARModel | None = None, **kwargs: Any):
        if teacher.config.is_one_step:
            raise ValueError("the teacher is itself a one-step student: give a many-step MAR model")
        student = student_from_teacher(teacher, args.student_timestep) if student is None else student
        networks = StudentNetworks(student, copy.deepcopy(teacher.diffloss))
        super().__init__(networks, student, args, **kwargs)
        self.matcher = ScoreMatcher(
            teacher.to(args.device),
            args.guidance_scale,
            (args.min_timestep, args.max_timestep),
            args.timestep_draws,
            args.huber_r,
        )

    def updates_student(self, step: int) -> bool:
        return step >= self.args.auxiliary_warmup_steps and self._draws_contexts(step)

    def goes_on_with_buffer(self, step: int) -> bool:
        return not self._draws_contexts(step)

    def _draws_contexts(self, step: int) -> bool:
        return step % self.args.auxiliary_updates == 0

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            self.optimizer = adamw(student_groups(self.model, self.args), self.args)
        return self.optimizer

    def compute_loss(self, model: nn.Module, inputs: dict[str, Tensor], *_: Any, **__: Any) -> Tensor:
        return model(self._losses, inputs)

    def _losses(self, networks: StudentNetworks, inputs: dict[str, Tensor]) -> Tensor:
        args, config, step = self.args, self.mar.config, self.state.global_step
        loss = torch.zeros((), device=args.device)
        if self._draws_contexts(step):
            tokens = self.tokens_of(inputs)
            order = random_order(len(tokens), config.num_tokens, tokens.device)
            num_masked = draw_num_masked(config.num_tokens, args.mask_ratio_min, args.mask_ratio_std)
            context = (tokens, inputs["class_labels"], order, num_masked)
            if self.updates_student(step):
                loss, metrics, sample = self.matcher.student_loss(networks, *context)
                self.record({"student_loss": loss, **metrics})
            else:
                sample = self.matcher.sample(networks, *context)
            self.buffer |= {f"{self.micro_batch}.{name}": value for name, value in sample.items()}
        # The same detached sample serves the auxiliary updates in between: they cost the head alone.
        sample = {name: self.buffer[f"{self.micro_batch}.{name}"] for name in ("x_start", "condition")}
        auxiliary_loss = self.matcher.auxiliary_loss(networks, sample)
        self.record({"auxiliary_loss": auxiliary_loss})
        return loss + auxiliary_loss

    def save_final(self, folder: Path) -> None:
        """The student, and the auxiliary network beside it: RL's anchor starts from it."""
        super().save_final(folder)
        save_auxiliary(self.model.auxiliary, folder, self.args.should_save)


def student_groups(networks: StudentNetworks, args: Any) -> list[dict[str, Any]]:
    """Two parameter groups, student and auxiliary network, each with its learning rate."""
    student = [p for p in networks.student.parameters() if p.requires_grad]
    groups: list[dict[str, Any]] = [{"params": student, "lr": args.learning_rate, "network": MODEL}]
    if networks.auxiliary is not None:
        auxiliary = list(networks.auxiliary.parameters())
        groups.append({"params": auxiliary, "lr": args.auxiliary_learning_rate, "network": AUXILIARY})
    # transformers takes the weight decay from the groups; without it PyTorch's default would decay by 0.01.
    return [{**group, "weight_decay": args.weight_decay} for group in groups]


def save_auxiliary(auxiliary: DiffusionHead, folder: Path, should_save: bool) -> None:
    """Write the weights into the folder where should_save says so; all processes must call it."""
    with whole_weights(auxiliary):
        if should_save:
            state = {name: tensor.contiguous() for name, tensor in auxiliary.state_dict().items()}
            save_file(state, folder / AUXILIARY_FILE)
