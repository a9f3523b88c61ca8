"""Sampling: one function for teacher and student. The outer loop reveals tokens, the inner one denoises them."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor
from tqdm import tqdm

from marval_rl.models.diffusion import make_schedule, reverse_step
from marval_rl.models.latents import unpatchify
from marval_rl.models.mar import MARModel
from marval_rl.models.noise import Noise, as_noise
from marval_rl.models.unmasking import (
    gather_tokens,
    guidance_scales,
    revealed_positions,
    scatter_tokens,
    unmasking_steps,
)


@dataclass(frozen=True)
class SamplingSettings:
    """The settings of `generate` that are the same for every batch."""

    num_unmasking_steps: int
    guidance_scale: float = 1.0
    guidance_schedule: str = "linear"
    temperature: float = 1.0
    num_diffusion_steps: int | None = None
    autocast_dtype: torch.dtype | None = None


@dataclass
class GenerationStep:
    """One unmasking step, kept on request."""

    guidance_scale: float
    condition: Tensor  # [B, M, D], or [2B, M, D] when guided (null class last)
    revealed: Tensor  # [B, M, C]
    tokens: Tensor  # [B, L, C] after the step


@dataclass
class GenerationOutput:
    """Generated latents [B, c, h, w], and the steps when they were asked for."""

    latents: Tensor
    steps: list[GenerationStep] = field(default_factory=list)


def balanced_labels(num_images: int, num_classes: int) -> Tensor:
    """Class labels [N] in sorted order, each class equally often (the first ones once more where it does not
    divide). Fewer images than classes are of classes evenly spread."""
    if num_images < num_classes:
        return torch.arange(num_images) * num_classes // num_images
    return (torch.arange(num_images) % num_classes).sort().values


def check_class_labels(class_labels: Tensor, num_classes: int) -> None:
    """Raises ValueError for a label outside 0..num_classes-1 (an embedding lookup would fail obscurely on a GPU)."""
    if class_labels.numel() and not (int(class_labels.min()) >= 0 and int(class_labels.max()) < num_classes):
        bad = class_labels[(class_labels < 0) | (class_labels >= num_classes)][0].item()
        raise ValueError(f"class label {bad} is outside 0..{num_classes - 1}, the classes this model knows")


def check_order(order: Tensor, batch_size: int, num_tokens: int) -> None:
    """Raises ValueError unless each row of order [B, L] is a permutation of the tokens."""
    everything = torch.arange(num_tokens, device=order.device).expand(batch_size, -1)
    if order.shape != everything.shape or not torch.equal(order.sort(dim=1).values, everything):
        raise ValueError(f"order must hold a permutation of 0..{num_tokens - 1} for each of the {batch_size} images")


@torch.no_grad()
def generate(
    model: MARModel,
    class_labels: Tensor | None,
    *,
    num_unmasking_steps: int,
    guidance_scale: float = 1.0,
    guidance_schedule: str = "linear",
    temperature: float = 1.0,
    num_diffusion_steps: int | None = None,
    batch_size: int | None = None,
    order: Tensor | None = None,
    generator: torch.Generator | Noise | None = None,
    autocast_dtype: torch.dtype | None = None,
    return_steps: bool = False,
    progress: bool = False,
) -> GenerationOutput:
    """Paints a batch of images.

    Args:
        model: A teacher or a one-step student (its configuration says which); put it in eval mode first.
        class_labels: int64 [B] on the model's device, or None for the null class (then give batch_size).
        num_unmasking_steps: K. Any K works with any model.
        guidance_scale: MAR's convention, 1.0 is none. A student has its guidance distilled in and takes 1.0 only.
        guidance_schedule: "linear" in the share of revealed tokens, or "constant".
        temperature: Scales the noise added in each reverse step; for a student the noise z it starts from.
        num_diffusion_steps: Length of the teacher's reverse chain (None: the configuration's).
        order: Unmasking order, int64 [B, L]; None draws a random one for each image.
        generator: Source of all randomness: a generator on the model's device, None for the global one, or an
            `IndexedNoise`, with which an image does not depend on its batch.
        autocast_dtype: Run the networks under autocast to it (torch.bfloat16); None leaves their precision alone.
        return_steps: Keep every unmasking step.
        progress: Show a progress bar over unmasking steps.

    Raises:
        ValueError: for labels the model does not know, and for a guidance scale given to a student.
    """
    config, device = model.config, model.device
    if class_labels is None and batch_size is None:
        raise ValueError("give class_labels, or batch_size to sample the null class")
    if class_labels is not None:
        check_class_labels(class_labels, config.num_classes)
        if batch_size not in (None, len(class_labels)):
            raise ValueError(f"batch_size {batch_size} contradicts the {len(class_labels)} class_labels")
    if config.is_one_step and guidance_scale != 1.0:
        raise ValueError(
            f"guidance_scale {guidance_scale} was given to a one-step student: its guidance was fixed in distillation"
        )
    batch = batch_size if class_labels is None else class_labels.shape[0]
    noise = as_noise(generator, device)
    if order is None:
        order = noise.order(batch, config.num_tokens)
    else:
        check_order(order, batch, config.num_tokens)
    tokens = torch.zeros(batch, config.num_tokens, config.token_channels, device=device)
    if config.is_one_step:
        # Drawn for all tokens at once, by position: an image's noise does not depend on K.
        token_noise = temperature * noise.normal(batch * config.num_tokens, config.token_channels).view_as(tokens)
    scales = guidance_scales(config.num_tokens, num_unmasking_steps, guidance_scale, guidance_schedule)
    pairs = unmasking_steps(config.num_tokens, num_unmasking_steps)
    kept_steps = []
    precision = nullcontext() if autocast_dtype is None else torch.autocast(device.type, autocast_dtype)
    with precision:  # once around all steps, so that the weights are cast once
        for (masked, kept), scale in tqdm(
            list(zip(pairs, scales, strict=True)), desc="unmasking", leave=False, disable=not progress
        ):
            positions = revealed_positions(order, masked, kept)
            if config.is_one_step:
                revealed, condition = model.one_step(
                    tokens, class_labels, order, masked, kept, gather_tokens(token_noise, positions)
                )
            else:
                # As in MAR, the null class is run whenever guidance is asked for, also while its scale is still 1.
                guided = guidance_scale != 1.0
                condition = model(tokens, class_labels, order, masked, kept, guidance_pass=guided).condition
                revealed = sample_chain(
                    model, condition.flatten(0, 1), scale if guided else None, temperature, num_diffusion_steps, noise
                ).view(batch, -1, config.token_channels)
            tokens = scatter_tokens(tokens, positions, revealed)
            if return_steps:
                kept_steps.append(GenerationStep(scale, condition, revealed, tokens))
    return GenerationOutput(unpatchify(tokens, config.patch_size, config.grid_size), kept_steps)


def sample_chain(
    model: MARModel,
    condition: Tensor,
    guidance_scale: float | None,
    temperature: float = 1.0,
    num_diffusion_steps: int | None = None,
    generator: torch.Generator | Noise | None = None,
    return_trajectory: bool = False,
) -> Tensor:
    """The teacher's reverse diffusion chain for N tokens.

    Args:
        condition: [N, D]; with guidance [2N, D], the null class in the second half.
        guidance_scale: None for no guidance.
        generator: As for `generate`; with an `IndexedNoise` the tokens stand image by image, equally many each.
        return_trajectory: Return every state, [steps, N, C], instead of the last.

    Returns:
        Tokens [N, C], float32.
    """
    config, device = model.config, condition.device
    schedule = make_schedule(
        config.num_train_timesteps, config.num_diffusion_steps if num_diffusion_steps is None else num_diffusion_steps
    )
    rows = condition.shape[0] // (1 if guidance_scale is None else 2)
    channels = config.token_channels
    noise = as_noise(generator, device)
    x = noise.normal(rows, channels)
    states = []
    for index in reversed(range(len(schedule))):
        t = torch.full((1,), int(schedule.timesteps[index]), device=device)
        if guidance_scale is None:
            output = model.diffloss(x, t, condition).float()
        else:
            output = guide(model.diffloss(x.repeat(2, 1), t, condition).float(), guidance_scale)
        # MAR draws noise for both halves and for index 0 too; drawing alike keeps a seed's images the same.
        step_noise = noise.normal(rows, channels, num_unused_rows=condition.shape[0] - rows)
        x = reverse_step(schedule, output, x, index, step_noise, temperature, config.clip_sample_range)
        states.append(x)
    return torch.stack(states) if return_trajectory else x


def guide(model_output: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance: eps = eps_null + s (eps_c - eps_null); the variance values stay the labels' own.

    model_output [2N, ..., 2C], labels first -> [N, ..., 2C].
    """
    labelled, null = model_output.chunk(2)
    channels = labelled.shape[-1] // 2
    eps = null[..., :channels] + scale * (labelled[..., :channels] - null[..., :channels])
    return torch.cat([eps, labelled[..., channels:]], dim=-1)
