"""GRPO on the unmasking steps of a one-step student.

Group relative policy optimization (DeepSeekMath, arXiv 2402.03300) with the exact Gaussian policy of
`losses/policy.py`: one action an unmasking step, one reward an image.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from marval_rl.errors import PolicyMismatchError
from marval_rl.losses.policy import (
    IMPORTANCE_SAMPLING_LEVELS,
    LOG_PROB_REDUCTIONS,
    LOSS_TYPES,
    REWARD_SCALES,
    action_kl,
    action_log_prob,
    group_weights,
    policy_loss,
)
from marval_rl.models import MARModel
from marval_rl.models.unmasking import unmasking_steps
from marval_rl.rewarding.aggregation import MULTI_OBJECTIVE_AGGREGATIONS, aggregate_advantages
from marval_rl.runtime.distributed import failing_together, gather_rows, whole_weights
from marval_rl.runtime.randomness import derive_generator
from marval_rl.runtime.settings import Conditions, Needs
from marval_rl.trainers.gsim import StudentNetworks
from marval_rl.trainers.reward_base import RewardTrainer, RewardTrainingArguments
from marval_rl.trainers.rollout import draw_chances, sample_rollout, step_mean

SUM_CLIP_RANGE = 0.2  # of the ratio of a whole action
RATIO_TOLERANCE = 1e-5  # how far ratios may be from 1 before the first update


@dataclass
class MARGRPOConfig(RewardTrainingArguments):
    """Arguments of `MARGRPOTrainer`; names as in TRL's `GRPOConfig` where it has them."""

    num_generations: int = field(default=12, metadata={"help": "G, images a group (of one class)."})
    num_iterations: int = field(default=1, metadata={"help": "Passes over each generation batch."})
    steps_per_generation: int | None = field(
        default=None, metadata={"help": "Micro-batches a generation batch (default: gradient_accumulation_steps)."}
    )
    loss_type: str = field(
        default="grpo",
        metadata={"help": "PPO's clipped loss, or CISPO's clipped weights.", "choices": list(LOSS_TYPES)},
    )
    importance_sampling_level: str = field(
        default="unmasking_step",
        metadata={"help": "What has a ratio of its own.", "choices": list(IMPORTANCE_SAMPLING_LEVELS)},
    )
    log_prob_reduction: str = field(
        default="sum",
        metadata={"help": "Over the numbers of an action.", "choices": list(LOG_PROB_REDUCTIONS)},
    )
    epsilon: float | None = field(
        default=None,
        metadata={"help": "Clip range of the ratio (default: 0.2 for a sum, as much of an average action for a mean)."},
    )
    epsilon_high: float | None = field(default=None, metadata={"help": "Upper clip range (default: epsilon)."})
    scale_rewards: str = field(default="group", metadata={"help": '"group", "batch" or "none".'})
    reward_std_floor: float = field(
        default=0.0, metadata={"help": "No deviation of rewards counts as less than this when advantages are scaled."}
    )
    advantage_clip: float | None = field(default=None, metadata={"help": "Advantages are held in +- this."})
    multi_objective_aggregation: str = field(
        default=MULTI_OBJECTIVE_AGGREGATIONS[0],
        metadata={
            "help": "Several rewards: compare their weighted sum, or normalise each by itself first (GDPO).",
            "choices": list(MULTI_OBJECTIVE_AGGREGATIONS),
        },
    )
    num_trained_steps: int | None = field(
        default=None, metadata={"help": "Unmasking steps trained an update (default: all that explore)."}
    )
    trained_steps: str = field(
        default="random",
        metadata={"help": "Which ones, if not all: drawn at random, or the first.", "choices": ["random", "first"]},
    )
    exploration_window: int | None = field(
        default=None,
        metadata={"help": "Only this many unmasking steps in a row explore, and are trained (default: all)."},
    )
    exploration_shift: int = field(
        default=0, metadata={"help": "Rollouts after which the window moves on by a step; 0: it stays at the first."}
    )
    share_order: bool = field(default=False, metadata={"help": "One unmasking order for all images of a group."})
    share_noise: bool = field(default=False, metadata={"help": "One noise z for all images of a group."})

    counts_if: ClassVar[Conditions] = {
        Needs("num_trained_steps", ("num_trained_steps",), lambda n: n is not None): ("trained_steps",),
        Needs("exploration_window", ("exploration_window",), lambda n: n is not None): ("exploration_shift",),
        Needs(
            "loss_type grpo, or without epsilon_high: cispo has no lower clip range",
            ("loss_type", "epsilon_high"),
            lambda kind, high: kind != "cispo" or high is None,
        ): ("epsilon",),
        Needs(
            "multi_objective_aggregation sum_then_normalize",
            ("multi_objective_aggregation",),
            lambda order: order == "sum_then_normalize",
        ): ("scale_rewards",),
        Needs(
            "scale_rewards group or batch",
            ("scale_rewards", "multi_objective_aggregation"),
            lambda scale, order: scale != "none" or order != "sum_then_normalize",
        ): ("reward_std_floor",),
    }

    def __post_init__(self):
        super().__post_init__()
        if self.steps_per_generation is None:
            self.steps_per_generation = self.gradient_accumulation_steps
        if self.num_generations < 2:
            raise ValueError(
                f"num_generations must be at least 2, not {self.num_generations}: an advantage compares images"
            )
        if self.loss_type == "dr_grpo":
            raise ValueError(
                'loss_type "dr_grpo" would be "grpo": it differs where completions differ in length, and all images '
                'have equally many unmasking steps. For Dr. GRPO\'s other half set scale_rewards to "none"'
            )
        for name, value, known in (
            ("scale_rewards", self.scale_rewards, REWARD_SCALES),
            ("loss_type", self.loss_type, LOSS_TYPES),
            ("importance_sampling_level", self.importance_sampling_level, IMPORTANCE_SAMPLING_LEVELS),
            ("log_prob_reduction", self.log_prob_reduction, LOG_PROB_REDUCTIONS),
            ("trained_steps", self.trained_steps, ("random", "first")),
        ):
            if value not in known:
                raise ValueError(f'{name} must be one of {", ".join(known)}, not "{value}"')
        if self.generation_batch_size % self.num_generations:
            raise ValueError(
                f"a generation batch of {self.generation_batch_size} images does not divide into groups of "
                f"num_generations = {self.num_generations} (per_device_train_batch_size "
                f"{self.per_device_train_batch_size} x steps_per_generation {self.steps_per_generation} x "
                f"{self.world_size} processes)"
            )

    @property
    def generation_batch_size(self) -> int:
        """N, images of a rollout over all processes."""
        return self.per_device_train_batch_size * self.steps_per_generation * self.world_size

    @property
    def rows_per_batch(self) -> int:
        """The rows of one generation batch; each becomes a group of images, which may span processes."""
        return self.generation_batch_size // self.num_generations

    @property
    def num_readers(self) -> int:
        """All processes read the same rows, and each paints its share of the images."""
        return 1

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

    def explored(self, rollout: int, num_steps: int) -> range:
        """The unmasking steps that explore in the rollout with this index, of num_steps that reveal anything."""
        if self.exploration_window is None:
            return range(num_steps)
        places = num_steps - self.exploration_window + 1
        start = rollout // self.exploration_shift % places if self.exploration_shift else 0
        return range(start, start + self.exploration_window)


