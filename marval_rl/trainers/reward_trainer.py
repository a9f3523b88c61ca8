"""What GRPO and reward back-propagation share: prompts, rewards, anchors, and what a run writes."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import TrainerState

from marval_rl.data.class_rows import check_class_rows, labels_of
from marval_rl.evaluation import ImageEvaluator
from marval_rl.evaluation.features import extractor_name
from marval_rl.losses.advantages import group_std
from marval_rl.models import MaskedModel
from marval_rl.models.checkpoints import load_model
from marval_rl.models.generation import save_image_grid
from marval_rl.models.head import DiffusionHead
from marval_rl.rewarding import Reward, RewardSet
from marval_rl.runtime.limits import LimitArguments, LimitsCallback, broken_limit, limits_of
from marval_rl.runtime.settings import setting
from marval_rl.trainers.anchors import AnchorArguments, Anchors
from marval_rl.trainers.arguments import MARTrainingArguments
from marval_rl.trainers.base import MARTrainer
from marval_rl.trainers.lora import add_lora, save_merged
from marval_rl.trainers.student_networks import StudentNetworks, auxiliary_network


@dataclass
class RewardTrainingArguments(AnchorArguments, LimitArguments, MARTrainingArguments):
    """Arguments that both reward trainers take."""

    learning_rate: float = setting(1e-5, "Learning rate of the student.")
    weight_decay: float = setting(0.0, "Weight decay of the student.")
    ema_decay: float = setting(0.98, "Decay of the weight average that is sampled and saved.")
    reward_weights: list[float] | None = setting(None, "A weight for each reward; default 1.")
    num_unmasking_steps: int = setting(8, "K, unmasking steps of a rollout.")
    eval_unmasking_steps: int | None = setting(  # type: ignore[assignment]  # set in __post_init__
        None, "K in evaluation (default: as in training)."
    )
    prompt_template: str = setting("{name}", "Prompt of a class; {name} is the class's name.")
    policy_std: float = setting(
        0.1, "Standard deviation of the policy, in latent units; it is the unit of the KL, too."
    )

    def __post_init__(self):
        super().__post_init__()
        if self.eval_unmasking_steps is None:
            self.eval_unmasking_steps = self.num_unmasking_steps
        if self.policy_std <= 0:
            raise ValueError(f"policy_std must be positive, not {self.policy_std}: without noise there is no policy")
        self.check_anchors()
        self.check_limits(self.beta, self.eval_strategy)
        if "{name}" not in self.prompt_template:
            raise ValueError(
                f'prompt_template "{self.prompt_template}" does not contain {{name}}, the place of the class\'s name'
            )

    def distribution_at_once(self, num_classes: int) -> tuple[int, int]:
        """Images that the distribution anchor compares at once, over all processes, and the classes that they have."""
        return self.per_device_train_batch_size * self.world_size, num_classes


class RewardTrainer(MARTrainer):
    """Base of the two reward trainers; not used by itself.

    Args:
        model: A one-step student, or the path of one.
        reward_funcs: What is trained on: a RewardSet, or one or a list of names, `file.py:attribute` and callables. An
            empty list trains on the distribution anchor alone (by back-propagation).
        args: The settings.
        train_dataset: Rows {"class_labels": int, ...}; further columns are passed to the rewards, but "images" are not
            looked at. `check_class_rows` says what is refused.
        teacher: The MAR teacher; needed by the GSIM anchor.
        auxiliary: Weights of an auxiliary network that already fits the student (a folder that distillation wrote,
            or the network); None starts from the teacher's head.
        anchor_dataset: Images {"images", "class_labels"}, or cached "moments"; needed by GSIM and distribution anchor.
        peft_config: Trains low-rank adapters of the student instead of its weights; see `lora.py`.
    """

    args: RewardTrainingArguments

    def __init__(
        self,
        model: MaskedModel | str,
        reward_funcs: RewardSet | str | Reward | list[str | Reward],
        args: RewardTrainingArguments,
        train_dataset: Dataset,
        teacher: MaskedModel | None = None,
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
        if args.has_auxiliary and (teacher is None or anchor_dataset is None):
            raise ValueError(f"gsim_weight {args.gsim_weight} needs a teacher and a data set of images")
        if args.distribution_weight > 0 and anchor_dataset is None:
            raise ValueError(f"distribution_weight {args.distribution_weight} needs a data set of images")
        if peft_config is None and not any(parameter.requires_grad for parameter in model.parameters()):
            raise ValueError(
                "the model is frozen, as a trainer's average (trainer.ema.module) is: give the path of its run folder, "
                "or call model.requires_grad_(True)"
            )
        self.has_adapters = peft_config is not None
        if self.has_adapters:
            add_lora(model, peft_config, args.seed)
        head = None
        if args.has_auxiliary and teacher is not None:
            head = auxiliary_network(teacher, auxiliary)
        network = StudentNetworks(model, head)
        super().__init__(network, model, args, train_dataset, data_collator=list, **kwargs)
        self.add_callback(LimitsCallback(args, Path(args.output_dir), self.save_final, self.evaluation_names))
        self.rewards = reward_set(reward_funcs, args)
        if args.distribution_weight > 0 and args.evaluates:
            check_other_features(args.distribution_features, self.evaluator)
        functions = (self.tokens_of, self.images_of, self.decode_tokens)
        self.anchors = Anchors(args, model, self.has_adapters, teacher, train_dataset, anchor_dataset, *functions)

    def prompts_for(self, class_names: list[str]) -> list[str]:
        return [self.args.prompt_template.format(name=name) for name in class_names]

    def frozen_models(self) -> list[MaskedModel]:
        return self.anchors.models()

    def parameter_groups(self) -> list[dict[str, Any]]:
        return self.model.parameter_groups(self.args)

    def has_ended(self, state: TrainerState) -> bool:
        return super().has_ended(state) or broken_limit(limits_of(self.args), state.log_history) is not None

    # ---- A step: the reward's loss, then the anchors' ----

    def training_loss(self, model: nn.Module, inputs: list[dict[str, Any]]) -> Tensor:
        if not self.args.starts_cycle(self.state.global_step):
            return model(self._auxiliary_loss)
        return model(self._losses, self.prepare_inputs(inputs))

    def prepare_inputs(self, rows: list[dict[str, Any]]) -> Any:
        """What `reward_loss` gets of the rows of this micro-batch; made outside of the engine's forward pass."""
        return rows

    def reward_loss(self, student: MaskedModel, inputs: Any) -> tuple[Tensor, dict[str, Tensor], Tensor | None]:
        """The loss of the reward.

        Args:
            student: The student.
            inputs: Of `prepare_inputs`.

        Returns:
            The loss, 0 in a step that does not move the student; the rollout {tokens [B, L, C], class_labels [B], ...};
            and the divergences from the reference model, of any shape, or None without `beta`.
        """
        raise NotImplementedError

    def _losses(self, networks: StudentNetworks, inputs: Any) -> Tensor:
        loss, rollout, kl = self.reward_loss(networks.student, inputs)
        step = self.state.global_step
        loss, metrics = self.anchors.add(loss, networks, rollout, kl, step, self.micro_batch, self.buffer)
        self.record(metrics)
        return loss

    def _auxiliary_loss(self, networks: StudentNetworks) -> Tensor:
        loss, metrics = self.anchors.auxiliary_loss(networks, self.micro_batch, self.buffer)
        self.record(metrics)
        return loss

    # ---- Rewards ----

    def labels_and_columns(self, rows: list[dict[str, Any]]) -> tuple[Tensor, dict[str, list[Any]]]:
        """Class labels [B] of B rows, and their further columns for the rewards."""
        labels = labels_of(rows, self.mar.config.num_classes).to(self.args.device)
        names = [name for name in rows[0] if name not in ("class_labels", "images")]
        return labels, {name: [row[name] for row in rows] for name in names}

    def reward_arguments(
        self, images: Tensor, class_labels: Tensor, columns: dict[str, list[Any]] | None = None
    ) -> tuple[Tensor, list[str], Tensor, list[str], dict[str, list[Any]] | None]:
        """What `RewardSet.score` takes, for images [B, C, H, W]."""
        names = self.names_of(class_labels)
        return images, self.prompts_for(names), class_labels, names, columns

    def record_scores(self, scores: Tensor, num_generations: int) -> None:
        """Record the mean of each reward's scores and their standard deviation within groups.

        scores: [N, R] in the order of the rewards, groups of num_generations in a row.
        """
        assert self.rewards is not None
        for name, values in zip(self.rewards.names, scores.detach().unbind(dim=1), strict=True):
            std = group_std(values, num_generations).nanmean()
            self.record({f"rewards/{name}/mean": values.nanmean(), f"rewards/{name}/std": std})

    def write_samples(self, images: Tensor, class_labels: Tensor) -> None:
        """Also, of the images of the grid, the best and the worst by each reward that is trained on."""
        super().write_samples(images, class_labels)
        if self.rewards is None or set(self.train_dataset[0]) - {"class_labels", "images"}:
            return  # a reward that reads further columns cannot be asked about these images
        device = self.args.device
        scores = self.rewards.score(*self.reward_arguments(images.to(device), class_labels.to(device)))
        for name, values in scores.components.items():
            order = values.cpu().argsort(descending=True, stable=True)
            order = order[values.cpu()[order].isfinite()]  # without those that the reward left out
            if number := min(self.args.sample_grid_columns, len(order) // 2):
                ends, rows = torch.cat([order[:number], order[-number:]]), torch.arange(2).repeat_interleave(number)
                file = self.sample_file(f"by_{re.sub(r'[^A-Za-z0-9.-]', '_', name)}_")
                save_image_grid(images[ends], rows, file, number)

    def save_final(self, folder: Path) -> None:
        if self.has_adapters:
            save_merged(self.ema.module, folder)
        else:
            super().save_final(folder)
        self.model.save_auxiliary(folder, self.args.should_save)


def reward_set(
    reward_funcs: RewardSet | str | Reward | list[str | Reward], args: RewardTrainingArguments
) -> RewardSet | None:
    """The rewards as a RewardSet, whatever way they were given; None for an empty list beside a distribution anchor."""
    if isinstance(reward_funcs, RewardSet):
        return reward_funcs
    if reward_funcs == [] and args.distribution_weight > 0:
        return None
    return RewardSet(reward_funcs if isinstance(reward_funcs, list) else [reward_funcs], args.reward_weights)


def check_other_features(trained: str, evaluator: ImageEvaluator) -> None:
    """Raises ValueError if evaluation looks at images only by the features that are trained on."""
    others = set(evaluator.extractors) - {extractor_name(trained)}
    if evaluator.extractors and not others and not evaluator.judges and evaluator.rewards is None:
        raise ValueError(
            f"the distribution anchor trains on {trained}, and evaluation would look at nothing else: add other "
            f"features to eval_features (such as [{trained}, hf:facebook/dinov2-base]), name judges or "
            "eval_reward_funcs, or set distribution_features to others"
        )
