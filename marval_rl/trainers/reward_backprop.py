"""Reward back-propagation, what MARVAL-RL (arXiv 2511.15190) does itself: minimise -R(decode(G_theta(z, class, K))).

G_theta is the whole generation, K unmasking steps from noise z to tokens. The gradient runs through all of them, or
through the last ones or random ones alone: those are the published baselines DRaFT-K (arXiv 2309.17400) and ReFL (arXiv
2304.05977; its loss is relu(threshold - R)).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from marval_rl.losses.advantages import group_std
from marval_rl.models import MaskedModel
from marval_rl.models.sampling import student_mean, unmask
from marval_rl.models.unmasking import random_order, unmasking_steps
from marval_rl.randomness import derive_generator, kept_random_state
from marval_rl.rewarding import RewardScores
from marval_rl.runtime.distributed import failing_together
from marval_rl.runtime.profiling import REWARD, ROLLOUT, phase
from marval_rl.runtime.settings import Conditions, Needs
from marval_rl.trainers.reward_trainer import RewardTrainer, RewardTrainingArguments

BACKPROP_STEPS = ("all", "last", "random")


@dataclass
class RewardBackpropConfig(RewardTrainingArguments):
    """Arguments of `RewardBackpropTrainer`."""

    backprop_steps: str = field(
        default="all",
        metadata={
            "help": "Unmasking steps that take a gradient: all, the last ones (DRaFT-K), or random ones (ReFL).",
            "choices": list(BACKPROP_STEPS),
        },
    )
    num_backprop_steps: int = field(default=1, metadata={"help": "How many, if not all."})

    counts_if: ClassVar[Conditions] = {
        Needs("backprop_steps last or random", ("backprop_steps",), lambda which: which != "all"): (
            "num_backprop_steps",
        ),
        Needs("a KL divergence (beta > 0), whose unit it is", ("beta",), lambda beta: beta != 0): ("policy_std",),
    }

    def __post_init__(self):
        super().__post_init__()
        if self.backprop_steps not in BACKPROP_STEPS:
            raise ValueError(f'backprop_steps must be one of {", ".join(BACKPROP_STEPS)}, not "{self.backprop_steps}"')


class RewardBackpropTrainer(RewardTrainer):
    """Trains a student by the gradient of differentiable rewards; arguments as `RewardTrainer`'s.

    Raises:
        ValueError: If a reward is not differentiable.
    """

    method = "reward_backprop"

    args: RewardBackpropConfig

    def __init__(self, model: MaskedModel | str, reward_funcs: Any, args: RewardBackpropConfig, **kwargs: Any):
        super().__init__(model, reward_funcs, args, **kwargs)
        if self.rewards is not None and not self.rewards.differentiable:
            raise ValueError(
                f"reward_backprop needs differentiable rewards, but not all of {', '.join(self.rewards.names)} are: "
                "use method grpo, or a reward class with `differentiable = True`"
            )
        self.num_steps = len(unmasking_steps(self.mar.config.num_tokens, args.num_unmasking_steps))
        if args.backprop_steps != "all" and not 1 <= args.num_backprop_steps <= self.num_steps:
            raise ValueError(f"num_backprop_steps {args.num_backprop_steps} is outside 1..{self.num_steps}")

    def reward_loss(
        self, student: MaskedModel, rows: list[dict[str, Any]]
    ) -> tuple[Tensor, dict[str, Tensor], Tensor | None]:
        labels, columns = self.labels_and_columns(rows)
        moves_student = self.args.moves_model(self.state.global_step)
        with phase(ROLLOUT), torch.set_grad_enabled(moves_student):
            rollout, divergences = self.generate(student, labels)
        if not moves_student:
            return torch.zeros((), device=labels.device), rollout, None
        rollout["images"] = self.decode_tokens(rollout["tokens"], labels)
        loss = torch.zeros((), device=labels.device)
        if self.rewards is not None:
            scores = self.score(rollout["images"], labels, columns)
            self.record_scores(scores.by_reward(), len(labels))
            loss = self.loss_of(scores.total)
        return loss, rollout, torch.stack(divergences) if divergences else None

    def score(self, images: Tensor, class_labels: Tensor, columns: dict[str, list[Any]]) -> RewardScores:
        """Rewards of images [B, C, H, W], with a gradient."""
        assert self.rewards is not None
        with phase(REWARD), failing_together(self.args.device), kept_random_state(self.args.device):
            return self.rewards.score(*self.reward_arguments(images, class_labels, columns), with_grad=True)

    def generate(self, student: MaskedModel, class_labels: Tensor) -> tuple[dict[str, Tensor], list[Tensor]]:
        """G_theta(z, class, K), with a gradient through the steps that `backprop_steps` names.

        Returns {class_labels [B], order [B, L], noise [B, L, C], tokens [B, L, C]}, and for each step with a gradient
        the divergences [B] from the reference model (none without `beta`).
        """
        args, config, device = self.args, student.config, class_labels.device
        order = random_order(len(class_labels), config.num_tokens, device)
        noise = torch.randn(len(class_labels), config.num_tokens, config.token_channels, device=device)
        rollout = {"class_labels": class_labels, "order": order, "noise": noise}
        chosen = self.steps_with_gradient()
        divergences = []
        for step in unmask(
            partial(student_mean, student, rollout),
            order,
            config.token_channels,
            args.num_unmasking_steps,
            gradient_steps=chosen,
        ):
            if args.beta > 0 and torch.is_grad_enabled() and step.number in chosen:
                kl = self.anchors.kl(step.mean, student, rollout, step.before, step.num_masked, step.num_kept)
                divergences.append(kl)  # [B]
        return {**rollout, "tokens": step.tokens}, divergences

    def steps_with_gradient(self) -> list[int]:
        """Indices of the unmasking steps that take a gradient: a function of the step, so alike in all processes."""
        args = self.args
        if args.backprop_steps == "all":
            return list(range(self.num_steps))
        if args.backprop_steps == "last":
            return list(range(self.num_steps - args.num_backprop_steps, self.num_steps))
        generator = derive_generator("cpu", args.seed, "backprop steps", self.state.global_step)
        return torch.randperm(self.num_steps, generator=generator)[: args.num_backprop_steps].tolist()

    def loss_of(self, reward: Tensor) -> Tensor:
        """-R, averaged over the images that were scored; reward [B], NaN where one was not."""
        values = reward.detach()
        self.record({"reward": values.nanmean(), "reward_std": group_std(values, len(values)).squeeze()})
        scored = ~reward.isnan()
        return torch.where(scored, -reward, 0).sum() / scored.sum().clamp(min=1)
