"""Reward: PickScore (arXiv 2305.01569), CLIP-H that was trained on which of two images people picked."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, CLIPImageProcessor, CLIPModel

from .network_reward import CosineReward
from .preprocessing import Preprocessing
from .sharing import shared_network, weights_identity
from .weights import check_exists_if_local, load_pretrained, loading


class PickScore(CosineReward):
    """Which of two images people would pick for the prompt: exp(logit scale) x cosine, about 18 to 24.

    Args:
        model: Folder or hub id of a transformers CLIPModel, as safetensors.
        processor: Folder or hub id of its tokenizer and image processor; the default is the authors' own choice.
        dtype, micro_batch_size, compile: As in `NetworkReward`.

    Raises:
        CheckpointError: For files that are missing or cannot be loaded.
        ValueError: For a processor that does not fit.
    """

    def __init__(
        self,
        model: str = "yuvalkirstain/PickScore_v1",
        processor: str = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
        dtype: str = "float32",
        micro_batch_size: int | None = None,
        compile: bool = False,
    ) -> None:
        check_exists_if_local("the model", model)
        check_exists_if_local("the processor", processor)
        preprocessing = _load_preprocessing(processor)
        with loading(f"the tokenizer of {processor}"):
            self.tokenizer = AutoTokenizer.from_pretrained(processor)
        source = ("transformers.CLIPModel", weights_identity(model), dtype)
        network = shared_network(source, lambda: load_pretrained(CLIPModel, model, "CLIPModel"))
        self.max_tokens = network.config.text_config.max_position_embeddings
        image_size = network.config.vision_config.image_size
        if preprocessing.size != image_size:
            raise ValueError(
                f"the processor {processor} makes images of {preprocessing.size} pixels, but {model} takes "
                f"{image_size}: choose the processor that belongs to the model"
            )
        scale = float(network.logit_scale.detach().exp())
        super().__init__(network, preprocessing, scale, dtype, micro_batch_size, compile)

    def compiled_part(self) -> nn.Module:
        return self.network.vision_model

    def embed_images(self, pixels: Tensor) -> Tensor:
        return self.network.get_image_features(pixel_values=pixels).pooler_output

    def embed_prompt(self, prompt: str, device: torch.device) -> Tensor:
        if len(self.tokenizer(prompt, truncation=False)["input_ids"]) > self.max_tokens:
            self.note_cut(prompt, self.max_tokens)
        tokens = self.tokenizer([prompt], truncation=True, max_length=self.max_tokens, return_tensors="pt").to(device)
        return self.network.get_text_features(
            input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]
        ).pooler_output


def _load_preprocessing(processor: str) -> Preprocessing:
    with loading(f"the image processor of {processor}"):
        settings = CLIPImageProcessor.from_pretrained(processor)
    return Preprocessing(
        size=settings.crop_size["height"],
        mean=tuple(settings.image_mean),
        std=tuple(settings.image_std),
        crop_start=int,
    )
