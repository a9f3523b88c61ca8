"""Anchors: what holds a student near the distribution it began with while a reward pulls. The same for both gradients.

    kl            beta x KL(student || reference) of the unmasking steps; the reference is the student as it was
    gsim          gsim_weight x distillation's loss (score_matching.py): the teacher's distribution
    distribution  distribution_weight x MMD^2 between generated and real images (distribution_matching.py): the data's

A further anchor declares its settings in `AnchorArguments` and adds its loss in `Anchors.add`, where both reward
trainers hand over what they have: the networks, the finished rollout and the divergences.
"""

# No `from __future__ import annotations`: the command-line parser reads the field types.

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils.data import default_collate

from marval_rl.losses.distribution import KERNELS
from marval_rl.losses.policy import action_kl
from marval_rl.models import MaskedModel
from marval_rl.models.sampling import student_mean
from marval_rl.runtime.settings import Conditions, Needs, setting
from marval_rl.trainers.batches import EpochAware
from marval_rl.trainers.distribution_matching import DistributionMatching, generate_differentiably, sets_of
from marval_rl.trainers.lora import adapters_off
from marval_rl.trainers.score_matching import AuxiliaryArguments, Contexts, GSIMArguments, ScoreMatching
from marval_rl.trainers.student_networks import StudentNetworks

ANCHORED = Needs("the GSIM anchor (gsim_weight > 0)", ("gsim_weight",), lambda weight: weight != 0)
MATCHED = Needs("the distribution anchor (distribution_weight > 0)", ("distribution_weight",), lambda w: w != 0)
READS_IMAGES = Needs(
    "an anchor that needs images (gsim_weight or distribution_weight > 0)",
    ("gsim_weight", "distribution_weight"),
    lambda *weights: any(weights),
)


def gsim_field(name: str) -> Any:
    """A field with the default and the help of distillation's setting of that name."""
    original = GSIMArguments.__dataclass_fields__[name]
    metadata = original.metadata
    return setting(original.default, f"GSIM anchor: {metadata['help']}", metadata.get("choices"))


@dataclass
class AnchorArguments(AuxiliaryArguments):
    """Arguments of the anchors."""

    beta: float = setting(0.0, "Weight of the KL divergence from the reference model.")
    gsim_weight: float = setting(0.0, "Weight of the GSIM anchor, which needs the teacher; 0 is none.")
    gsim_batch_size: int = setting(
        128, "Contexts of the GSIM anchor: half from data, half from the student's rollouts."
    )
    gsim_guidance_scale: float = gsim_field("guidance_scale")
    gsim_min_timestep: int = gsim_field("min_timestep")
    gsim_max_timestep: int = gsim_field("max_timestep")
    auxiliary_warmup_steps: int = setting(
        40, "First steps that train the auxiliary network only (with the GSIM anchor)."
    )
    distribution_weight: float = setting(
        0.0, "Weight of MMD^2 (0 to about 1) between generated and real images of a class; 0 is none."
    )
    distribution_column: str | None = setting(
        None,
        "Distribution anchor: compare the images of all prompts that share a value of this column of `prompts` "
        "(default: those of each class or prompt).",
    )
    distribution_features: str = setting(
        "pixels", "Distribution anchor: in whose features, as in eval_features; they must have a gradient."
    )
    distribution_kernel: str = setting("rbf", "Distribution anchor: kernel of MMD.", KERNELS)
    distribution_real_images: int = setting(20_000, "Distribution anchor: real images that are compared with, at most.")
    distribution_queue: int = setting(
        0, "Distribution anchor: recent generated images that stand beside a batch, where it holds few of a class."
    )

    counts_if: ClassVar[Conditions] = {
        ANCHORED: (
            *("gsim_batch_size", "auxiliary_learning_rate", "auxiliary_updates", "auxiliary_warmup_steps"),
            *("gsim_guidance_scale", "gsim_min_timestep", "gsim_max_timestep"),
        ),
        MATCHED: (
            *("distribution_features", "distribution_kernel", "distribution_real_images", "distribution_queue"),
            "distribution_column",
        ),
    }

    @property
    def has_auxiliary(self) -> bool:
        """Whether there is an auxiliary network: with the GSIM anchor."""
        return self.gsim_weight > 0

    @property
    def reads_images(self) -> bool:
        """Whether an anchor needs the data set of images."""
        return self.gsim_weight > 0 or self.distribution_weight > 0

    def gsim_arguments(self) -> GSIMArguments:
        """The GSIM anchor's settings, by the names of distillation."""
        own = {name.removeprefix("gsim_"): value for name, value in vars(self).items() if name.startswith("gsim_")}
        return GSIMArguments(**{name: own[name] for name in own.keys() & GSIMArguments.__dataclass_fields__.keys()})

    def check_anchors(self) -> None:
        """Raises ValueError for a negative weight, and settings out of range."""
        for name in ("beta", "gsim_weight", "distribution_weight", "distribution_queue"):
            if vars(self)[name] < 0:
                raise ValueError(f"{name} must not be negative, but is {vars(self)[name]}")
        if self.distribution_real_images < 2:
            raise ValueError(f"distribution_real_images must be at least 2, not {self.distribution_real_images}")
        if self.distribution_kernel not in KERNELS:
            raise ValueError(
                f'distribution_kernel must be one of {", ".join(KERNELS)}, not "{self.distribution_kernel}"'
            )


