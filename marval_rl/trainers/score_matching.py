"""Score implicit matching on MAR: all that distillation and RL's GSIM anchor do with it.

Two networks chase each other. The auxiliary score network phi learns the score of what the student generates now
(`auxiliary_loss`); the student theta moves along the difference of phi's score and the teacher's (`student_loss`). In a
cycle of `auxiliary_updates` steps the first draws contexts and moves both; the others train phi alone, on the same
sample:

    step                0            1        2        3        4            ...      (auxiliary_updates 4)
    reads, generates    contexts     -        -        -        contexts
    moves               theta, phi   phi      phi      phi      theta, phi            (theta not in the warm-up)
"""

# No `from __future__ import annotations`: the command-line parser reads the field types.

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from marval_rl.losses.gsim import denoising_loss, gsim_loss
from marval_rl.models import MaskedModel
from marval_rl.models.diffusion import add_noise, predict_start
from marval_rl.models.head import guide
from marval_rl.models.unmasking import linear_guidance_scale, random_order
from marval_rl.runtime.settings import Conditions, Needs, setting
from marval_rl.trainers.arguments import MaskingArguments
from marval_rl.trainers.student_networks import StudentNetworks


@dataclass
class GSIMArguments(MaskingArguments):
    """Where scores are matched."""

    guidance_scale: float = setting(1.2, "Guidance of the teacher's score; 1.0 is none.")
    guidance_schedule: str = setting(
        "constant",
        "constant, or linear: the guidance of the teacher's score grows with the tokens known, as in "
        "sampling one token per step.",
        ["constant", "linear"],
    )
    min_timestep: int = setting(20, "Lowest timestep at which scores are matched.")
    max_timestep: int = setting(950, "Highest timestep at which scores are matched.")
    timestep_draws: int = setting(1, "(t, noise) draws for each token and update.")
    huber_r: float = setting(1e-5, "r of the pseudo-Huber distance.")

    counts_if: ClassVar[Conditions] = {
        Needs("a guidance_scale other than 1", ("guidance_scale",), lambda scale: scale != 1): ("guidance_schedule",),
    }


@dataclass
class AuxiliaryArguments:
    """How the auxiliary score network is trained."""

    auxiliary_learning_rate: float = setting(3e-4, "Learning rate of the auxiliary network.")
    auxiliary_updates: int = setting(4, "Steps for each student update: all of them train the auxiliary network.")
    auxiliary_warmup_steps: int = setting(100, "First steps that train the auxiliary network only.")

    @property
    def has_auxiliary(self) -> bool:
        """Whether there is an auxiliary network."""
        return True

    @property
    def cycle(self) -> int:
        """Steps of which the first may move the student."""
        return self.auxiliary_updates if self.has_auxiliary else 1

    def moves_model(self, step: int) -> bool:
        """Whether the step with this index moves the student."""
        return step % self.cycle == 0 and not (self.has_auxiliary and step < self.auxiliary_warmup_steps)


class Contexts(NamedTuple):
    """Images of which some tokens are masked: what student and teacher are asked about."""

    tokens: Tensor  # [B, L, C]
    class_labels: Tensor  # [B]
    order: Tensor  # [B, L]
    num_masked: int  # M


