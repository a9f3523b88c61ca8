"""Score implicit matching on MAR: contexts, samples and the two losses. Shared by distillation and by RL's anchor."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from marval_rl.losses.gsim import denoising_loss, gsim_loss
from marval_rl.models import MARModel
from marval_rl.models.diffusion import add_noise, predict_start
from marval_rl.models.generation import guide
from marval_rl.models.head import DiffusionHead


class StudentNetworks(nn.Module):
    """The student and the auxiliary score network under one roof, for one optimizer and one distributed engine.

    `forward` runs a function of the networks. All use of parameters must happen inside a `forward` of the module
    that the engine wraps, or DDP would not synchronise gradients and ZeRO-3 would not gather weights.
    """

    def __init__(self, student: MARModel, auxiliary: DiffusionHead | None = None):
        super().__init__()
        # Never asked for the null class: an engine would make its missing gradient a zero, and weight decay shrink it.
        self.student = student
        self.student.fake_latent.requires_grad_(False)
        self.auxiliary = auxiliary

    def forward(self, function: Callable[..., Any], *args: Any) -> Any:
        return function(self, *args)

    # transformers' Trainer calls the first, before its release 5.23 the second.

    def activation_checkpointing_enable(self, **options: Any) -> None:
        """Keep only the inputs of the student's blocks for the backward pass."""
        self.student.activation_checkpointing_enable(**options)

    def gradient_checkpointing_enable(self, **options: Any) -> None:
        """The older name of `activation_checkpointing_enable`."""
        self.student.gradient_checkpointing_enable(**options)


class ScoreMatcher:
    """Draws contexts and computes the two losses of GSIM.

    Args:
        teacher: Frozen MAR teacher.
        guidance_scale: Of the teacher's score, MAR's convention.
        timestep_range: (lowest, highest) t of x_t, inclusive.
        timestep_draws: (t, noise) draws for each token of the student.
        huber_r: r of the pseudo-Huber distance.
    """

    def __init__(
        self,
        teacher: MARModel,
        guidance_scale: float,
        timestep_range: tuple[int, int],
        timestep_draws: int,
        huber_r: float = 1e-5,
    ):
        low, high = timestep_range
        if not 0 <= low <= high < teacher.config.num_train_timesteps:
            raise ValueError(
                f"the timesteps {low}..{high} do not lie in 0..{teacher.config.num_train_timesteps - 1}: "
                "check min_timestep and max_timestep"
            )
        self.teacher = teacher.eval().requires_grad_(False)
        self.guidance_scale = guidance_scale
        self.timestep_range = timestep_range
        self.timestep_draws = timestep_draws
        self.huber_r = huber_r

    def student_loss(
        self, networks: StudentNetworks, tokens: Tensor, class_labels: Tensor, order: Tensor, num_masked: int
    ) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
        """GSIM's loss for the student in the contexts (tokens [B, L, C] masked by order and num_masked).

        Returns (loss, metrics, sample); the sample, detached {x_start [B, M, C], condition [B, M, D]}, is what
        `auxiliary_loss` learns from.
        """
        noise = torch.randn(len(tokens), num_masked, tokens.shape[-1], device=tokens.device)
        x_start, condition = networks.student.one_step(tokens, class_labels, order, num_masked, 0, noise)
        condition = condition.detach()
        x_t, _, t = self._diffuse(x_start)
        schedule = self.teacher.schedule
        channels = x_start.shape[-1]
        with frozen(networks.auxiliary):
            eps = networks.auxiliary(x_t, t, condition)[..., :channels].float()
        auxiliary_start = predict_start(schedule, x_t, eps, t)
        teacher_start = predict_start(
            schedule, x_t, self._teacher_noise(tokens, class_labels, order, num_masked, x_t, t), t
        )
        loss, metrics = gsim_loss(x_start, auxiliary_start, teacher_start, self.huber_r)
        return loss, metrics, {"x_start": x_start.detach(), "condition": condition}

    @torch.no_grad()
    def sample(
        self, networks: StudentNetworks, tokens: Tensor, class_labels: Tensor, order: Tensor, num_masked: int
    ) -> dict[str, Tensor]:
        """What the student paints in the contexts, without a gradient: the input of `auxiliary_loss`."""
        noise = torch.randn(len(tokens), num_masked, tokens.shape[-1], device=tokens.device)
        x_start, condition = networks.student.one_step(tokens, class_labels, order, num_masked, 0, noise)
        return {"x_start": x_start, "condition": condition}

    def auxiliary_loss(self, networks: StudentNetworks, sample: dict[str, Tensor]) -> Tensor:
        """Denoising score matching of the auxiliary network on the student's tokens, under the student's own
        condition."""
        x_t, noise, t = self._diffuse(sample["x_start"])
        eps = networks.auxiliary(x_t, t, sample["condition"])[..., : noise.shape[-1]].float()
        return denoising_loss(eps, noise)

    def _diffuse(self, x_start: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x_t, its noise and timesteps for R draws of x_start [B, M, C]: [R, B, M, C] twice and [R, B, M]."""
        low, high = self.timestep_range
        shape = (self.timestep_draws, *x_start.shape)
        t = torch.randint(low, high + 1, shape[:-1], device=x_start.device)
        noise = torch.randn(shape, device=x_start.device)
        return add_noise(self.teacher.schedule, x_start, noise, t), noise, t

    def _teacher_noise(
        self, tokens: Tensor, class_labels: Tensor, order: Tensor, num_masked: int, x_t: Tensor, t: Tensor
    ) -> Tensor:
        """eps_p = eps_null + s (eps_c - eps_null) of the teacher under its own condition; differentiable in x_t."""
        guided = self.guidance_scale != 1.0
        with torch.no_grad():
            condition = self.teacher(tokens, class_labels, order, num_masked, guidance_pass=guided).condition
        channels = x_t.shape[-1]
        if not guided:
            return self.teacher.diffloss(x_t, t, condition)[..., :channels].float()
        labelled, null = condition.chunk(2)
        outputs = torch.stack([self.teacher.diffloss(x_t, t, labelled), self.teacher.diffloss(x_t, t, null)])
        return guide(outputs.float(), self.guidance_scale)[0, ..., :channels]


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
