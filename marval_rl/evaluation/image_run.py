"""Generating and measuring an image set in several processes, so that it can be interrupted and continued."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from marval_rl.errors import DataError
from marval_rl.evaluation.evaluator import ImageEvaluator
from marval_rl.evaluation.image_set import (
    ImagePlan,
    claim_folder,
    generate_batch,
    read_rows,
    read_written_images,
    write_images,
    write_rows,
)
from marval_rl.evaluation.references import Rows
from marval_rl.models import LatentCodec, MaskedModel
from marval_rl.models.generation import SamplingSettings

IMAGES, MEASURES = "images", "measures"


@dataclass(frozen=True)
class ImageRun:
    """One evaluation's images and what was measured of them, in a folder.

    The folder has settings.json (how the images are generated), images/000000.png ... if they are kept, and while the
    evaluation is unfinished measures/ with its own settings.json and a file for each batch.

    Attributes:
        keeps_images: Write the images as PNG; otherwise only what is measured of them is kept.
        measured: What decides the measures' values, as JSON can hold it.
    """

    folder: Path
    keeps_images: bool
    plan: ImagePlan
    sampling: SamplingSettings
    seed: int
    measured: dict[str, Any]

    def claim(self, generator: dict[str, Any]) -> None:
        """Makes the folder, or checks that it is the same evaluation's.

        Args:
            generator: What identifies the model, as JSON can hold it.

        Raises:
            DataError: If the folder holds images or measures made otherwise, naming what differs.
        """
        dtype = str(self.sampling.autocast_dtype or torch.float32).removeprefix("torch.")
        sampling = {**vars(self.sampling), "autocast_dtype": dtype}
        settings = {**generator, **sampling, **vars(self.plan), "seed": self.seed, "keeps_images": self.keeps_images}
        claim_folder(self.folder, settings, "images", "Give the same settings, another folder, or delete it")
        if self.keeps_images:
            (self.folder / IMAGES).mkdir(exist_ok=True)
        if not any((self.folder / MEASURES).glob("*.safetensors")):
            shutil.rmtree(self.folder / MEASURES, ignore_errors=True)  # nothing was measured yet
        claim_folder(
            self.folder / MEASURES,
            self.measured,
            "an unfinished evaluation",
            "Give the same settings, or delete it to measure again (the images are kept)",
        )

    def do_share(
        self,
        model: MaskedModel,
        codec: LatentCodec,
        evaluator: ImageEvaluator,
        rank: int,
        world_size: int,
        progress: bool = False,
    ) -> None:
        """Generates and measures the missing batches of a process."""
        was_training = model.training
        model.eval()
        for batch in tqdm(self.plan.share(rank, world_size), desc="batches", leave=False, disable=not progress):
            indices = self.plan.indices(batch)
            pixels = read_written_images(self.folder / IMAGES, indices) if self.keeps_images else None
            is_measured = read_rows(self._part_file(batch)) is not None
            if is_measured and (pixels is not None or not self.keeps_images):
                continue
            if pixels is None:
                pixels = generate_batch(model, codec, self.plan, batch, self.sampling, self.seed)
                if self.keeps_images:
                    write_images(self.folder / IMAGES, indices, pixels)
            if not is_measured:
                rows = evaluator.measure(pixels.to(model.device), self.plan.labels(batch))
                write_rows(self._part_file(batch), rows)
        model.train(was_training)

    def collect(self) -> Rows:
        """What was measured of all images, in their order. Raises DataError if a batch is missing."""
        found = [read_rows(self._part_file(batch)) for batch in range(self.plan.num_batches)]
        parts = [part for part in found if part is not None]
        if len(parts) < len(found):
            missing = [batch for batch, part in enumerate(found) if part is None]
            raise DataError(
                f"{len(missing)} of {len(found)} batches were not measured (the first is {missing[0]}): do all "
                f"processes see {self.folder}? The same command continues"
            )
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def finish(self) -> None:
        """Leaves the images, if they are kept, and removes everything else."""
        unfinished = self.folder / MEASURES if self.keeps_images else self.folder
        shutil.rmtree(unfinished, ignore_errors=True)

    def _part_file(self, batch: int) -> Path:
        return self.folder / MEASURES / f"{batch:06d}.safetensors"
