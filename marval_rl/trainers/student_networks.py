"""What the optimizer trains where there is a student: the student, and the auxiliary score network beside it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from marval_rl.errors import CheckpointError, first_line
from marval_rl.models import MaskedModel
from marval_rl.models.head import DiffusionHead
from marval_rl.runtime.distributed import gathered_weights
from marval_rl.trainers.optimization import AUXILIARY, MODEL

AUXILIARY_FILE = "auxiliary.safetensors"


class StudentNetworks(nn.Module):
    """The student and the auxiliary score network in one module, for one optimizer and one distributed engine.

    `forward` runs a function of the networks. All use of parameters must happen inside a `forward` of the module
    that the engine wraps, or DDP would not synchronise gradients and ZeRO-3 would not gather weights.
    """

    def __init__(self, student: MaskedModel, auxiliary: DiffusionHead | None = None):
        super().__init__()
        # Never asked for the null class: an engine would make its missing gradient a zero, and weight decay shrink it.
        self.student = student
        self.student.freeze_null()
        self.auxiliary = auxiliary

    def forward(self, function: Callable[..., Any], *args: Any) -> Any:
        return function(self, *args)

    def parameter_groups(self, args: Any) -> list[dict[str, Any]]:
        """Student and auxiliary network, each with its learning rate."""
        student = [p for p in self.student.parameters() if p.requires_grad]
        groups: list[dict[str, Any]] = [{"params": student, "lr": args.learning_rate, "network": MODEL}]
        if self.auxiliary is not None:
            auxiliary = list(self.auxiliary.parameters())
            groups.append({"params": auxiliary, "lr": args.auxiliary_learning_rate, "network": AUXILIARY})
        # transformers takes the weight decay from the groups; without it PyTorch's default would decay by 0.01.
        return [{**group, "weight_decay": args.weight_decay} for group in groups]

    def save_auxiliary(self, folder: Path, should_save: bool) -> None:
        """Write the auxiliary network, if there is one, where should_save says so; all processes must call it."""
        if self.auxiliary is None:
            return
        with gathered_weights(self.auxiliary):
            if should_save:
                state = {name: tensor.contiguous() for name, tensor in self.auxiliary.state_dict().items()}
                save_file(state, folder / AUXILIARY_FILE)

    # transformers' Trainer calls the first, before its release 5.23 the second.

    def activation_checkpointing_enable(self, **options: Any) -> None:
        """Keep only the inputs of the student's blocks for the backward pass."""
        self.student.activation_checkpointing_enable(**options)

    def gradient_checkpointing_enable(self, **options: Any) -> None:
        """The older name of `activation_checkpointing_enable`."""
        self.student.gradient_checkpointing_enable(**options)


def auxiliary_network(teacher: MaskedModel, trained: DiffusionHead | Path | None = None) -> DiffusionHead:
    """The auxiliary network that a run starts with: the teacher's head, or one that already fits the student.

    Args:
        teacher: The MAR teacher.
        trained: The network, or a folder in which a run may have saved one; None for the teacher's head.

    Raises:
        CheckpointError: If the folder's file is damaged or of other sizes.
    """
    if isinstance(trained, DiffusionHead):
        return trained
    network = copy.deepcopy(teacher.diffloss).requires_grad_(True)
    if trained is not None and (trained / AUXILIARY_FILE).exists():
        try:
            network.load_state_dict(load_file(trained / AUXILIARY_FILE))
        except (SafetensorError, RuntimeError) as error:
            raise CheckpointError(
                f"{trained / AUXILIARY_FILE} is damaged or does not fit the teacher's head: {first_line(error)}; "
                "delete it to start the auxiliary network from the teacher's head"
            ) from error
    return network
