"""What GRPO and reward back-propagation share: prompts, rewards, and the GSIM loss as an anchor."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import Dataset, default_collate

from marval_rl.errors import CheckpointError, first_line
from marval_rl.models import MARModel
from marval_rl.models.checkpoints import load_model
from marval_rl.models.head import DiffusionHead
from marval_rl.models.unmasking import random_order
from marval_rl.rewarding import Reward, RewardScores, RewardSet
from marval_rl.trainers.distill import AUXILIARY_FILE, save_auxiliary, student_groups
from marval_rl.trainers.gsim import ScoreMatcher, StudentNetworks
from marval_rl.trainers.masking import draw_num_masked
from marval_rl.training.arguments import MARTrainingArguments, cycle_pattern
from marval_rl.training.base import MARTrainer
from marval_rl.training.batches import EpochAware
from marval_rl.training.distributed import failing_together
from marval_rl.training.optimizers import adamw
from marval_rl.training.sampling import SamplingSettings


@dataclass
class RewardTrainingArguments(MARTrainingArguments):
    """Arguments that both reward trainers take."""

    learning_rate: float = field(default=1e-5, metadata={"help": "Learning rate of the student."})
    weight_decay: float = field(default=0.0, metadata={"help": "Weight decay of the student."})
    ema_decay: float = field(default=0.98, metadata={"help": "Decay of the weight average that is sampled and saved."})
    reward_weights: list[float] | None = field(default=None, metadata={"help": "A weight for each reward; default 1."})
    num_unmasking_steps: int = field(default=8, metadata={"help": "K, unmasking steps of a rollout."})
    eval_unmasking_steps: int | None = field(
        default=None, metadata={"help": "K in evaluation (default: as in training)."}
    )
    prompt_template: str = field(default="{name}", metadata={"help": "Prompt of a class; {name} is the class's name."})
    anchor_weight: float = field(
        default=0.0,
        metadata={"help": "Weight of the GSIM loss that holds on to the teacher's distribution; 0 is none."},
    )
    anchor_batch_size: int = field(
        default=128, metadata={"help": "Contexts of the anchor: half from data, half from the student's own rollouts."}
    )
    auxiliary_learning_rate: float = field(default=3e-4, metadata={"help": "Learning rate of the auxiliary network."})
    auxiliary_updates: int = field(
        default=4,
        metadata={"help": "Steps per student update when there is an anchor: the others train the auxiliary."},
    )
    auxiliary_warmup_steps: int = field(
        default=40, metadata={"help": "First steps that train the auxiliary network only (with an anchor)."}
    )
    guidance_scale: float = field(default=1.2, metadata={"help": "Guidance of the teacher's score in the anchor."})
    min_timestep: int = field(default=20, metadata={"help": "Lowest timestep of the anchor."})
    max_timestep: int = field(default=950, metadata={"help": "Highest timestep of the anchor."})
    timestep_draws: int = field(default=1, metadata={"help": "(t, noise) draws a token in the anchor."})
    mask_ratio_min: float = field(default=0.7, metadata={"help": "Smallest share of tokens masked in the anchor."})
    mask_ratio_std: float = field(default=0.25, metadata={"help": "Deviation of the anchor's mask ratios."})

    @property
    def cycle(self) -> int:
        """Steps of which one updates the student; with an anchor the others train the auxiliary network."""
        return self.auxiliary_updates if self.anchor_weight > 0 else 1

    def batch_pattern(self) -> list[bool]:
        return cycle_pattern(self.gradient_accumulation_steps, self.cycle)

    def __post_init__(self):
        super().__post_init__()
        if self.eval_unmasking_steps is None:
            self.eval_unmasking_steps = self.num_unmasking_steps
        if self.anchor_weight < 0:
            raise ValueError(f"anchor_weight must not be negative, but is {self.anchor_weight}")
        if "{name}" not in self.prompt_template:
            raise ValueError(f'prompt_template "{self.prompt_template}" lacks {{name}}, the place of the class\'s name')


class RewardTrainer(MARTrainer):
    """Base of the two reward trainers; not used by itself.

    Args:
        model: A one-step student, or the path of one.
        reward_funcs: What is trained on: a RewardSet, or one or a list of names, `file.py:attribute` and callables.
        args: The settings.
        train_dataset: Rows {"class_labels": int, ...}; further columns are handed to the rewards.
        teacher: The MAR teacher; needed with an anchor.
        auxiliary: Weights of an auxiliary network that already fits the student (a folder that distillation wrote,
            or the network); None starts from the teacher's head.
        anchor_dataset: Images {"images", "class_labels"} for the anchor's contexts; needed with an anchor.
    """

    args: RewardTrainingArguments

    def __init__(
        self,
        model: MARModel | str,
        reward_funcs: RewardSet | str | Reward | list[str | Reward],
        args: RewardTrainingArguments,
        train_dataset: Dataset,
        teacher: MARModel | None = None,
        auxiliary: DiffusionHead | Path | None = None,
        anchor_dataset: Dataset | None = None,
        **kwargs: Any,
    ):
        if isinstance(model, str):
            model = load_model(model)
        if not model.config.is_one_step:
            raise ValueError("the model is a many-step teacher: distil it first, RL needs a one-step student")
        anchored = args.anchor_weight > 0
        if anchored and (teacher is None or anchor_dataset is None):
            raise ValueError(f"anchor_weight {args.anchor_weight} needs a teacher and a data set of images")
        network = StudentNetworks(model, _auxiliary_network(teacher, auxiliary) if anchored else None)
        super().__init__(network, model, args, train_dataset, data_collator=list, **kwargs)
        self.rewards = reward_set(reward_funcs, args.reward_weights)
        self.anchor_dataset = anchor_dataset
        self.warmup_steps = args.auxiliary_warmup_steps if anchored else 0
        self.matcher = None
        if anchored:
            self.matcher = ScoreMatcher(
                teacher.to(args.device),
                args.guidance_scale,
                (args.min_timestep, args.max_timestep),
                args.timestep_draws,
            )

    def sampling_settings(self) -> SamplingSettings:
        return SamplingSettings(num_unmasking_steps=self.args.eval_unmasking_steps)

    def prompts_for(self, class_names: list[str]) -> list[str]:
        return [self.args.prompt_template.format(name=name) for name in class_names]

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            self.optimizer = adamw(student_groups(self.model, self.args), self.args)
        return self.optimizer

    def updates_student(self, step: int) -> bool:
        return step >= self.warmup_steps and step % self.args.cycle == 0

    def rollout_labels(self, rows: list[dict[str, Any]], repeats: int = 1) -> tuple[Tensor, dict[str, list[Any]]]:
        """Class labels [B * repeats] and the other columns of the rows, each row repeated in place."""
        rows = [row for row in rows for _ in range(repeats)]
        labels = torch.tensor([int(row["class_labels"]) for row in rows], device=self.args.device)
        names = [name for name in rows[0] if name not in ("class_labels", "images")]
        return labels, {name: [row[name] for row in rows] for name in names}

    def score(
        self, tokens: Tensor, class_labels: Tensor, columns: dict[str, list[Any]], with_grad: bool = False
    ) -> RewardScores:
        """Rewards of finished tokens [B, L, C]; their means are recorded as `rewards/<name>/mean`."""
        names = self.names_of(class_labels)
        images = self.decode_tokens(tokens)
        with failing_together(self.args.device):
            scores = self.rewards.score(images, self.prompts_for(names), class_labels, names, columns, with_grad)
        for name, values in scores.components.items():
            values = values.detach()
            self.record({f"rewards/{name}/mean": values.nanmean(), f"rewards/{name}/std": _nanstd(values)})
        return scores

    def anchor_losses(self, networks: StudentNetworks, own_tokens: dict[str, Tensor]) -> Tensor:
        """anchor_weight x GSIM + the auxiliary network's loss on fresh contexts; keeps the sample in the buffer.

        own_tokens: {tokens [B, L, C], class_labels [B]} of rollouts; half of the contexts come from them.
        """
        args, config = self.args, self.mar.config
        half = args.anchor_batch_size // 2
        if isinstance(self.anchor_dataset, EpochAware):
            self.anchor_dataset.set_epoch(self.state.global_step)  # fresh flips
        chosen = torch.randint(len(self.anchor_dataset), (args.anchor_batch_size - half,)).tolist()
        data = default_collate([self.anchor_dataset[index] for index in chosen])
        data_tokens = self.tokens_of(data)
        own = torch.randint(len(own_tokens["tokens"]), (half,), device=args.device)
        tokens = torch.cat([data_tokens, own_tokens["tokens"][own].detach()])
        labels = torch.cat([data["class_labels"].to(args.device), own_tokens["class_labels"][own]])
        order = random_order(len(tokens), config.num_tokens, args.device)
        num_masked = draw_num_masked(config.num_tokens, args.mask_ratio_min, args.mask_ratio_std)
        context = (tokens, labels, order, num_masked)
        if self.updates_student(self.state.global_step):
            loss, metrics, sample = self.matcher.student_loss(networks, *context)
            self.record({"anchor_loss": loss, **metrics})
            loss = args.anchor_weight * loss
        else:
            loss, sample = torch.zeros((), device=args.device), self.matcher.sample(networks, *context)
        self.buffer |= {f"anchor.{name}": value for name, value in sample.items()}
        return loss + self.auxiliary_loss(networks)

    def auxiliary_loss(self, networks: StudentNetworks) -> Tensor:
        """The auxiliary network's loss on the sample in the buffer."""
        sample = {name: self.buffer[f"anchor.{name}"] for name in ("x_start", "condition")}
        loss = self.matcher.auxiliary_loss(networks, sample)
        self.record({"auxiliary_loss": loss})
        return loss

    def save_final(self, folder: Path) -> None:
        super().save_final(folder)
        if self.model.auxiliary is not None:
            save_auxiliary(self.model.auxiliary, folder)


