"""What every masked autoregressive model is to the sampler and the trainers: a backbone, a diffusion head, a condition.

A backbone maps the known tokens, the order and a condition to one vector z per token. A condition is an int64 index: of
a class (`MARModel`), or of a prompt (`MaskGenModel`).
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from marval_rl.models.diffusion import DiffusionSchedule, make_schedule, predict_start
from marval_rl.models.head import DiffusionHead
from marval_rl.models.unmasking import revealed_positions, visible_positions


@dataclass
class MAROutput(ModelOutput):
    """What a forward pass of a masked autoregressive model returns.

    Attributes:
        condition: [B, M, D], what the backbone says of each token that is asked for.
        model_output: [..., B, M, 2C] or None, the head's noise prediction (first C) and variance values (last C).
    """

    condition: Tensor | None = None
    model_output: Tensor | None = None


class MaskedModel(PreTrainedModel):
    """Base of the models; a subclass says how it conditions (`conditions_of`) and names its parts.

    Its configuration extends `MaskedConfig`.
    """

    main_input_name = "tokens"
    supports_gradient_checkpointing = True
    _supports_sdpa = True

    diffloss: DiffusionHead
    captured: Any = None  # a student's CapturedGenerations

    def conditions_of(
        self,
        tokens: Tensor,
        class_labels: Tensor | None,
        visible: Tensor,
        asked: Tensor,
        drop_mask: Tensor | None,
        guidance_pass: bool,
    ) -> Tensor:
        """Conditions z [B, M, D] of the tokens at the positions `asked` [B, M], from those at `visible` [B, V], both
        ascending; [2B, M, D] in a guidance pass. Other arguments as `forward`'s."""
        raise NotImplementedError

    def decays(self, name: str, parameter: nn.Parameter) -> bool:
        """Whether weight decay applies to a parameter in pretraining."""
        raise NotImplementedError

    def freeze_null(self) -> None:
        """Takes the gradient of what only the null condition uses: a student is never asked for it."""

    def condition_on(self, names: Sequence[str]) -> None:
        """Knows these conditions, in the order of their labels; classes are among the weights."""

    def share_conditions(self, other: MaskedModel) -> None:
        """Knows the conditions that another model of the same backbone knows; a class table is among the weights."""

    def set_blank_conditions(self) -> None:
        """Conditions that say nothing, where the weights bring none: enough to plan memory with."""

    def decoder_text(self, class_labels: Tensor) -> Tensor | None:
        """What the codec's decoder reads beside the latents of these labels; None for nothing."""
        return None

    def products(self, num_images: int) -> AbstractContextManager[None]:
        """Within it the backbone multiplies with the library that suits it, for this number of images at once."""
        return nullcontext()  # what diffusers' attention multiplies is slower with the other one

    @property
    def schedule(self) -> DiffusionSchedule:
        """The full diffusion process that the head was trained on."""
        return make_schedule(self.config.num_train_timesteps)

    def forward(
        self,
        tokens: Tensor,
        class_labels: Tensor | None,
        order: Tensor,
        num_masked: int,
        num_kept: int = 0,
        noisy_tokens: Tensor | None = None,
        timesteps: Tensor | None = None,
        drop_mask: Tensor | None = None,
        guidance_pass: bool = False,
        asked: Tensor | None = None,
    ) -> MAROutput:
        """Conditions, and optionally noise predictions, of the tokens revealed between two counts of masked tokens.

        Args:
            tokens: [B, L, C]; only the visible ones are read.
            class_labels: int64 [B], the index of each image's class or prompt, or None for the null condition.
            order: Unmasking order, int64 [B, L].
            num_masked: Tokens masked before, 1..L.
            num_kept: Tokens still masked after; the M = num_masked - num_kept between are asked for, positions
                ascending.
            noisy_tokens: x_t at those tokens, [..., B, M, C]; leading dimensions hold several draws for one condition.
            timesteps: int64, broadcastable to noisy_tokens without its channels.
            drop_mask: bool [B], True where the null condition replaces the label (label dropout in pretraining).
            guidance_pass: Run the null condition beside the labels; both outputs then hold [2B, ...], labels first.
            asked: Those M positions, int64 [B, M], where the caller has sorted them already.
        """
        visible = visible_positions(order, num_masked)
        if asked is None:
            asked = revealed_positions(order, num_masked, num_kept)
        condition = self.conditions_of(tokens, class_labels, visible, asked, drop_mask, guidance_pass)
        if noisy_tokens is None:
            return MAROutput(condition=condition)
        return MAROutput(condition=condition, model_output=self.diffloss(noisy_tokens, timesteps, condition))

    def one_step(
        self,
        tokens: Tensor,
        class_labels: Tensor | None,
        order: Tensor,
        num_masked: int,
        num_kept: int,
        noise: Tensor,
        asked: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The student's map x0 = (z - sigma_t* eps(z, t*, c)) / alpha_t*, and the condition c it used.

        noise z [B, M, C] ~ N(0, I) for the tokens revealed; asked as in `forward`. Returns ([B, M, C] in float32,
        [B, M, D]).
        """
        t = torch.full((1,), self.config.one_step_timestep, device=noise.device)
        output: Any = self(
            tokens, class_labels, order, num_masked, num_kept, noisy_tokens=noise, timesteps=t, asked=asked
        )
        eps = output.model_output[..., : noise.shape[-1]].float()
        return predict_start(self.schedule, noise, eps, t), output.condition
