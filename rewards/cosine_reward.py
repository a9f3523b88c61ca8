"""The rewards of the CLIP family: how well the embedding of an image agrees with that of its prompt."""

from __future__ import annotations

from abc import abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .network_reward import NetworkReward
from .preprocessing import Preprocessing

KEPT_PROMPTS = 10_000


class CosineReward(NetworkReward):
    """scale x cosine between the embeddings of an image and its prompt, as CLIP and its descendants have it.

    The embedding of a prompt is computed once; the latest 10,000 prompts are kept. Arguments as `NetworkReward`'s,
    and
    scale   what the cosine is multiplied with
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
