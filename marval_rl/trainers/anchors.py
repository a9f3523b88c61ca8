"""Anchors: what holds a student near the distribution it began with while a reward pulls. The same for both gradients.

    kl      beta x KL(student || reference) of the unmasking steps; the reference is the student as it was
    gsim    gsim_weight x distillation's loss (score_matching.py): the teacher's distribution

A further anchor declares its settings in `AnchorArguments` and adds its loss in `Anchors.add`, where both reward
trainers hand over what they have: the networks, the finished rollout and the divergences.
"""

# No `from __future__ import annotations`: the command-line parser reads the field types.

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils.data import default_collate

from marval_rl.losses.policy import action_kl
from marval_rl.models import MARModel
from marval_rl.models.sampling import student_mean
from marval_rl.runtime.settings import Conditions, Needs
from marval_rl.trainers.batches import EpochAware
from marval_rl.trainers.lora import adapters_off
from marval_rl.trainers.score_matching import AuxiliaryArguments, Contexts, GSIMArguments, ScoreMatching
from marval_rl.trainers.student_networks import StudentNetworks

ANCHORED = Needs("the GSIM anchor (gsim_weight > 0)", ("gsim_weight",), lambda weight: weight != 0)


def gsim_field(name: str) -> Any:
    """A field with the default and the help of distillation's setting of that name."""
    original = GSIMArguments.__dataclass_fields__[name]
    return field(default=original.default, metadata={"help": f"GSIM anchor: {original.metadata['help']}"})


@dataclass
class AnchorArguments(AuxiliaryArguments):
    """Arguments of the anchors."""

    beta: float = field(default=0.0, metadata={"help": "Weight of the KL divergence from the reference model."})
    gsim_weight: float = field(
        default=0.0, metadata={"help": "Weight of the GSIM anchor, which needs the teacher; 0 is none."}
    )
    gsim_batch_size: int = field(
        default=128, metadata={"help": "Contexts of the GSIM anchor: half from data, half from the student's rollouts."}
    )
    gsim_guidance_scale: float = gsim_field("guidance_scale")
    gsim_min_timestep: int = gsim_field("min_timestep")
    gsim_max_timestep: int = gsim_field("max_timestep")
    gsim_timestep_draws: int = gsim_field("timestep_draws")
    gsim_mask_ratio_min: float = gsim_field("mask_ratio_min")
    gsim_mask_ratio_std: float = gsim_field("mask_ratio_std")
    auxiliary_warmup_steps: int = field(
        default=40, metadata={"help": "First steps that train the auxiliary network only (with the GSIM anchor)."}
    )

    counts_if: ClassVar[Conditions] = {
        ANCHORED: (
            *("gsim_batch_size", "auxiliary_learning_rate", "auxiliary_updates", "auxiliary_warmup_steps"),
            *("gsim_guidance_scale", "gsim_min_timestep", "gsim_max_timestep", "gsim_timestep_draws"),
            *("gsim_mask_ratio_min", "gsim_mask_ratio_std"),
        ),
        Needs("a gsim_mask_ratio_min below 1", ("gsim_mask_ratio_min",), lambda ratio: ratio != 1): (
            "gsim_mask_ratio_std",
        ),
    }

    @property
    def has_auxiliary(self) -> bool:
        """Whether there is an auxiliary network: with the GSIM anchor."""
        return self.gsim_weight > 0

    def gsim_arguments(self) -> GSIMArguments:
        """The GSIM anchor's settings, by the names of distillation."""
        own = {name.removeprefix("gsim_"): value for name, value in vars(self).items() if name.startswith("gsim_")}
        return GSIMArguments(**{name: own[name] for name in own.keys() & GSIMArguments.__dataclass_fields__.keys()})

    def check_anchors(self) -> None:
        """Raises ValueError for a negative weight."""
        for name, weight in (("beta", self.beta), ("gsim_weight", self.gsim_weight)):
            if weight < 0:
                raise ValueError(f"{name} must not be negative, but is {weight}")


class Anchors:
    """The anchors of a run.

    Args:
        args: The trainer's arguments.
        student: As the run begins; with `has_adapters` the reference model is this one with its adapters off.
        has_adapters: Whether LoRA adapters are trained.
        teacher: The MAR teacher; needed by GSIM.
        dataset: Rows {"images" or "moments", "class_labels"}; needed by GSIM.
        tokens_of: Rows of the data set -> tokens [B, L, C].

    Raises:
        ValueError: If the data set has fewer rows than a batch of contexts takes.
    """

    def __init__(
        self,
        args: Any,
        student: MARModel,
        has_adapters: bool,
        teacher: MARModel | None,
        dataset: Any,
        tokens_of: Callable[[dict[str, Tensor]], Tensor],
    ):
        self.args = args
        self.reference: MARModel | None = None
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
        self.dataset = dataset
        self.tokens_of = tokens_of

    def kl(
        self,
        mean: Tensor,
        student: MARModel,
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
            rollout: tokens [B, L, C], in back-propagation with gradient, and class_labels [B].
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
        return loss, metrics

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
