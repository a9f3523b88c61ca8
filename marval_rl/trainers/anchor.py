"""The anchor of RL: distillation's GSIM loss kept on, so that the student holds on to the teacher's distribution."""

# No `from __future__ import annotations`: the command-line parser reads the field types.

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from marval_rl.models import MARModel
from marval_rl.models.unmasking import random_order
from marval_rl.runtime.settings import Conditions, Needs
from marval_rl.trainers.batches import EpochAware
from marval_rl.trainers.gsim import ScoreMatcher, StudentNetworks
from marval_rl.trainers.masking import draw_num_masked

ANCHORED = Needs("an anchor (anchor_weight > 0)", ("anchor_weight",), lambda weight: weight != 0)


@dataclass
class AnchorArguments:
    """Arguments of the anchor."""

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

    counts_if: ClassVar[Conditions] = {
        ANCHORED: (
            *("anchor_batch_size", "auxiliary_learning_rate", "auxiliary_updates", "auxiliary_warmup_steps"),
            *("guidance_scale", "min_timestep", "max_timestep", "timestep_draws", "mask_ratio_min", "mask_ratio_std"),
        ),
        Needs("a mask_ratio_min below 1", ("mask_ratio_min",), lambda ratio: ratio != 1): ("mask_ratio_std",),
    }

    @property
    def cycle(self) -> int:
        """Steps of which one updates the student; with an anchor the others train the auxiliary network."""
        return self.auxiliary_updates if self.anchor_weight > 0 else 1


class Anchor:
    """Draws contexts, half from data and half from the student's own rollouts, and computes GSIM's losses in them.

    Args:
        teacher: The MAR teacher.
        dataset: Rows {"images" or "moments", "class_labels"}.
        tokens_of: Rows of the data set -> tokens [B, L, C].
        args: The settings.

    Raises:
        ValueError: If the data set has fewer rows than a batch of contexts takes.
    """

    def __init__(
        self, teacher: MARModel, dataset: Dataset, tokens_of: Callable[[dict[str, Tensor]], Tensor], args: Any
    ):
        from_data = args.anchor_batch_size - args.anchor_batch_size // 2
        if not 1 <= from_data <= len(dataset):
            raise ValueError(
                f"anchor_batch_size {args.anchor_batch_size} takes {from_data} rows of data at once, but "
                f"anchor_dataset has {len(dataset)}: set it to 1 to {2 * len(dataset)}, or give more data"
            )
        self.dataset = dataset
        self.tokens_of = tokens_of
        self.args = args
        timestep_range = (args.min_timestep, args.max_timestep)
        self.matcher = ScoreMatcher(teacher.to(args.device), args.guidance_scale, timestep_range, args.timestep_draws)

    def contexts(self, own: dict[str, Tensor], epoch: int) -> tuple[Tensor, Tensor, Tensor, int]:
        """Tokens [A, L, C], class labels [A], order [A, L] and the number of masked tokens.

        own: {tokens [B, L, C], class_labels [B]} of rollouts. epoch: chooses the flips of the data.
        """
        args, device = self.args, own["tokens"].device
        half = args.anchor_batch_size // 2
        if isinstance(self.dataset, EpochAware):
            self.dataset.set_epoch(epoch)
        chosen = torch.randint(len(self.dataset), (args.anchor_batch_size - half,)).tolist()
        data = default_collate([self.dataset[index] for index in chosen])
        some = torch.randint(len(own["tokens"]), (half,), device=device)
        tokens = torch.cat([self.tokens_of(data), own["tokens"][some].detach()])
        labels = torch.cat([data["class_labels"].to(device), own["class_labels"][some]])
        num_tokens = tokens.shape[1]
        order = random_order(len(tokens), num_tokens, device)
        return tokens, labels, order, draw_num_masked(num_tokens, args.mask_ratio_min, args.mask_ratio_std)

    def student_loss(
        self, networks: StudentNetworks, context: tuple[Tensor, Tensor, Tensor, int]
    ) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
        """(anchor_weight x GSIM's loss, metrics, the sample that `auxiliary_loss` learns from)."""
        loss, metrics, sample = self.matcher.student_loss(networks, *context)
        return self.args.anchor_weight * loss, {"anchor_loss": loss, **metrics}, sample

    def sample(self, networks: StudentNetworks, context: tuple[Tensor, Tensor, Tensor, int]) -> dict[str, Tensor]:
        """The sample alone, where the student is not updated."""
        return self.matcher.sample(networks, *context)

    def auxiliary_loss(self, networks: StudentNetworks, sample: dict[str, Tensor]) -> Tensor:
        """The auxiliary network's loss on a sample."""
        return self.matcher.auxiliary_loss(networks, sample)
