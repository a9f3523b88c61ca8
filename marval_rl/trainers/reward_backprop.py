"""Reward back-propagation, what MARVAL-RL (arXiv 2511.15190) does itself: minimise -R(decode(G_theta(z, class, K)))."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from marval_rl.losses.policy import action_kl
from marval_rl.models import MARModel
from marval_rl.models.unmasking import unmasking_steps
from marval_rl.runtime.randomness import derive_generator
from marval_rl.runtime.settings import Conditions, Needs
from marval_rl.trainers.gsim import StudentNetworks
from marval_rl.trainers.reward_base import RewardTrainer, RewardTrainingArguments
from marval_rl.trainers.rollout import differentiable_rollout

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
    reward_threshold: float | None = field(
        default=None,
        metadata={"help": "The loss is relu(threshold - reward) (default: -reward)."},
    )

    counts_if: ClassVar[Conditions] = {
        Needs("backprop_steps last or random", ("backprop_steps",), lambda which: which != "all"): (
            "num_backprop_steps",
        ),
        Needs("a KL divergence (beta > 0), whose unit it is", ("beta",), lambda beta: beta != 0): ("sigma",),
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

    args: RewardBackpropConfig

    def __init__(self, model: MARModel | str, reward_funcs: Any, args: RewardBackpropConfig, **kwargs: Any):
        super().__init__(model, reward_funcs, args, **kwargs)
        if not self.rewards.differentiable:
            raise ValueError(
                f"reward_backprop needs differentiable rewards, but not all of {', '.join(self.rewards.names)} are: "
                "use method grpo, or a reward class with `differentiable = True`"
            )

        most = len(unmasking_steps(self.mar.config.num_tokens, args.num_unmasking_steps))
        self.num_steps = most
        if args.backprop_steps != "all" and not 1 <= args.num_backprop_steps <= most:
            raise ValueError(f"num_backprop_steps {args.num_backprop_steps} is outside 1..{most}")

    def compute_loss(self, model: nn.Module, inputs: list[dict[str, Any]], *_: Any, **__: Any) -> Tensor:
        if self.state.global_step % self.args.cycle:
            return model(self.auxiliary_losses)
        return model(self._losses, inputs)

    def _losses(self, networks: StudentNetworks, rows: list[dict[str, Any]]) -> Tensor:
        args, student = self.args, networks.student
        labels, columns = self.rollout_labels(rows)
        updates_student = self.updates_student(self.state.global_step)
        divergences: list[Tensor] = []

        def diverge(mean: Tensor, state: dict[str, Tensor], masked: int, kept: int) -> None:
            divergences.append(action_kl(mean, self.reference_mean(student, state, masked, kept), args.sigma))

        with torch.set_grad_enabled(updates_student):
            rollout = differentiable_rollout(
                student, labels, args.num_unmasking_steps, self._backprop_steps(), diverge if args.beta > 0 else None
            )
        loss = torch.zeros((), device=labels.device)
        if updates_student:
            scores = self.score(rollout["tokens"], labels, columns, with_grad=True)
            self.record_scores(scores.by_reward())
            loss = self._reward_loss(scores.total)
            if divergences:
                kl = torch.stack(divergences).mean()
                self.record({"kl": kl})
                loss = loss + args.beta * kl
        if self.anchor is not None:
            loss = loss + self.anchor_losses(networks, rollout)
        return loss

    def _reward_loss(self, reward: Tensor) -> Tensor:
        """-R, or relu(threshold - R), over the images that were scored."""
        scored = ~reward.isnan()
        self.record({"reward": reward.detach().nanmean(), "reward_std": reward.detach()[scored].std()})
        threshold = self.args.reward_threshold
        losses = -reward if threshold is None else (threshold - reward).relu()
        return torch.where(scored, losses, 0).sum() / scored.sum().clamp(min=1)

    def _backprop_steps(self) -> list[int]:
        """Indices of the unmasking steps that take a gradient: a function of the step, so alike in all processes."""
        args = self.args
        if args.backprop_steps == "all":
            return list(range(self.num_steps))
        if args.backprop_steps == "last":
            return list(range(self.num_steps - args.num_backprop_steps, self.num_steps))
        generator = derive_generator("cpu", args.seed, "backprop steps", self.state.global_step)
        return torch.randperm(self.num_steps, generator=generator)[: args.num_backprop_steps].tolist()
