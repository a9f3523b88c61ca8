"""Generating images: one function for teacher and student; many images in batches, and as a grid."""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate
from torchvision.transforms.functional import to_pil_image
from torchvision.utils import make_grid
from tqdm import tqdm

from marval_rl.models.chain import chain_head, sample_chain
from marval_rl.models.diffusion import make_schedule
from marval_rl.models.latents import LatentCodec, unpatchify
from marval_rl.models.masked import MaskedModel
from marval_rl.models.matmul import quick_products
from marval_rl.models.noise import GeneratorNoise, Noise, as_noise
from marval_rl.models.sampling import unmask
from marval_rl.models.unmasking import check_order, gather_tokens, guidance_scales, revealed_positions, unmasking_steps
from marval_rl.randomness import derive_generator

MAX_GRID_ROWS = 16
MASKED_GREY = 0.5  # of tokens that are still masked, in animations


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
    """Raises ValueError for a label outside 0..num_classes-1 (an embedding lookup would fail obscurely on a GPU).

    Waits for the device.
    """
    if class_labels.numel() and not ((class_labels >= 0) & (class_labels < num_classes)).all():
        bad = class_labels[(class_labels < 0) | (class_labels >= num_classes)][0].item()
        raise ValueError(f"class label {bad} is outside 0..{num_classes - 1}, the classes this model knows")


