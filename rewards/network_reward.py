"""What the rewards by pretrained networks share: frozen weights, devices, dtypes, micro-batches, and the cosine."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .preprocessing import Preprocessing
from .sharing import network_on

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
KEPT_PROMPTS = 10_000


class NetworkReward(ABC):
    """A differentiable reward by a frozen network in evaluation mode, which follows the images to their device.

    Args:
        network: The pretrained network; where others share it (`sharing`), all use one dtype.
        preprocessing: Images in 0..1 of any size -> what the network takes.
        dtype: Of the weights and activations, "float32" or "bfloat16". Scores are float32 either way, and autocast is
            left aside: this argument alone decides.
        micro_batch_size: Images at a time; None for all. With gradients each portion is computed again in the backward
            pass, so that only one portion's activations are ever kept.
        compile: `torch.compile` the network when images first come to its device: slow at first, then faster on a GPU.

    Raises:
        ValueError: For another dtype or a micro_batch_size below 1.
    """

    differentiable = True

    def __init__(
        self,
        network: nn.Module,
        preprocessing: Preprocessing,
        dtype: str,
        micro_batch_size: int | None,
        compile: bool,
    ) -> None:
        if dtype not in DTYPES:
            raise ValueError(f"unknown dtype {dtype!r}; known: {', '.join(DTYPES)}")
        if micro_batch_size is not None and micro_batch_size < 1:
            raise ValueError(f"micro_batch_size must be at least 1 (or null for all at once), not {micro_batch_size}")
        self.dtype = DTYPES[dtype]
        self.micro_batch_size = micro_batch_size
        self.compile = compile
        self._compiled: nn.Module | None = None
        self._has_cut = False
        self.preprocessing = preprocessing
        self.network = network.to(self.dtype).eval().requires_grad_(False)

    def __call__(self, *, images: Tensor, prompts: list[str], **columns: object) -> Tensor:
        """Score images [B, 3, H, W] in 0..1 against prompts (length B) -> float32 [B]."""
        return self.score_in_portions(images, prompts)

    def score_in_portions(self, images: Tensor, targets: Sequence[Any] | Tensor) -> Tensor:
        """Images [B, 3, H, W] in 0..1 and what each is scored against (length B) -> float32 [B]."""
        self._move_to(images.device)
        images = images.float()
        size = self.micro_batch_size or len(images)
        with torch.autocast(images.device.type, enabled=False):
            if size >= len(images):
                return self.score(images, targets).float()
            portions = [
                self._score_portion(images[start : start + size], targets[start : start + size])
                for start in range(0, len(images), size)
            ]
        return torch.cat(portions).float()

    @abstractmethod
    def score(self, images: Tensor, targets: Any) -> Tensor:
        """Images [B, 3, H, W] in 0..1 and targets, such as prompts (length B) -> [B] in the images' dtype and place."""

    def pixels(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] in 0..1 -> the network's input [B, 3, size, size], in its dtype."""
        return self.preprocessing(images).to(self.dtype)

    def note_cut(self, prompt: str, num_tokens: int) -> None:
        """Warn, the first time only, that the network reads the beginning of a prompt alone: its first `num_tokens`."""
        if not self._has_cut:
            self._has_cut = True
            warnings.warn(
                f"{type(self).__name__} reads {num_tokens} tokens of a prompt: the end of {prompt!r} counts for "
                "nothing, as may be true of others",
                stacklevel=2,
            )

    def _score_portion(self, images: Tensor, targets: Sequence[Any] | Tensor) -> Tensor:
        if not images.requires_grad:
            return self.score(images, targets)
        return checkpoint(self.score, images, targets, use_reentrant=False, preserve_rng_state=False)

    def compiled_part(self) -> nn.Module:
        """The part of the network that is worth compiling: what sees each image."""
        return self.network

    def _move_to(self, device: torch.device) -> None:
        self.network = network_on(self.network, device)
        if self.compile and self._compiled is not self.network:
            self.compiled_part().compile()  # in place: rewards that share the network gain too
            self._compiled = self.network


class CosineReward(NetworkReward):
    """scale x cosine between the embeddings of an image and its prompt, as CLIP and its descendants have it.

    The embedding of a prompt is computed once; the latest 10,000 prompts are kept. Arguments as `NetworkReward`'s, with
    `scale`, the factor of the cosine.
    """

    def __init__(
        self,
        network: nn.Module,
        preprocessing: Preprocessing,
        scale: float,
        dtype: str,
        micro_batch_size: int | None,
        compile: bool,
    ) -> None:
        super().__init__(network, preprocessing, dtype, micro_batch_size, compile)
        self.scale = scale
        self._prompt_embeddings: dict[str, Tensor] = {}

    @abstractmethod
    def embed_images(self, pixels: Tensor) -> Tensor:
        """Normalised pixels [B, 3, size, size] -> embeddings [B, D] of any length."""

    @abstractmethod
    def embed_prompt(self, prompt: str, device: torch.device) -> Tensor:
        """One prompt -> its embedding [1, D] of any length."""

    def features(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] in 0..1 -> their embeddings [B, D]: a space to compare images in."""
        self._move_to(images.device)
        with torch.autocast(images.device.type, enabled=False):
            return self.embed_images(self.pixels(images.float())).float()

    def score(self, images: Tensor, prompts: list[str]) -> Tensor:
        image_embeddings = F.normalize(self.embed_images(self.pixels(images)).to(images.dtype), dim=1)
        return self.scale * (image_embeddings * self._embed_prompts(prompts).to(images)).sum(dim=1)

    def _embed_prompts(self, prompts: list[str]) -> Tensor:
        """Embeddings of length 1, [B, D].

        Each is computed by itself, so that its bits do not depend on which prompts came with it: a resumed run meets
        them in another order.
        """
        device = next(self.network.parameters()).device
        kept = self._prompt_embeddings
        for prompt in prompts:
            if prompt not in kept or kept[prompt].device != device:
                with torch.no_grad():
                    embedding = self.embed_prompt(prompt, device).squeeze(0)
                    kept[prompt] = F.normalize(embedding.to(torch.promote_types(self.dtype, torch.float32)), dim=0)
        embeddings = torch.stack([kept[prompt] for prompt in prompts])  # a copy: kept ones may be of inference mode
        while len(kept) > KEPT_PROMPTS:
            del kept[next(iter(kept))]  # the oldest
        return embeddings


def score_head(width: int) -> nn.Sequential:
    """The head of ImageReward and of the aesthetic predictor: embeddings [B, width] -> scores [B, 1].

    No activation between the layers, as published; an Identity where the published head has dropout, for its numbering.
    """
    return nn.Sequential(
        nn.Linear(width, 1024), nn.Identity(),
        nn.Linear(1024, 128), nn.Identity(),
        nn.Linear(128, 64), nn.Identity(),
        nn.Linear(64, 16),
        nn.Linear(16, 1),
    )  # fmt: skip
