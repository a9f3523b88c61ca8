"""Sends the sample grids of each evaluation to the trackers of `report_to`, whose figures transformers sends itself."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from transformers import TrainerCallback
from transformers.integrations import TensorBoardCallback, TrackioCallback, WandbCallback
from transformers.trainer_callback import TrainerControl, TrainerState


class SampleGridCallback(TrainerCallback):
    """Images appear under the name `samples`, those of the grid NAME_step_*.png under `samples/NAME`.

    Args:
        folder: Where the grids are written, step_000040.png and so on.
        callbacks: Returns the callbacks of the trainer.
    """

    def __init__(self, folder: Path, callbacks: Callable[[], Iterable[TrainerCallback]]):
        self.folder = folder
        self.callbacks = callbacks

    def on_evaluate(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if not state.is_world_process_zero:
            return
        ending = f"step_{state.global_step:06d}.png"
        for file in sorted(self.folder.glob(f"*{ending}")):
            name = "/".join(["samples", *filter(None, [file.name.removesuffix(ending).strip("_")])])
            for callback in self.callbacks():
                if isinstance(callback, TensorBoardCallback) and callback.tb_writer is not None:
                    grid = np.asarray(Image.open(file).convert("RGB"))
                    callback.tb_writer.add_image(name, grid, state.global_step, dataformats="HWC")
                elif isinstance(callback, TrackioCallback):
                    trackio = sys.modules["trackio"]  # which the callback has imported and initialised
                    trackio.log({name: trackio.Image(file), "train/global_step": state.global_step})
                elif isinstance(callback, WandbCallback):
                    wandb = sys.modules["wandb"]
                    wandb.log({name: wandb.Image(str(file)), "train/global_step": state.global_step})