class ScoreMatching:
    """GSIM's two losses, and the cycle in which they are used.

    Letters in shapes: B contexts, L tokens per image, M masked tokens, C channels per token, D width of a condition,
    R = timestep_draws.

    Args:
        teacher: MAR teacher; it is frozen.
        args: Where scores are matched.
        weight: Factor of the student's loss.
        loss_name: Its name among the metrics.
    """

    def __init__(self, teacher: MaskedModel, args: GSIMArguments, weight: float = 1.0, loss_name: str = "student_loss"):
        if not 0 <= args.min_timestep <= args.max_timestep < teacher.config.num_train_timesteps:
            raise ValueError(
                f"the timesteps {args.min_timestep}..{args.max_timestep} do not lie in "
                f"0..{teacher.config.num_train_timesteps - 1}: check min_timestep and max_timestep (in RL with gsim_)"
            )
        self.teacher = teacher.eval().requires_grad_(False)
        self.args = args
        self.weight = weight
        self.loss_name = loss_name

    def contexts(self, tokens: Tensor, class_labels: Tensor) -> Contexts:
        """Random contexts of images: tokens [B, L, C], class_labels [B]. All mask equally many tokens."""
        batch, num_tokens, _ = tokens.shape
        order = random_order(batch, num_tokens, tokens.device)
        num_masked = self.args.draw_num_masked(self.teacher.config)
        return Contexts(tokens, class_labels, order, num_masked)

    def losses(
        self,
        networks: StudentNetworks,
        contexts: Contexts | None,
        moves_student: bool,
        buffer: dict[str, Tensor],
        micro_batch: int,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """weight x the student's loss (if the step moves it) + the auxiliary network's loss, and metrics.

        Args:
            networks: The student and the auxiliary network.
            contexts: None in a step that trains the auxiliary network alone: it costs the head alone.
            moves_student: Whether the step moves the student.
            buffer: Keeps the sample between the steps of a cycle.
            micro_batch: Index within the step; each keeps a sample of its own.
        """
        loss = torch.zeros((), device=self.teacher.device)
        metrics: dict[str, Tensor] = {}
        names = {name: f"{micro_batch}.gsim.{name}" for name in ("x_start", "condition")}
        if contexts is not None:
            if moves_student:
                student_loss, metrics, sample = self.student_loss(networks, contexts)
                loss, metrics = self.weight * student_loss, {self.loss_name: student_loss, **metrics}
            else:
                sample = self.sample(networks, contexts)
            buffer |= {key: sample[name] for name, key in names.items()}
        auxiliary_loss = self.auxiliary_loss(networks, {name: buffer[key] for name, key in names.items()})
        return loss + auxiliary_loss, {**metrics, "auxiliary_loss": auxiliary_loss}

    def student_loss(
        self, networks: StudentNetworks, contexts: Contexts
    ) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
        """GSIM's loss for the student.

        Returns (loss, metrics, sample); the sample, detached {x_start [B, M, C], condition [B, M, D]}, is what
        `auxiliary_loss` learns from.
        """
        x_start, condition = self._generate(networks, contexts)
        condition = condition.detach()
        x_t, _, t = self._diffuse(x_start)  # [R, B, M, C], [R, B, M]
        schedule = self.teacher.schedule
        auxiliary = networks.auxiliary
        assert auxiliary is not None
        with frozen(auxiliary):
            eps = auxiliary(x_t, t, condition)[..., : x_start.shape[-1]].float()
        auxiliary_start = predict_start(schedule, x_t, eps, t)
        teacher_start = predict_start(schedule, x_t, self._teacher_noise(contexts, x_t, t), t)
        loss, metrics = gsim_loss(x_start, auxiliary_start, teacher_start, self.args.huber_r)
        return loss, metrics, {"x_start": x_start.detach(), "condition": condition}

    @torch.no_grad()
    def sample(self, networks: StudentNetworks, contexts: Contexts) -> dict[str, Tensor]:
        """What the student generates in the contexts, without a gradient: the input of `auxiliary_loss`."""
        x_start, condition = self._generate(networks, contexts)
        return {"x_start": x_start, "condition": condition}

    def auxiliary_loss(self, networks: StudentNetworks, sample: dict[str, Tensor]) -> Tensor:
        """Denoising score matching of the auxiliary network on the student's tokens, under the student's own
        condition."""
        x_t, noise, t = self._diffuse(sample["x_start"])
        assert networks.auxiliary is not None
        eps = networks.auxiliary(x_t, t, sample["condition"])[..., : noise.shape[-1]].float()
        return denoising_loss(eps, noise)

    def _generate(self, networks: StudentNetworks, contexts: Contexts) -> tuple[Tensor, Tensor]:
        """The student's tokens x0 [B, M, C] and its conditions [B, M, D]."""
        tokens, class_labels, order, num_masked = contexts
        noise = torch.randn(len(tokens), num_masked, tokens.shape[-1], device=tokens.device)
        return networks.student.one_step(tokens, class_labels, order, num_masked, 0, noise)

    def _diffuse(self, x_start: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x_t, its noise and timesteps for R draws of x_start [B, M, C]: [R, B, M, C] twice and [R, B, M]."""
        shape = (self.args.timestep_draws, *x_start.shape)
        t = torch.randint(self.args.min_timestep, self.args.max_timestep + 1, shape[:-1], device=x_start.device)
        noise = torch.randn(shape, device=x_start.device)
        return add_noise(self.teacher.schedule, x_start, noise, t), noise, t

    def _teacher_noise(self, contexts: Contexts, x_t: Tensor, t: Tensor) -> Tensor:
        """eps_p = eps_null + s (eps_c - eps_null) of the teacher under its own condition; differentiable in x_t."""
        guided = self.args.guidance_scale != 1.0
        with torch.no_grad():
            condition = self.teacher(*contexts, guidance_pass=guided).condition
        channels = x_t.shape[-1]
        if not guided:
            return self.teacher.diffloss(x_t, t, condition)[..., :channels].float()
        pair = condition.unflatten(0, (2, 1, -1))  # [2, 1, B, M, D], for the R draws alike
        outputs = self.teacher.diffloss(x_t, t, pair)  # [2, R, B, M, 2C]
        scale = self.args.guidance_scale
        if self.args.guidance_schedule == "linear":
            scale = linear_guidance_scale(contexts.tokens.shape[1], contexts.num_masked - 1, scale)
        return guide(outputs.float(), scale)[0, ..., :channels]


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """Within this context the module's parameters take no gradient; gradients still flow through it to its inputs."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)
