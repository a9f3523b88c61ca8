"""Reward: HPS v2 (arXiv 2306.09341), CLIP-H that was trained on which of two generated images people prefer."""

from __future__ import annotations

import os
from pathlib import Path

import torch.nn.functional as F
from torch import Tensor

from marval_rl.errors import CheckpointError

from .clip import Clip
from .preprocessing import Preprocessing, resize

MODEL = "ViT-H-14"


class Hps(Clip):
    """How much people prefer the image for its prompt, by HPS v2 or v2.1: scale x cosine, about 0.2 to 0.35.

    Args:
        weights: The published HPS_v2_compressed.pt or HPS_v2.1_compressed.pt (or the tensors as .safetensors).
        prompt_template: As for `clip`; None uses the prompts.
        scale: 1 as the authors' `hpsv2.score`, 100 as their benchmark's tables.
        dtype, micro_batch_size, compile: As in `NetworkReward`.

    Raises:
        RewardError: Without open_clip.
        CheckpointError: For a file that is missing, cannot be read or does not fit.
    """

    def __init__(
        self,
        weights: str | os.PathLike,
        prompt_template: str | None = None,
        scale: float = 1.0,
        dtype: str = "float32",
        micro_batch_size: int | None = None,
        compile: bool = False,
    ) -> None:
        if not Path(weights).is_file():
            raise CheckpointError(
                f"HPS's weights {str(weights)!r} do not exist; download HPS_v2_compressed.pt or "
                "HPS_v2.1_compressed.pt from the hub (xswu/HPSv2) and give its path"
            )
        super().__init__(MODEL, str(weights), prompt_template, scale, dtype, micro_batch_size, compile)
        self.preprocessing = PaddedPreprocessing(self.preprocessing.size)


class PaddedPreprocessing(Preprocessing):
    """The whole image, its long side resized to `size` and the rest of the square black, as HPS was trained."""

    def __call__(self, images: Tensor) -> Tensor:
        height, width = images.shape[-2:]
        scale = self.size / max(height, width)
        pixels = resize(images, max(1, round(height * scale)), max(1, round(width * scale)), self.filter)
        above, left = ((self.size - length) // 2 for length in pixels.shape[-2:])
        below, right = self.size - pixels.shape[-2] - above, self.size - pixels.shape[-1] - left
        return super().__call__(F.pad(pixels, (left, right, above, below)))