class Anchors:
    """The anchors of a run.

    Args:
        args: The trainer's arguments.
        student: As the run begins; with `has_adapters` the reference model is this one with its adapters off.
        has_adapters: Whether LoRA adapters are trained.
        teacher: The MAR teacher; needed by GSIM.
        rows: What is rolled out, {"class_labels": int, ...}.
        dataset: Rows {"images" or "moments", "class_labels"}; needed by GSIM and by the distribution anchor.
        tokens_of: Rows of the data set -> tokens [B, L, C].
        images_of: Rows of the data set -> images [B, C, H, W] in 0..1.
        decode: Tokens and class labels -> images, with their gradient.

    Raises:
        ValueError: If the data set has fewer rows than a batch of contexts takes, and what `DistributionMatching`
            raises.
    """

    def __init__(
        self,
        args: Any,
        student: MaskedModel,
        has_adapters: bool,
        teacher: MaskedModel | None,
        rows: Any,
        dataset: Any,
        tokens_of: Callable[[dict[str, Tensor]], Tensor],
        images_of: Callable[[dict[str, Tensor]], Tensor],
        decode: Callable[[Tensor, Tensor], Tensor],
    ):
        self.args = args
        self.reference: MaskedModel | None = None
        if args.beta > 0 and not has_adapters:
            self.reference = copy.deepcopy(student).eval().requires_grad_(False).to(args.device)
        self.gsim: ScoreMatching | None = None
        if args.gsim_weight > 0:
            assert teacher is not None  # the trainer refuses it
            settings = args.gsim_arguments()
            self.gsim = ScoreMatching(teacher.to(args.device), settings, args.gsim_weight, loss_name="gsim_loss")
            from_data = args.gsim_batch_size - args.gsim_batch_size // 2
            if not 1 <= from_data <= len(dataset):
                raise ValueError(
                    f"gsim_batch_size {args.gsim_batch_size} takes {from_data} rows of data at once, but "
                    f"anchor_dataset has {len(dataset)}: set it to 1 to {2 * len(dataset)}, or give more data"
                )
        self.distribution: DistributionMatching | None = None
        if args.distribution_weight > 0:
            set_of = sets_of(rows, student.config.num_classes, args.distribution_column)
            self.distribution = DistributionMatching(args, dataset, images_of, set_of)
        self.dataset = dataset
        self.tokens_of = tokens_of
        self.decode = decode

    def models(self) -> list[MaskedModel]:
        """The models that the anchors run beside the student."""
        found = [self.reference, None if self.gsim is None else self.gsim.teacher]
        return [model for model in found if model is not None]

    def kl(
        self,
        mean: Tensor,
        student: MaskedModel,
        rollout: dict[str, Tensor],
        tokens: Tensor,
        num_masked: int,
        num_kept: int,
        reduction: str = "sum",
    ) -> Tensor:
        """KL divergence [B] of an unmasking step from the reference model.

        Args:
            mean: [B, M, C], the student's, with gradient.
            student: The student.
            rollout: class_labels, order and noise, as `student_mean` takes them.
            tokens: [B, L, C].
            num_masked: Tokens masked before the step.
            num_kept: Tokens still masked after it.
            reduction: As in `action_kl`.
        """
        with torch.no_grad():
            if self.reference is not None:
                reference_mean = student_mean(self.reference, rollout, tokens, num_masked, num_kept)
            else:
                with adapters_off(student):
                    reference_mean = student_mean(student, rollout, tokens, num_masked, num_kept)
        return action_kl(mean, reference_mean, self.args.policy_std, reduction)

    def add(
        self,
        loss: Tensor,
        networks: StudentNetworks,
        rollout: dict[str, Tensor],
        kl: Tensor | None,
        step: int,
        micro_batch: int,
        buffer: dict[str, Tensor],
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The reward's loss + all anchors' losses, and metrics; called in steps that have a rollout.

        Args:
            loss: Of the reward; 0 in a step that does not move the student.
            networks: The student and the auxiliary network.
            rollout: tokens [B, L, C] and class_labels [B]; in back-propagation also images, with gradient.
            kl: Divergences of the images and unmasking steps, any shape; None without `beta`.
            step: Index of the optimizer step.
            micro_batch: Index within it.
            buffer: Keeps what the next steps of the cycle need.
        """
        metrics = {}
        if kl is not None:
            metrics["kl"] = kl.mean()
            loss = loss + self.args.beta * metrics["kl"]
        if self.gsim is not None:
            contexts = self._gsim_contexts(rollout, step)
            gsim_loss, gsim_metrics = self.gsim.losses(
                networks, contexts, self.args.moves_model(step), buffer, micro_batch
            )
            loss, metrics = loss + gsim_loss, metrics | gsim_metrics
        if self.distribution is not None and self.args.moves_model(step):
            metrics["mmd"] = self.distribution.loss(*self._images(networks.student, rollout), buffer)
            loss = loss + self.args.distribution_weight * metrics["mmd"]
        return loss, metrics

    def _images(self, student: MaskedModel, rollout: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Images with a gradient and their class labels: those of the rollout, or for GRPO new ones of its classes."""
        labels = rollout["class_labels"]
        if "images" in rollout:
            return rollout["images"], labels
        labels = labels[torch.arange(self.args.distribution_batch_size, device=labels.device) % len(labels)]
        tokens = generate_differentiably(student, labels, self.args.num_unmasking_steps)
        return self.decode(tokens, labels), labels

    def auxiliary_loss(
        self, networks: StudentNetworks, micro_batch: int, buffer: dict[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of a step without a rollout, which trains the auxiliary network alone; arguments as `add`'s."""
        assert self.gsim is not None  # nothing else has an auxiliary network
        return self.gsim.losses(networks, None, False, buffer, micro_batch)

    def _gsim_contexts(self, rollout: dict[str, Tensor], epoch: int) -> Contexts:
        """gsim_batch_size contexts, half from data and half from the student's own rollouts.

        epoch: chooses the flips of the data.
        """
        assert self.gsim is not None
        device = rollout["tokens"].device
        half = self.args.gsim_batch_size // 2
        if isinstance(self.dataset, EpochAware):
            self.dataset.set_epoch(epoch)
        chosen = torch.randint(len(self.dataset), (self.args.gsim_batch_size - half,)).tolist()
        data = default_collate([self.dataset[index] for index in chosen])
        own = torch.randint(len(rollout["tokens"]), (half,), device=device)
        tokens = torch.cat([self.tokens_of(data), rollout["tokens"][own].detach()])
        return self.gsim.contexts(tokens, torch.cat([data["class_labels"].to(device), rollout["class_labels"][own]]))
