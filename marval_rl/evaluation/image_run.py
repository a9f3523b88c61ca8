"""Painting and measuring an image set, over several processes, so that it can be interrupted and gone on with."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from marval_rl.errors import DataError
from marval_rl.evaluation.image_set import (
    ImagePlan,
    claim_folder,
    paint,
    read_written_images,
    write_images,
)
from marval_rl.evaluation.measures import ImageMeasures, MeasureSettings, read_part, write_part
from marval_rl.models import LatentCodec, MARModel
from marval_rl.models.generation import SamplingSettings

IMAGES, MEASURES = "images", "measures"


@dataclass(frozen=True)
class ImageRun:
    """One evaluation's images and measures, in a folder.

    The folder has settings.json (how the images are painted), images/000000.png ... if they are kept, and while the
    evaluation is unfinished measures/ with its own settings.json and a file a batch.

    Attributes:
        keeps_images: Write the images as PNG; otherwise only their measures are kept.
    """

    folder: Path
    keeps_images: bool
    plan: ImagePlan
    sampling: SamplingSettings
    seed: int
    measures: MeasureSettings

    def claim(self, painter: dict[str, Any]) -> None:
        """Makes the folder, or checks that it is the same evaluation's.

        Args:
            painter: What tells the model, as JSON can hold it.

        Raises:
            DataError: If the folder holds images or measures made otherwise, naming what differs.
        """
        sampling = {**vars(self.sampling), "autocast_dtype": dtype_name(self.sampling.autocast_dtype)}
        settings = {**painter, **sampling, **vars(self.plan), "seed": self.seed, "keeps_images": self.keeps_images}
        claim_folder(self.folder, settings, "images", "Give the same settings, another folder, or delete it")
        if self.keeps_images:
            (self.folder / IMAGES).mkdir(exist_ok=True)
        if not self.measures.is_empty:
            if not any((self.folder / MEASURES).glob("*.safetensors")):
                shutil.rmtree(self.folder / MEASURES, ignore_errors=True)  # nothing was measured yet
            claim_folder(
                self.folder / MEASURES,
                self.measures.describe(),
                "an unfinished evaluation",
                "Give the same settings, or delete it to measure anew (the images are kept)",
            )

    def do_share(self, model: MARModel, codec: LatentCodec, rank: int, world_size: int, progress: bool = False) -> None:
        """Does what is missing of a process's batches; nothing where neither images nor measures are asked for."""
        loaded: ImageMeasures | None = None
        was_training = model.training
        model.eval()
        for batch in tqdm(self.plan.share(rank, world_size), desc="batches", leave=False, disable=not progress):
            pixels = self._kept_pixels(batch)
            is_measured = self.measures.is_empty or read_part(self.folder / MEASURES, batch) is not None
            if is_measured and (pixels is not None or not self.keeps_images):
                continue
            if not is_measured:  # before anything is generated: a reward or its weights may be missing
                loaded = loaded or ImageMeasures(self.measures, model.device)
            if pixels is None:
                pixels = paint(model, codec, self.plan, batch, self.sampling, self.seed)
                if self.keeps_images:
                    write_images(self.folder / IMAGES, self.plan.indices(batch), pixels)
            if not is_measured:
                write_part(self.folder / MEASURES, batch, loaded.measure(pixels, self.plan.labels(batch)))
        model.train(was_training)

    def collect(self) -> dict[str, Tensor]:
        """The measures of all images, in their order. Raises DataError if a batch is missing."""
        if self.measures.is_empty:
            return {}
        parts = [read_part(self.folder / MEASURES, batch) for batch in range(self.plan.num_batches)]
        missing = [batch for batch, part in enumerate(parts) if part is None]
        if missing:
            raise DataError(
                f"{len(missing)} of {len(parts)} batches were not measured (the first is {missing[0]}): do all "
                f"processes see {self.folder}? The same command goes on"
            )
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def finish(self) -> None:
        """Leaves the images, if they are kept, and removes the rest."""
        unfinished = self.folder / MEASURES if self.keeps_images else self.folder
        shutil.rmtree(unfinished, ignore_errors=True)

    def _kept_pixels(self, batch: int) -> Tensor | None:
        if not self.keeps_images:
            return None
        return read_written_images(self.folder / IMAGES, self.plan.indices(batch))


def dtype_name(dtype: torch.dtype | None) -> str:
    """ "bfloat16" for torch.bfloat16, "float32" for None."""
    return "float32" if dtype is None else str(dtype).removeprefix("torch.")
