"""Reward: LAION's aesthetic predictor, which guesses from CLIP's embedding how people would rate an image, 1 to 10."""

from __future__ import annotations

import os
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from marval_rl.errors import CheckpointError

from .clip import SCHEMAS, load_clip
from .network_reward import NetworkReward, score_head
from .sharing import network_on
from .weights import load_strictly, read_tensors

PREFIX = "layers."  # of every name in the published file


class Aesthetic(NetworkReward):
    """How beautiful people would find the image, whatever its prompt: about 1 to 10, photographs around 5.

    Args:
        weights: The published sac+logos+ava1-l14-linearMSE.pth: five linear layers on CLIP's embedding.
        model: The CLIP they were trained on, as for `clip`: OpenAI's ViT-L-14, which wants QuickGELU.
        pretrained: Its weights, as for `clip`; None for OpenAI's.
        dtype, micro_batch_size, compile: As in `NetworkReward`; the layers on top are float32.

    A `clip` with the same model, weights and dtype shares the network.

    Raises:
        RewardError: Without open_clip.
        ValueError: For invalid arguments.
        CheckpointError: For a file that is missing, cannot be read or does not fit.
    """

    def __init__(
        self,
        weights: str | os.PathLike,
        model: str = "ViT-L-14-quickgelu",
        pretrained: str | None = None,
        dtype: str = "float32",
        micro_batch_size: int | None = None,
        compile: bool = False,
    ) -> None:
        tensors = _read_head(Path(weights))
        if pretrained is None and not model.startswith(SCHEMAS):
            pretrained = "openai"
        network, tokenizer, preprocessing = load_clip(model, pretrained, dtype)
        super().__init__(network, preprocessing, dtype, micro_batch_size, compile)
        with torch.no_grad():  # embeddings of texts are as wide as those of images, and faster to compute
            width = network.encode_text(tokenizer([""]).to(next(network.parameters()).device)).shape[1]
        self.head = score_head(width).eval().requires_grad_(False)
        load_strictly(self.head, tensors, f"{weights} (for CLIP embeddings of {width} numbers)")

    def __call__(self, *, images: Tensor, **columns: object) -> Tensor:
        """Score images [B, 3, H, W] in 0..1 -> float32 [B]."""
        return self.score_in_portions(images, range(len(images)))

    def score(self, images: Tensor, targets: range) -> Tensor:
        embeddings = F.normalize(self.network.encode_image(self.pixels(images)).to(images.dtype), dim=1)
        return self.head(embeddings).squeeze(1)

    def compiled_part(self) -> nn.Module:
        return self.network.visual

    def _move_to(self, device: torch.device) -> None:
        super()._move_to(device)
        self.head = network_on(self.head, device)


def _read_head(weights: Path) -> dict[str, Tensor]:
    if not weights.is_file():
        raise CheckpointError(
            f"the aesthetic predictor's weights {str(weights)!r} do not exist; download "
            "sac+logos+ava1-l14-linearMSE.pth (christophschuhmann/improved-aesthetic-predictor) and give its path"
        )
    return {name.removeprefix(PREFIX): tensor for name, tensor in read_tensors(weights).items()}
