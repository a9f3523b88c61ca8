"""Reward: ImageReward by its authors' package, image-reward, in the environment that the package needs."""

from __future__ import annotations

import os
from pathlib import Path

import ImageReward
import torch
from ImageReward.models.BLIP import blip
from PIL import Image
from torch import Tensor


class PackageImageReward:
    """How much people would like the image for its prompt (arXiv 2304.05977), as `ImageReward.load(...).score` says.

    weights     the published ImageReward.pt
    med_config  the published med_config.json
    tokenizer   a folder with bert-base-uncased's vocab.txt; None takes it from the hub, as the package does

    Raises ValueError for a file that is missing.
    """

    differentiable = False

    def __init__(
        self, weights: str | os.PathLike, med_config: str | os.PathLike, tokenizer: str | os.PathLike | None = None
    ) -> None:
        for path in (weights, med_config, tokenizer):
            if path is not None and not Path(path).exists():
                raise ValueError(f"{str(path)!r} does not exist")
        if tokenizer is not None:
            _take_tokenizer_from(str(tokenizer))
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model = ImageReward.load(str(weights), device=device, med_config=str(med_config))

    def __call__(self, *, images: Tensor, prompts: list[str], **columns: object) -> list[float]:
        pixels = (images * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
        pictures = [Image.fromarray(picture) for picture in pixels]
        with torch.inference_mode():
            return [self.model.score(prompt, picture) for prompt, picture in zip(prompts, pictures, strict=True)]


def _take_tokenizer_from(folder: str) -> None:
    """The package asks the hub by a name of its own and has no argument for a file."""
    original = blip.BertTokenizer.from_pretrained
    blip.BertTokenizer.from_pretrained = lambda name, *args, **kwargs: original(folder, *args, **kwargs)
