"""Reward back-propagation, what MARVAL-RL (arXiv 2511.15190) does itself: minimise -R(decode(G_theta(z, class, K)))."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from marval_rl.models import MARModel
from marval_rl.trainers.gsim import StudentNetworks
from marval_rl.trainers.reward_base import RewardTrainer, RewardTrainingArguments
from marval_rl.trainers.rollout import differentiable_rollout


@dataclass
class RewardBackpropConfig(RewardTrainingArguments):
    """Arguments of `RewardBackpropTrainer`: the gradient runs through all unmasking steps, each checkpointed."""


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

    def compute_loss(self, model: nn.Module, inputs: list[dict[str, Any]], *_: Any, **__: Any) -> Tensor:
        if self.state.global_step % self.args.cycle:
            return model(self.auxiliary_loss)
        return model(self._losses, inputs)

    def _losses(self, networks: StudentNetworks, rows: list[dict[str, Any]]) -> Tensor:
        labels, columns = self.rollout_labels(rows)
        updates_student = self.updates_student(self.state.global_step)
        with torch.set_grad_enabled(updates_student):
            rollout = differentiable_rollout(networks.student, labels, self.args.num_unmasking_steps)
        loss = torch.zeros((), device=labels.device)
        if updates_student:
            reward = self.score(rollout["tokens"], labels, columns, with_grad=True).total
            scored = ~reward.isnan()
            loss = -torch.where(scored, reward, 0).sum() / scored.sum().clamp(min=1)
            self.record({"reward": reward.detach().nanmean(), "reward_std": reward.detach()[scored].std()})
        if self.matcher is not None:
            loss = loss + self.anchor_losses(networks, rollout)
        return loss