@torch.no_grad()
def generate(
    model: MaskedModel,
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
    """Generates a batch of images.

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
        ValueError: For labels the model does not know, and for settings of a teacher given to a student.
    """
    config, device = model.config, model.device
    if class_labels is None:
        if batch_size is None:
            raise ValueError("give class_labels, or batch_size to sample the null class")
        batch = batch_size
    else:
        batch = len(class_labels)
        check_class_labels(class_labels, config.num_classes)
        if batch_size not in (None, batch):
            raise ValueError(f"batch_size {batch_size} contradicts the {batch} class_labels")
    if config.is_one_step and guidance_scale != 1.0:
        raise ValueError(
            f"guidance_scale {guidance_scale} was given to a one-step student: its guidance was fixed in distillation"
        )
    if config.is_one_step and num_diffusion_steps is not None:
        raise ValueError(
            f"num_diffusion_steps {num_diffusion_steps} was given to a one-step student, which runs no chain: leave it "
            "out"
        )
    noise = as_noise(generator, device)
    if order is None:
        order = noise.order(batch, config.num_tokens)
    else:
        check_order(order, batch, config.num_tokens)
    if config.is_one_step:
        # Drawn for all tokens at once, by position: an image's noise does not depend on K.
        token_noise = temperature * noise.normal(batch * config.num_tokens, config.token_channels)
        token_noise = token_noise.view(batch, config.num_tokens, config.token_channels)
        if model.captured is not None and not return_steps:
            tokens = model.captured.tokens(class_labels, order, token_noise, num_unmasking_steps, autocast_dtype)
            return GenerationOutput(unpatchify(tokens, config.patch_size, config.grid))
    else:
        num_diffusion_steps = config.num_diffusion_steps if num_diffusion_steps is None else num_diffusion_steps
        schedule = make_schedule(config.num_train_timesteps, num_diffusion_steps)
    guided = guidance_scale != 1.0
    pairs = unmasking_steps(config.num_tokens, num_unmasking_steps)
    scales = guidance_scales(config.num_tokens, num_unmasking_steps, guidance_scale, guidance_schedule)
    scale_of = dict(zip(pairs, scales, strict=True))
    conditions: list[Tensor] = []

    def predict(tokens: Tensor, num_masked: int, num_kept: int) -> Tensor:
        asked = revealed_positions(order, num_masked, num_kept)
        if config.is_one_step:
            step_noise = gather_tokens(token_noise, asked)
            with model.products(batch):
                revealed, condition = model.one_step(
                    tokens, class_labels, order, num_masked, num_kept, step_noise, asked
                )
        else:
            # As in MAR, the null class is run whenever guidance is asked for, also while its scale is still 1.
            with model.products(batch * (1 + guided)):
                condition = model(
                    tokens, class_labels, order, num_masked, num_kept, guidance_pass=guided, asked=asked
                ).condition
            scale = scale_of[num_masked, num_kept] if guided else None
            asked_rows = condition.flatten(0, 1)
            with quick_products(device, len(asked_rows), config.head_hidden_size):
                revealed = sample_chain(head, schedule, asked_rows, noise, scale, temperature, config.clip_sample_range)
            revealed = revealed.view(batch, -1, config.token_channels)
        if return_steps:
            conditions.append(condition)
        return revealed

    steps = unmask(predict, order, config.token_channels, num_unmasking_steps)
    kept_steps = []
    precision = nullcontext() if autocast_dtype is None else torch.autocast(device.type, autocast_dtype)
    with precision:  # once around all steps, so that the weights are cast once
        if not config.is_one_step:
            head = chain_head(model.diffloss, schedule, device)
        for step in tqdm(steps, desc="unmasking", total=len(pairs), leave=False, disable=not progress):
            if return_steps:
                scale = scale_of[step.num_masked, step.num_kept]
                kept_steps.append(GenerationStep(scale, conditions[step.number], step.revealed, step.tokens))
    return GenerationOutput(unpatchify(step.tokens, config.patch_size, config.grid), kept_steps)


def generate_images(
    model: MaskedModel,
    codec: LatentCodec,
    num_images: int,
    settings: SamplingSettings,
    *,
    seed: int,
    batch_size: int,
    device: torch.device | str,
    class_labels: Tensor | None = None,
    progress: bool = False,
) -> tuple[Tensor, Tensor]:
    """Images [N, C, H, W] in 0..1 and their labels [N], on `device`, generated in batches.

    The noise of a batch depends on the seed and the batch's index: the same call always generates the same images.
    class_labels None gives every class equally often.
    """
    labels = balanced_labels(num_images, model.config.num_classes) if class_labels is None else class_labels
    was_training = model.training
    model.eval()
    images = []
    batches = labels.to(device).split(batch_size)
    for index, batch in enumerate(tqdm(batches, desc="sampling", disable=not progress, leave=False)):
        output = generate(model, batch, generator=derive_generator(device, seed, "sample", index), **vars(settings))
        with torch.no_grad():
            images.append(codec.decode(output.latents, model.decoder_text(batch)).float())
    model.train(was_training)
    return torch.cat(images), labels.to(device)


@torch.no_grad()
def unmasking_frames(
    model: MaskedModel,
    codec: LatentCodec,
    class_labels: Tensor,
    settings: SamplingSettings,
    *,
    seed: int,
    batch_size: int,
    device: torch.device | str,
    progress: bool = False,
) -> Tensor:
    """What is known of each image before the first unmasking step and after each: uint8 [K + 1, N, C, H, W].

    Tokens that are still masked are grey. The last frame has the images that `generate_images` makes of the same
    arguments.

    Raises:
        ValueError: For a model whose tokens have no place in the image.
    """
    config = model.config
    if not config.tokens_have_places:
        raise ValueError("the model's tokens have no place in the image, so its unmasking has no frames to show")
    pairs = unmasking_steps(config.num_tokens, settings.num_unmasking_steps)
    batches = []
    for index, labels in enumerate(class_labels.to(device).split(batch_size)):
        noise = GeneratorNoise(derive_generator(device, seed, "sample", index), device)
        order = noise.order(len(labels), config.num_tokens)
        output = generate(
            model, labels, order=order, generator=noise, return_steps=True, progress=progress, **vars(settings)
        )
        frames = []
        for step, (_, num_masked) in zip(output.steps, pairs, strict=True):
            images = codec.decode(unpatchify(step.tokens, config.patch_size, config.grid)).float()
            masked = torch.zeros(order.shape, device=device).scatter(1, order[:, :num_masked], 1.0)
            masked = masked.view(-1, 1, *config.grid)
            is_masked = interpolate(masked, size=images.shape[-2:], mode="nearest") > 0
            frames.append((torch.where(is_masked, MASKED_GREY, images) * 255).round().byte().cpu())
        batches.append(torch.stack([torch.full_like(frames[0], round(MASKED_GREY * 255)), *frames]))
    return torch.cat(batches, dim=1)


def save_image_grid(images: Tensor, class_labels: Tensor, path: Path, columns: int, min_height: int = 24) -> None:
    """Writes `image_grid` as a PNG."""
    image_grid(images, class_labels, columns, min_height).save(path)


def image_grid(images: Tensor, class_labels: Tensor, columns: int, min_height: int = 24) -> Image.Image:
    """A picture with a row per class, the first `columns` images of each, as many as every class has.

    Of more classes than `MAX_GRID_ROWS` it is a square of images in the order of their classes.

    Args:
        images: [N, C, H, W] in 0..1.
        class_labels: [N].
        columns: Images per class, at most.
        min_height: Smaller images are enlarged to this many pixels or more, without smoothing.
    """
    labels = class_labels.unique().tolist()
    if len(labels) > MAX_GRID_ROWS:
        columns = math.isqrt(len(images) - 1) + 1
    else:
        columns = min(columns, *(int((class_labels == label).sum()) for label in labels))
        images = torch.cat([images[class_labels == label][:columns] for label in labels])
    grid = make_grid(images.cpu(), nrow=columns, padding=1, pad_value=1.0)
    if len(images) > 1:  # a single image gets no border
        grid = grid[:, 1:-1, 1:-1]
    picture = to_pil_image((grid * 255).round().byte())
    scale = max(1, -(-min_height // images.shape[-2]))
    return picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST)
