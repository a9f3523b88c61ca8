"""GRPO on the unmasking steps of a one-step student.

Group relative policy optimization (DeepSeekMath, arXiv 2402.03300) with the exact Gaussian policy of
`losses/policy.py`: one action an unmasking step, one reward an image.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from marval_rl.losses.policy import REWARD_SCALES, action_kl, action_log_prob, clipped_policy_loss
from marval_rl.models import MARModel
from marval_rl.models.unmasking import unmasking_steps
from marval_rl.rewarding.aggregation import MULTI_OBJECTIVE_AGGREGATIONS, aggregate_advantages
from marval_rl.trainers.gsim import StudentNetworks
from marval_rl.trainers.reward_base import RewardTrainer, RewardTrainingArguments
from marval_rl.trainers.rollout import sample_rollout, step_mean


@dataclass
class MARGRPOConfig(RewardTrainingArguments):
    """Arguments of `MARGRPOTrainer`; names as in TRL's `GRPOConfig` where it has them."""

    num_generations: int = field(default=12, metadata={"help": "G, images a group (of one class)."})
    num_iterations: int = field(default=1, metadata={"help": "Passes over each generation batch."})
    steps_per_generation: int | None = field(
        default=None, metadata={"help": "Micro-batches a generation batch (default: gradient_accumulation_steps)."}
    )
    sigma: float = field(default=0.1, metadata={"help": "Standard deviation of the policy, in latent units."})
    beta: float = field(default=0.0, metadata={"help": "Weight of the KL divergence from the reference model."})
    epsilon: float = field(default=0.2, metadata={"help": "Clip range of the ratio of an unmasking step."})
    epsilon_high: float | None = field(default=None, metadata={"help": "Upper clip range (default: epsilon)."})
    scale_rewards: str = field(default="group", metadata={"help": '"group", "batch" or "none".'})
    multi_objective_aggregation: str = field(
        default=MULTI_OBJECTIVE_AGGREGATIONS[0],
        metadata={
            "help": "Several rewards: compare their weighted sum, or normalise each by itself first (GDPO).",
            "choices": list(MULTI_OBJECTIVE_AGGREGATIONS),
        },
    )
    num_trained_steps: int | None = field(
        default=None, metadata={"help": "Unmasking steps trained an update, drawn at random (default: all)."}
    )

    def __post_init__(self):
        super().__post_init__()
        if self.steps_per_generation is None:
            self.steps_per_generation = self.gradient_accumulation_steps
        if self.epsilon_high is None:
            self.epsilon_high = self.epsilon
        if self.num_generations < 2:
            raise ValueError(
                f"num_generations must be at least 2, not {self.num_generations}: an advantage compares images"
            )
        if self.scale_rewards not in REWARD_SCALES:
            raise ValueError(f'scale_rewards must be one of {", ".join(REWARD_SCALES)}, not "{self.scale_rewards}"')
        if self.sigma <= 0:
            raise ValueError(f"sigma must be positive, not {self.sigma}: without noise there is no policy gradient")
        images = self.per_device_train_batch_size * self.steps_per_generation
        if images % self.num_generations:
            raise ValueError(
                f"a generation batch of {images} images a process does not divide into groups of num_generations = "
                f"{self.num_generations} (per_device_train_batch_size {self.per_device_train_batch_size} x "
                f"steps_per_generation {self.steps_per_generation})"
            )

    @property
    def rows_per_batch(self) -> int:
        """The rows of one generation batch; each becomes a group of images."""
        return self.per_device_train_batch_size * self.steps_per_generation // self.num_generations

    def batch_pattern(self) -> list[bool]:
        """Rows are read where a rollout begins."""
        accumulation = self.gradient_accumulation_steps
        rollout_steps = math.lcm(self.rollout_period, accumulation) // accumulation * self.cycle
        return [
            step % self.cycle == 0 and self.starts_rollout(step, micro_batch)
            for step in range(rollout_steps)
            for micro_batch in range(accumulation)
        ]

    @property
    def rollout_period(self) -> int:
        """Micro-batches of policy updates that one generation batch serves."""
        return self.steps_per_generation * self.num_iterations

    def policy_micro_batch(self, step: int, micro_batch: int) -> int:
        """Counts micro-batches of policy updates since the start; a function of the step, so it survives resumption."""
        return step // self.cycle * self.gradient_accumulation_steps + micro_batch

    def starts_rollout(self, step: int, micro_batch: int) -> bool:
        """Whether a policy update begins a new generation batch in this micro-batch."""
        return self.policy_micro_batch(step, micro_batch) % self.rollout_period == 0


