"""What GRPO and reward back-propagation share: prompts, rewards, and the GSIM loss as an anchor."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from peft import LoraConfig
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import TrainerState

from marval_rl.data.class_rows import check_class_rows, labels_of
from marval_rl.errors import CheckpointError, first_line
from marval_rl.models import MARModel
from marval_rl.models.checkpoints import load_model
from marval_rl.models.head import DiffusionHead
from marval_rl.rewarding import Reward, RewardScores, RewardSet
from marval_rl.runtime.distributed import failing_together
from marval_rl.runtime.limits import LimitArguments, LimitsCallback, broken_limit, limits_of
from marval_rl.runtime.randomness import kept_random_state
from marval_rl.runtime.settings import Conditions, Needs
from marval_rl.trainers.anchor import Anchor, AnchorArguments
from marval_rl.trainers.arguments import MARTrainingArguments, cycle_pattern
from marval_rl.trainers.base import MARTrainer
from marval_rl.trainers.distill import AUXILIARY_FILE, save_auxiliary, student_groups
from marval_rl.trainers.gsim import StudentNetworks
from marval_rl.trainers.lora import adapters_off, add_lora, save_merged
from marval_rl.trainers.optimizers import adamw
from marval_rl.trainers.rollout import step_mean
from marval_rl.trainers.sampling import SamplingSettings


@dataclass
class RewardTrainingArguments(AnchorArguments, LimitArguments, MARTrainingArguments):
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
    beta: float = field(default=0.0, metadata={"help": "Weight of the KL divergence from the reference model."})
    sigma: float = field(
        default=0.1,
        metadata={"help": "Standard deviation of the policy, in latent units; it is the unit of the KL, too."},
    )
    sync_ref_model: bool = field(
        default=False, metadata={"help": "Move the reference model after the averaged student (TRL's name)."}
    )
    ref_model_mixup_alpha: float = field(
        default=0.6, metadata={"help": "Share of the averaged student in the reference at each synchronisation."}
    )
    ref_model_sync_steps: int = field(default=64, metadata={"help": "Steps between synchronisations."})

    counts_if: ClassVar[Conditions] = {
        Needs("a reference model (beta > 0)", ("beta",), lambda beta: beta != 0): ("sync_ref_model",),
        Needs("sync_ref_model", ("sync_ref_model",), bool): ("ref_model_mixup_alpha", "ref_model_sync_steps"),
    }

    def batch_pattern(self) -> list[bool]:
        return cycle_pattern(self.gradient_accumulation_steps, self.cycle)

    def __post_init__(self):
        super().__post_init__()
        if self.eval_unmasking_steps is None:
            self.eval_unmasking_steps = self.num_unmasking_steps
        for name, weight in (("anchor_weight", self.anchor_weight), ("beta", self.beta)):
            if weight < 0:
                raise ValueError(f"{name} must not be negative, but is {weight}")
        if self.sigma <= 0:
            raise ValueError(f"sigma must be positive, not {self.sigma}: without noise there is no policy")
        self.check_limits()
        if "{name}" not in self.prompt_template:
            raise ValueError(f'prompt_template "{self.prompt_template}" lacks {{name}}, the place of the class\'s name')


class RewardTrainer(MARTrainer):
    """Base of the two reward trainers; not used by itself.

    Args:
        model: A one-step student, or the path of one.
        reward_funcs: What is trained on: a RewardSet, or one or a list of names, `file.py:attribute` and callables.
        args: The settings.
        train_dataset: Rows {"class_labels": int, ...}; further columns are handed to the rewards, but "images" are not
            looked at. `check_class_rows` says what is refused.
        teacher: The MAR teacher; needed with an anchor.
        auxiliary: Weights of an auxiliary network that already fits the student (a folder that distillation wrote,
            or the network); None starts from the teacher's head.
        anchor_dataset: Images {"images", "class_labels"} for the anchor's contexts; needed with an anchor.
        peft_config: Trains low-rank adapters of the student instead of its weights; see `trainers/lora.py`.
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
        peft_config: LoraConfig | None = None,
        **kwargs: Any,
    ):
        if isinstance(model, str):
            model = load_model(model)
        if not model.config.is_one_step:
            raise ValueError("the model is a many-step teacher: distil it first, RL needs a one-step student")
        check_class_rows(train_dataset, model.config.num_classes)
        anchored = args.anchor_weight > 0
        if anchored and (teacher is None or anchor_dataset is None):
            raise ValueError(f"anchor_weight {args.anchor_weight} needs a teacher and a data set of images")
        if peft_config is not None:
            if args.sync_ref_model:
                raise ValueError(
                    "sync_ref_model does not go with LoRA, whose reference is the student without adapters"
                )
            add_lora(model, peft_config, args.seed)
        network = StudentNetworks(model, _auxiliary_network(teacher, auxiliary) if anchored else None)
        super().__init__(network, model, args, train_dataset, data_collator=list, **kwargs)
        self.add_callback(LimitsCallback(args, Path(args.output_dir), self.save_final, self.evaluation_names))
        self.rewards = reward_set(reward_funcs, args.reward_weights)
        self.anchor = Anchor(teacher, anchor_dataset, self.tokens_of, args) if anchored else None
        self.warmup_steps = args.auxiliary_warmup_steps if anchored else 0
        self.has_adapters = peft_config is not None
        self.reference = None
        if args.beta > 0 and not self.has_adapters:
            self.reference = copy.deepcopy(model).eval().requires_grad_(False).to(args.device)

    def sampling_settings(self) -> SamplingSettings:
        return SamplingSettings(num_unmasking_steps=self.args.eval_unmasking_steps)

    def prompts_for(self, class_names: list[str]) -> list[str]:
        return [self.args.prompt_template.format(name=name) for name in class_names]

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            self.optimizer = adamw(student_groups(self.model, self.args), self.args)
        return self.optimizer

    def has_ended(self, state: TrainerState) -> bool:
        return super().has_ended(state) or broken_limit(limits_of(self.args), state.log_history) is not None

    def updates_student(self, step: int) -> bool:
        return step >= self.warmup_steps and step % self.args.cycle == 0

    def goes_on_with_buffer(self, step: int) -> bool:
        return step % self.args.cycle != 0  # with the anchor's sample

    def rollout_labels(self, rows: list[dict[str, Any]], repeats: int = 1) -> tuple[Tensor, dict[str, list[Any]]]:
        """Class labels [B * repeats] and the other columns of the rows, each row repeated in place."""
        rows = [row for row in rows for _ in range(repeats)]
        labels = labels_of(rows, self.mar.config.num_classes).to(self.args.device)
        names = [name for name in rows[0] if name not in ("class_labels", "images")]
        return labels, {name: [row[name] for row in rows] for name in names}

    def score(
        self, tokens: Tensor, class_labels: Tensor, columns: dict[str, list[Any]], with_grad: bool = False
    ) -> RewardScores:
        """Rewards of finished tokens [B, L, C]."""
        names = self.names_of(class_labels)
        images = self.decode_tokens(tokens)
        with failing_together(self.args.device), kept_random_state(self.args.device):
            return self.rewards.score(images, self.prompts_for(names), class_labels, names, columns, with_grad)

    def record_scores(self, scores: Tensor) -> None:
        """Record the mean and deviation of each reward's scores, [B, R] in the order of the rewards."""
        for name, values in zip(self.rewards.names, scores.detach().unbind(dim=1), strict=True):
            self.record({f"rewards/{name}/mean": values.nanmean(), f"rewards/{name}/std": _nanstd(values)})

    @torch.no_grad()
    def reference_mean(self, student: MARModel, state: dict[str, Tensor], masked: int, kept: int) -> Tensor:
        """The reference model's mean [B, M, C] of an unmasking step, in a state as `step_mean` takes it.

        The reference is a copy of the student as it was, or, with LoRA, the student without its adapters.
        """
        if self.reference is not None:
            return step_mean(self.reference, state, masked, kept)[1]
        with adapters_off(student):
            return step_mean(student, state, masked, kept)[1]

    def anchor_losses(self, networks: StudentNetworks, own: dict[str, Tensor]) -> Tensor:
        """anchor_weight x GSIM + the auxiliary network's loss on fresh contexts; keeps the sample in the buffer.

        own: {tokens [B, L, C], class_labels [B]} of rollouts; half of the contexts come from them.
        """
        step = self.state.global_step
        context = self.anchor.contexts(own, epoch=step)
        loss = torch.zeros((), device=self.args.device)
        if self.updates_student(step):
            loss, metrics, sample = self.anchor.student_loss(networks, context)
            self.record(metrics)
        else:
            sample = self.anchor.sample(networks, context)
        self.buffer |= {f"{self.micro_batch}.anchor.{name}": value for name, value in sample.items()}
        return loss + self.auxiliary_losses(networks)

    def auxiliary_losses(self, networks: StudentNetworks) -> Tensor:
        """The auxiliary network's loss on this micro-batch's sample in the buffer."""
        sample = {name: self.buffer[f"{self.micro_batch}.anchor.{name}"] for name in ("x_start", "condition")}
        loss = self.anchor.auxiliary_loss(networks, sample)
        self.record({"auxiliary_loss": loss})
        return loss

    def update_average(self) -> None:
        super().update_average()
        args = self.args
        due = args.sync_ref_model and self.state.global_step % args.ref_model_sync_steps == 0
        if due and self.reference is not None:
            averages = [average.detach() for average in self.ema.module.parameters()]
            torch._foreach_lerp_(list(self.reference.parameters()), averages, args.ref_model_mixup_alpha)

    def whole_states(self) -> dict[str, dict[str, Tensor]]:
        states = super().whole_states()
        if self.args.sync_ref_model and self.reference is not None:
            states["reference"] = self.reference.state_dict()
        return states

    def load_whole_states(self, states: dict[str, dict[str, Tensor]]) -> None:
        super().load_whole_states(states)
        if "reference" in states:
            self.reference.load_state_dict(states["reference"])

    def save_final(self, folder: Path) -> None:
        if self.has_adapters:
            save_merged(self.ema.module, folder)
        else:
            super().save_final(folder)
        if self.model.auxiliary is not None:
            save_auxiliary(self.model.auxiliary, folder, self.args.should_save)


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
