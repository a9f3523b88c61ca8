"""Generating many images in batches, and drawing them as a grid."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from marval_rl.models import LatentCodec, MARModel, generate
from marval_rl.models.generation import SamplingSettings, balanced_labels
from marval_rl.runtime.randomness import derive_generator

MAX_ROWS = 16  # of a sample grid


def _batches(labels: Tensor, batch_size: int) -> Iterator[Tensor]:
    yield from labels.split(batch_size)


@torch.no_grad()
def generate_images(
    model: MARModel,
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
    """Images [N, C, H, W] in 0..1 and their labels [N], on `device`.

    The noise of a batch depends on the seed and the batch's index, so the same call always paints the same images.
    class_labels None gives every class equally often.
    """
    labels = balanced_labels(num_images, model.config.num_classes) if class_labels is None else class_labels
    was_training = model.training
    model.eval()
    images = []
    chunks = list(_batches(labels.to(device), batch_size))
    for index, chunk in enumerate(tqdm(chunks, desc="sampling", disable=not progress, leave=False)):
        output = generate(model, chunk, generator=derive_generator(device, seed, "sample", index), **vars(settings))
        images.append(codec.decode(output.latents).float())
    model.train(was_training)
    return torch.cat(images), labels.to(device)


def save_image_grid(images: Tensor, class_labels: Tensor, path: Path, columns: int, min_height: int = 24) -> None:
    """One row a class, the first `columns` images of each, as PNG. Small images are enlarged without smoothing.

    Of more classes than `MAX_ROWS` it is a square of images in the order of their classes.
    """
    rows = _rows(images, class_labels, columns)
    height, width = images.shape[-2:]
    columns = max(len(row) for row in rows)
    canvas = torch.ones(images.shape[1], len(rows) * (height + 1) - 1, columns * (width + 1) - 1)
    for y, row in enumerate(rows):
        for x, image in enumerate(row.cpu()):
            canvas[:, y * (height + 1) : y * (height + 1) + height, x * (width + 1) : x * (width + 1) + width] = image
    pixels = (canvas.expand(3, -1, -1) * 255).round().to(torch.uint8).permute(1, 2, 0).contiguous().numpy()
    picture = Image.fromarray(pixels)
    scale = max(1, -(-min_height // height))
    picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST).save(path)


def _rows(images: Tensor, class_labels: Tensor, columns: int) -> list[Tensor]:
    labels = class_labels.unique().tolist()
    if len(labels) > MAX_ROWS:
        return list(images.split(math.isqrt(len(images) - 1) + 1))
    rows = [images[class_labels == label][:columns] for label in labels]
    shortest = min(len(row) for row in rows)
    return [row[:shortest] for row in rows]
