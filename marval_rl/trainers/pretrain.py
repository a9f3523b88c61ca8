"""Pretraining a MAR teacher with the masked diffusion loss (arXiv 2406.11838)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from marval_rl.models import MaskedModel
from marval_rl.models.diffusion import add_noise, diffusion_losses
from marval_rl.models.generation import SamplingSettings
from marval_rl.models.unmasking import gather_tokens, random_order, revealed_positions
from marval_rl.runtime.settings import EVALUATED, Conditions, Needs, setting
from marval_rl.trainers.arguments import MARTrainingArguments, MaskingArguments
from marval_rl.trainers.base import MARTrainer
from marval_rl.trainers.optimization import decay_groups


@dataclass
class PretrainConfig(MaskingArguments, MARTrainingArguments):
    """Arguments of `PretrainTrainer`. The defaults are those of the official code where it has them."""

    learning_rate: float = setting(8e-4, "Peak learning rate of AdamW.")
    weight_decay: float = setting(0.02, "Weight decay of the backbone's matrices.")
    adam_beta2: float = setting(0.95, "beta2 of AdamW.")
    max_grad_norm: float = setting(3.0, "Clip the global gradient norm.")
    ema_decay: float = setting(0.9999, "Decay of the weight average that is sampled and saved.")
    label_dropout: float = setting(0.1, "Share of labels replaced by the null class.")
    timestep_draws: int = setting(4, "(t, noise) draws per token and step (diffusion_batch_mul).")
    eval_guidance_scale: float = setting(1.0, "Guidance scale in evaluation; 1.0 is none.")
    eval_guidance_schedule: str = setting("linear", '"linear" or "constant".')
    eval_diffusion_steps: int = setting(100, "Diffusion steps in evaluation.")

    counts_if: ClassVar[Conditions] = {
        EVALUATED: ("eval_guidance_scale", "eval_guidance_schedule", "eval_diffusion_steps"),
        Needs("an eval_guidance_scale other than 1", ("eval_guidance_scale",), lambda scale: scale != 1): (
            "eval_guidance_schedule",
        ),
    }


def pretraining_loss(
    model: nn.Module,
    tokens: Tensor,
    class_labels: Tensor,
    order: Tensor,
    num_masked: int,
    timesteps: Tensor,
    noise: Tensor,
    drop_mask: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """MAR's loss, the mean over masked tokens of noise error plus variational bound.

    Args:
        tokens: [B, L, C]. class_labels: [B]. order: [B, L].
        timesteps: [R, B, M], R draws for each of the M = num_masked masked tokens, positions ascending.
        noise: [R, B, M, C].
        drop_mask: bool [B], True where the null class takes the label's place.
    """
    mar: Any = model if isinstance(model, MaskedModel) else model.module  # in the wrapper of DDP or DeepSpeed
    schedule = mar.schedule
    x_start = gather_tokens(tokens, revealed_positions(order, num_masked))
    x_t = add_noise(schedule, x_start, noise, timesteps)
    output = model(tokens, class_labels, order, num_masked, noisy_tokens=x_t, timesteps=timesteps, drop_mask=drop_mask)
    mse, vb = diffusion_losses(schedule, output.model_output.float(), x_start.expand_as(x_t), x_t, noise, timesteps)
    return (mse + vb).mean(), {"loss_mse": mse.mean(), "loss_vb": vb.mean()}


class PretrainTrainer(MARTrainer):
    """Trains a teacher. `train_dataset` yields {"images": [C, H, W] in 0..1, "class_labels": int}, or cached
    "moments" [2c, h, w] instead of images."""

    method = "pretrain"

    args: PretrainConfig

    def __init__(self, model: MaskedModel, args: PretrainConfig, **kwargs: Any):
        super().__init__(model, model, args, **kwargs)

    def sampling_settings(self) -> SamplingSettings:
        args = self.args
        return SamplingSettings(
            num_unmasking_steps=args.eval_unmasking_steps,
            guidance_scale=args.eval_guidance_scale,
            guidance_schedule=args.eval_guidance_schedule,
            num_diffusion_steps=args.eval_diffusion_steps,
        )

    def parameter_groups(self) -> list[dict[str, Any]]:
        return decay_groups(self.mar, self.args.weight_decay)

    def training_loss(self, model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
        args, config = self.args, self.mar.config
        tokens = self.tokens_of(inputs)
        batch, device = tokens.shape[0], tokens.device
        order = random_order(batch, config.num_tokens, device)
        num_masked = args.draw_num_masked(config)
        shape = (args.timestep_draws, batch, num_masked)
        timesteps = torch.randint(config.num_train_timesteps, shape, device=device)
        noise = torch.randn(*shape, config.token_channels, device=device)
        drop_mask = torch.rand(batch, device=device) < args.label_dropout
        loss, metrics = pretraining_loss(
            model, tokens, inputs["class_labels"], order, num_masked, timesteps, noise, drop_mask
        )
        self.record(metrics)
        return loss
