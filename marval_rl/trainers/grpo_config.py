"""The arguments of GRPO, and the arithmetic of its batches."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar

from marval_rl.losses.advantages import MULTI_OBJECTIVE_AGGREGATIONS, REWARD_SCALES
from marval_rl.losses.policy import LOG_PROB_REDUCTIONS, LOSS_TYPES
from marval_rl.runtime.settings import Conditions, Needs
from marval_rl.trainers.anchors import MATCHED
from marval_rl.trainers.reward_trainer import RewardTrainingArguments


@dataclass
class MARGRPOConfig(RewardTrainingArguments):
    """Arguments of `MARGRPOTrainer`; names as in TRL's `GRPOConfig` where it has them."""

    num_generations: int = field(default=8, metadata={"help": "G, images per group (of one class)."})
    num_iterations: int = field(default=1, metadata={"help": "Passes over each generation batch."})
    steps_per_generation: int | None = field(
        default=None, metadata={"help": "Micro-batches a generation batch (default: gradient_accumulation_steps)."}
    )
    loss_type: str = field(
        default="grpo",
        metadata={"help": "PPO's clipped loss, or CISPO's clipped weights.", "choices": list(LOSS_TYPES)},
    )
    log_prob_reduction: str = field(
        default="sum",
        metadata={
            "help": "Over the numbers of an action, also for its KL divergence.",
            "choices": list(LOG_PROB_REDUCTIONS),
        },
    )
    epsilon: float | None = field(
        default=None,
        metadata={"help": "Clip range of the ratio (default: 0.2 for a sum, as much of an average action for a mean)."},
    )
    epsilon_high: float | None = field(default=None, metadata={"help": "Upper clip range (default: epsilon)."})
    scale_rewards: str = field(
        default="group", metadata={"help": "What advantages are divided by.", "choices": list(REWARD_SCALES)}
    )
    multi_objective_aggregation: str = field(
        default=MULTI_OBJECTIVE_AGGREGATIONS[0],
        metadata={
            "help": "Several rewards: compare their weighted sum, or normalise each by itself first (GDPO).",
            "choices": list(MULTI_OBJECTIVE_AGGREGATIONS),
        },
    )
    share_order: bool = field(default=False, metadata={"help": "One unmasking order for all images of a group."})
    share_noise: bool = field(default=False, metadata={"help": "One noise z for all images of a group."})
    distribution_batch_size: int = field(
        default=64,
        metadata={"help": "Distribution anchor: images of its own, with gradient, in each process and micro-batch."},
    )

    counts_if: ClassVar[Conditions] = {
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
        MATCHED: ("distribution_batch_size",),
    }

    def __post_init__(self):
        super().__post_init__()
        if self.steps_per_generation is None:
            self.steps_per_generation = self.gradient_accumulation_steps
        if self.num_generations < 2:
            raise ValueError(
                f"num_generations must be at least 2, not {self.num_generations}: an advantage compares images"
            )
        if self.distribution_batch_size < 1:
            raise ValueError(f"distribution_batch_size must be at least 1, not {self.distribution_batch_size}")
        if self.loss_type == "dr_grpo":
            raise ValueError(
                'loss_type "dr_grpo" would be "grpo": it differs where completions differ in length, and all images '
                'have equally many unmasking steps. For Dr. GRPO\'s other half set scale_rewards to "none"'
            )
        for name in ("loss_type", "log_prob_reduction", "scale_rewards", "multi_objective_aggregation"):
            known = self.__dataclass_fields__[name].metadata["choices"]
            if vars(self)[name] not in known:
                raise ValueError(f'{name} must be one of {", ".join(known)}, not "{vars(self)[name]}"')
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
        return self.per_device_train_batch_size * self.micro_batches * self.world_size

    @property
    def micro_batches(self) -> int:
        """steps_per_generation, with its default."""
        steps = self.steps_per_generation
        return self.gradient_accumulation_steps if steps is None else steps

    @property
    def rows_per_batch(self) -> int:
        """The rows of one generation batch."""
        return self.generation_batch_size // self.num_generations

    def distribution_at_once(self, num_classes: int) -> tuple[int, int]:
        return self.distribution_batch_size * self.world_size, min(num_classes, self.rows_per_batch)

    @property
    def num_readers(self) -> int:
        """All processes read the same rows."""
        return 1

    def batch_pattern(self) -> list[bool]:
        """Rows are read where a rollout begins."""
        accumulation = self.gradient_accumulation_steps
        rollout_steps = math.lcm(self.rollout_period, accumulation) // accumulation * self.cycle
        return [
            self.starts_cycle(step) and self.starts_rollout(step, micro_batch)
            for step in range(rollout_steps)
            for micro_batch in range(accumulation)
        ]

    @property
    def rollout_period(self) -> int:
        """Micro-batches of policy updates that one generation batch serves."""
        return self.micro_batches * self.num_iterations

    def policy_micro_batch(self, step: int, micro_batch: int) -> int:
        """Counts micro-batches of policy updates since the start; a function of the step, so it survives resumption."""
        return step // self.cycle * self.gradient_accumulation_steps + micro_batch

    def starts_rollout(self, step: int, micro_batch: int) -> bool:
        """Whether a policy update begins a new generation batch in this micro-batch."""
        return self.policy_micro_batch(step, micro_batch) % self.rollout_period == 0