def reward_set(
    reward_funcs: RewardSet | str | Reward | list[str | Reward], reward_weights: list[float] | None
) -> RewardSet:
    """The rewards as a RewardSet, whatever way they were given."""
    if isinstance(reward_funcs, RewardSet):
        return reward_funcs
    return RewardSet(reward_funcs if isinstance(reward_funcs, list) else [reward_funcs], reward_weights)


def _auxiliary_network(teacher: MARModel, auxiliary: DiffusionHead | Path | None) -> DiffusionHead:
    if isinstance(auxiliary, DiffusionHead):
        return auxiliary
    network = copy.deepcopy(teacher.diffloss).requires_grad_(True)
    if auxiliary is not None and (auxiliary / AUXILIARY_FILE).exists():
        try:
            network.load_state_dict(load_file(auxiliary / AUXILIARY_FILE))
        except (SafetensorError, RuntimeError) as error:
            raise CheckpointError(
                f"{auxiliary / AUXILIARY_FILE} is damaged or does not fit the teacher's head: {first_line(error)}; "
                "delete it to start the auxiliary network from the teacher's head"
            ) from error
    return network


def _nanstd(values: Tensor) -> Tensor:
    kept = values[~values.isnan()]
    return kept.std(correction=0) if len(kept) else values.new_tensor(float("nan"))
