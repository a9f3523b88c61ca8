"""How fast a model generates."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

from marval_rl.models import LatentCodec, MaskedModel, generate
from marval_rl.models.generation import SamplingSettings, balanced_labels

SINGLE_REPEATS, BATCH_REPEATS = 5, 2


def generation_speed(
    model: MaskedModel, codec: LatentCodec, settings: SamplingSettings, batch_size: int
) -> dict[str, float]:
    """Seconds per image at batch 1 (median of 5), and images per second at `batch_size` (2 batches), each warmed up.

    From labels to images in 0..1; the noise is drawn from a plain generator, as in MAR.
    """

    def generate_images_of(count: int) -> None:
        labels = balanced_labels(count, model.config.num_classes).to(model.device)
        generator = torch.Generator(model.device).manual_seed(0)
        latents = generate(model, labels, generator=generator, **vars(settings)).latents
        codec.decode(latents, model.decoder_text(labels))

    with torch.no_grad():
        generate_images_of(1)
        single = [seconds_of(lambda: generate_images_of(1), model.device) for _ in range(SINGLE_REPEATS)]
        generate_images_of(batch_size)
        batch = [seconds_of(lambda: generate_images_of(batch_size), model.device) for _ in range(BATCH_REPEATS)]
    return {
        "seconds_per_image": statistics.median(single),
        "images_per_second": batch_size * BATCH_REPEATS / sum(batch),
    }


def seconds_of(function: Callable[[], object], device: torch.device) -> float:
    """Seconds that one call takes, until the device has done all of it."""
    _wait_for(device)
    start = time.perf_counter()
    function()
    _wait_for(device)
    return time.perf_counter() - start


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