class MARGRPOTrainer(RewardTrainer):
    """Trains a student by GRPO; arguments as `RewardTrainer`'s.

    Raises:
        PolicyMismatchError: From `train`, if the log-probabilities of a rollout are not found again before an update.
    """

    args: MARGRPOConfig

    def __init__(self, model: MARModel | str, reward_funcs: Any, args: MARGRPOConfig, **kwargs: Any):
        super().__init__(model, reward_funcs, args, **kwargs)
        config = self.mar.config
        self.pairs = unmasking_steps(config.num_tokens, args.num_unmasking_steps)
        for name, count in (
            ("exploration_window", args.exploration_window),
            ("num_trained_steps", args.num_trained_steps),
        ):
            most = len(args.explored(0, len(self.pairs))) if name == "num_trained_steps" else len(self.pairs)
            if count is not None and not 1 <= count <= most:
                raise ValueError(f"{name} {count} is outside 1..{most}")
        action_size = 1.0
        if args.log_prob_reduction == "mean":
            action_size = config.num_tokens * config.token_channels / len(self.pairs)
        self.epsilon_low = SUM_CLIP_RANGE / action_size if args.epsilon is None else args.epsilon
        self.epsilon_high = self.epsilon_low if args.epsilon_high is None else args.epsilon_high

    def goes_on_with_buffer(self, step: int) -> bool:
        return super().goes_on_with_buffer(step) or not self.args.starts_rollout(step, micro_batch=0)

    def compute_loss(self, model: nn.Module, inputs: list[dict[str, Any]], *_: Any, **__: Any) -> Tensor:
        args, step = self.args, self.state.global_step
        if step % args.cycle:
            return model(self.auxiliary_losses)
        if args.starts_rollout(step, self.micro_batch):
            self.generate_rollouts(inputs)
        part = args.policy_micro_batch(step, self.micro_batch) % args.steps_per_generation
        start = part * args.per_device_train_batch_size
        rollout = {
            name: self.buffer[name][start : start + args.per_device_train_batch_size]
            for name in ("class_labels", "order", "noise", "tokens", "log_prob", "advantages", "weights")
        }
        return model(self._losses, rollout)

    def _rollout_index(self) -> int:
        return self.args.policy_micro_batch(self.state.global_step, self.micro_batch) // self.args.rollout_period

    def generate_rollouts(self, rows: list[dict[str, Any]]) -> None:
        """Roll out, score and compare one generation batch; fills the buffer.

        All processes read the same rows and draw the same N images' noise from the same seed; a shuffle deals the
        images out to processes and micro-batches. So groups may span processes, and how many there are changes nothing.
        """
        args, step = self.args, self.state.global_step
        size, world_size = args.per_device_train_batch_size, args.world_size
        generator = derive_generator(args.device, args.seed, "rollout", step)
        shuffled = torch.randperm(args.generation_batch_size, device=args.device, generator=generator)
        dealt = shuffled.view(args.steps_per_generation, world_size, size).transpose(0, 1).reshape(world_size, -1)
        mine = dealt[args.process_index]
        chances = draw_chances(
            len(rows), args.num_generations, self.mar.config, generator, args.share_order, args.share_noise
        )
        labels, columns = self.rollout_labels([rows[image // args.num_generations] for image in mine.tolist()])

        exploring = args.explored(self._rollout_index(), len(self.pairs))
        parts = []
        self.mar.eval()
        with whole_weights(self.mar), self.accelerator.autocast():
            # In the precision and the portions of training, so that the same kernels find the same log-probabilities.
            for part, part_labels in zip(mine.split(size), labels.split(size), strict=True):
                chance = {name: values[part] for name, values in chances.items()}
                steps, sigma, reduction = args.num_unmasking_steps, args.sigma, args.log_prob_reduction
                parts.append(sample_rollout(self.mar, part_labels, chance, steps, sigma, exploring, reduction))
        self.mar.train()
        rollout = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

        scores = gather_rows(self.score(rollout["tokens"], labels, columns).by_reward())
        self.record_scores(scores)
        by_group = torch.empty_like(scores)
        by_group[dealt.flatten()] = scores
        advantages, metrics = aggregate_advantages(
            by_group,
            self.rewards.weights,
            args.num_generations,
            args.scale_rewards,
            args.multi_objective_aggregation,
            args.reward_std_floor,
        )
        if args.advantage_clip is not None:
            advantages = advantages.clamp(-args.advantage_clip, args.advantage_clip)
        self.record(metrics)
        weights = group_weights(advantages, args.num_generations)
        self.buffer |= {**rollout, "advantages": advantages[mine], "weights": weights[mine]}

    def _losses(self, networks: StudentNetworks, rollout: dict[str, Tensor]) -> Tensor:
        loss = torch.zeros((), device=self.args.device)
        if self.updates_student(self.state.global_step):
            loss = self._policy_loss(networks.student, rollout)
        if self.anchor is not None:
            loss = loss + self.anchor_losses(networks, rollout)
        return loss

    def _policy_loss(self, student: MARModel, rollout: dict[str, Tensor]) -> Tensor:
        args, chosen = self.args, self._trained_steps()
        log_probs, divergences = [], []
        for index in chosen:
            masked, kept = self.pairs[index]
            actions, means = step_mean(student, rollout, masked, kept)
            log_probs.append(action_log_prob(actions, means, args.sigma, args.log_prob_reduction))
            self.guard.blame(f"the log-probability of unmasking step {index + 1}", log_probs[-1])
            if args.beta > 0:
                divergences.append(action_kl(means, self.reference_mean(student, rollout, masked, kept), args.sigma))
        log_prob, old_log_prob = torch.stack(log_probs, dim=1), rollout["log_prob"][:, list(chosen)]
        self._check_ratio(log_prob, old_log_prob)
        loss, metrics = policy_loss(
            log_prob,
            old_log_prob,
            rollout["advantages"],
            self.epsilon_low,
            self.epsilon_high,
            args.loss_type,
            args.importance_sampling_level,
            rollout["weights"],
        )
        if divergences:
            kl = torch.stack(divergences, dim=1)
            metrics["kl"] = kl.mean()
            loss = loss + args.beta * (kl * rollout["weights"].unsqueeze(1)).mean()
        self.record(metrics)
        return loss

    def _trained_steps(self) -> list[int]:
        """Indices of the unmasking steps that this update trains: a function of the step, so alike in all processes."""
        args, step = self.args, self.state.global_step
        exploring = list(args.explored(self._rollout_index(), len(self.pairs)))
        count = args.num_trained_steps or len(exploring)
        if args.trained_steps == "first" or count == len(exploring):
            return exploring[:count]
        generator = derive_generator("cpu", args.seed, "trained steps", step)
        return [exploring[index] for index in torch.randperm(len(exploring), generator=generator)[:count].tolist()]

    def _check_ratio(self, log_prob: Tensor, old_log_prob: Tensor) -> None:
        """Before the first update on a rollout each ratio must be 1, or the gradient is not that of the policy."""
        args = self.args
        if not args.starts_rollout(self.state.global_step, self.micro_batch):
            return
        with failing_together(args.device, PolicyMismatchError):
            worst = (log_prob - old_log_prob).detach().abs().max().item()
            if worst > RATIO_TOLERANCE:
                raise PolicyMismatchError(
                    f"before the first update on a rollout a log-probability differs by {worst:.3g} from the rollout's "
                    f"(at most {RATIO_TOLERANCE:g} is allowed), so ratios would not be 1: the student must paint alike "
                    "in evaluation and training mode. Set its dropout, and LoRA's, to 0; in reduced precision raise "
                    "sigma or train in float32"
                )