class MARGRPOTrainer(RewardTrainer):
    """Trains a student by GRPO; arguments as `RewardTrainer`'s."""

    args: MARGRPOConfig

    def __init__(self, model: MARModel | str, reward_funcs: Any, args: MARGRPOConfig, **kwargs: Any):
        super().__init__(model, reward_funcs, args, **kwargs)
        self.pairs = unmasking_steps(self.mar.config.num_tokens, args.num_unmasking_steps)
        if args.num_trained_steps is not None and not 1 <= args.num_trained_steps <= len(self.pairs):
            raise ValueError(f"num_trained_steps {args.num_trained_steps} is outside 1..{len(self.pairs)}")
        self.reference = None
        if args.beta > 0:
            self.reference = copy.deepcopy(self.mar).eval().requires_grad_(False).to(args.device)

    def compute_loss(self, model: nn.Module, inputs: list[dict[str, Any]], *_: Any, **__: Any) -> Tensor:
        args, step = self.args, self.state.global_step
        if step % args.cycle:
            return model(self.auxiliary_loss)
        if args.starts_rollout(step, self.micro_batch):
            self.generate_rollouts(inputs)
        part = args.policy_micro_batch(step, self.micro_batch) % args.steps_per_generation
        start = part * args.per_device_train_batch_size
        rollout = {
            name: self.buffer[name][start : start + args.per_device_train_batch_size]
            for name in ("class_labels", "order", "noise", "tokens", "log_prob", "advantages")
        }
        return model(self._losses, rollout)

    def generate_rollouts(self, rows: list[dict[str, Any]]) -> None:
        """Roll out, score and compare one generation batch; fills the buffer."""
        args = self.args
        labels, columns = self.rollout_labels(rows, repeats=args.num_generations)
        self.mar.eval()
        rollout = sample_rollout(self.mar, labels, args.num_unmasking_steps, args.sigma)
        self.mar.train()
        scores = self.score(rollout["tokens"], labels, columns)
        rollout["advantages"], metrics = aggregate_advantages(
            scores.by_reward(),
            self.rewards.weights,
            args.num_generations,
            args.scale_rewards,
            args.multi_objective_aggregation,
        )
        self.record(metrics)
        # Micro-batches are cut from a shuffled generation batch, so that each holds several groups.
        shuffled = torch.randperm(len(labels), device=labels.device)
        self.buffer |= {name: values[shuffled].contiguous() for name, values in rollout.items()}

    def _losses(self, networks: StudentNetworks, rollout: dict[str, Tensor]) -> Tensor:
        args = self.args
        loss = torch.zeros((), device=args.device)
        if self.updates_student(self.state.global_step):
            loss = self._policy_loss(networks.student, rollout)
        if self.matcher is not None:
            loss = loss + self.anchor_losses(networks, rollout)
        return loss

    def _policy_loss(self, student: MARModel, rollout: dict[str, Tensor]) -> Tensor:
        args = self.args
        count = args.num_trained_steps or len(self.pairs)
        chosen = torch.randperm(len(self.pairs))[:count].tolist() if count < len(self.pairs) else range(count)
        total = torch.zeros((), device=args.device)
        for index in chosen:
            masked, kept = self.pairs[index]
            actions, means = step_mean(student, rollout, masked, kept)
            log_prob = action_log_prob(actions, means, args.sigma)
            loss, metrics = clipped_policy_loss(
                log_prob, rollout["log_prob"][:, index], rollout["advantages"], args.epsilon, args.epsilon_high
            )
            if self.reference is not None:
                with torch.no_grad():
                    _, reference_means = step_mean(self.reference, rollout, masked, kept)
                kl = action_kl(means, reference_means, args.sigma).mean()
                metrics["kl"] = kl
                loss = loss + args.beta * kl
            self.record(metrics)
            total = total + loss / count
        return total
