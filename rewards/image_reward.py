"""Reward: ImageReward (arXiv 2304.05977), trained on people's preferences between generated images."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BertTokenizer, BlipTextConfig, BlipVisionConfig
from transformers.models.blip.modeling_blip import BlipVisionModel
from transformers.models.blip.modeling_blip_text import BlipTextModel

from marval_rl.errors import CheckpointError, first_line

from .network_reward import NetworkReward, score_head
from .preprocessing import Preprocessing
from .sharing import shared_network, weights_identity
from .weights import check_exists_if_local, load_strictly, loading, read_tensors

MAX_TOKENS = 35
MARKERS = 2  # [DEC] and [ENC], which the published model appends to BERT's vocabulary and never uses here

# Scores are standardised by these, measured by the authors on their data.
SCORE_MEAN = 0.16717362830052426
SCORE_STD = 1.0333394966054072

VISION_HEADS = 16  # of ViT-L; the one size that the weights' shapes do not give

# The text half of the published med_config.json.
MED_CONFIG = {
    "hidden_act": "gelu",
    "hidden_size": 768,
    "intermediate_size": 3072,
    "layer_norm_eps": 1e-12,
    "max_position_embeddings": 512,
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "pad_token_id": 0,
    "vocab_size": 30524,
}

# Published name -> ours, each rule applied in turn.
RENAMED = (
    ("mlp.layers.", "head."),
    ("blip.text_encoder.", "text."),
    ("blip.visual_encoder.cls_token", "vision.embeddings.class_embedding"),
    ("blip.visual_encoder.pos_embed", "vision.embeddings.position_embedding"),
    ("blip.visual_encoder.patch_embed.proj.", "vision.embeddings.patch_embedding."),
    ("blip.visual_encoder.norm.", "vision.post_layernorm."),
    ("blip.visual_encoder.blocks.", "vision.encoder.layers."),
    (".attn.qkv.", ".self_attn.qkv."),
    (".attn.proj.", ".self_attn.projection."),
    (".norm1.", ".layer_norm1."),
    (".norm2.", ".layer_norm2."),
)
# BLIP's contrastive projections and a buffer, which the score does not need.
UNUSED = ("blip.vision_proj.", "blip.text_proj.", "blip.text_encoder.embeddings.position_ids")


class ImageReward(NetworkReward):
    """How much people would like the image for its prompt, by ImageReward; about -2 to 2, 0 is average.

    Args:
        weights: The published ImageReward.pt (or the same tensors as .safetensors).
        med_config: The published med_config.json; None has the same settings built in.
        tokenizer: BERT's lower-case vocabulary: vocab.txt, a folder, or a hub id.
        dtype, micro_batch_size, compile: As in `NetworkReward`; in bfloat16 scores move by about 0.01.

    The published weights run in transformers' BLIP blocks, without the package image-reward and its old pins. Prompts
    are cut after 35 tokens, as there.

    Raises:
        CheckpointError: For a file that is missing, cannot be read or does not fit.
    """

    def __init__(
        self,
        weights: str | os.PathLike,
        med_config: str | os.PathLike | None = None,
        tokenizer: str = "bert-base-uncased",
        dtype: str = "float32",
        micro_batch_size: int | None = None,
        compile: bool = False,
    ) -> None:
        settings = MED_CONFIG if med_config is None else _read_med_config(Path(med_config))
        self.tokenizer = _load_tokenizer(str(tokenizer), settings["vocab_size"])
        source = ("ImageReward", weights_identity(str(weights)), json.dumps(settings, sort_keys=True), dtype)
        network = shared_network(source, lambda: _load_network(Path(weights), settings))
        preprocessing = Preprocessing(network.vision.config.image_size)
        super().__init__(network, preprocessing, dtype, micro_batch_size, compile)

    def score(self, images: Tensor, prompts: list[str]) -> Tensor:
        input_ids, attention_mask = (tokens.to(images.device) for tokens in self.tokenize(prompts))
        raw = self.network(self.pixels(images), input_ids, attention_mask).to(images.dtype)
        return (raw - SCORE_MEAN) / SCORE_STD

    def tokenize(self, prompts: list[str]) -> tuple[Tensor, Tensor]:
        """Prompts (length B) -> token ids [B, 35] from [CLS] to [SEP], then zeros, and their mask [B, 35]."""
        for prompt, whole in zip(prompts, self.tokenizer(prompts, truncation=False)["input_ids"], strict=True):
            if len(whole) > MAX_TOKENS:
                self.note_cut(prompt, MAX_TOKENS)
        tokens = self.tokenizer(
            prompts, padding="max_length", truncation=True, max_length=MAX_TOKENS, return_tensors="pt"
        )
        return tokens["input_ids"], tokens["attention_mask"]


class ImageRewardNetwork(nn.Module):
    """A ViT reads the image, a BERT that attends to it reads the prompt, and five linear layers score its [CLS].

    Args:
        vision, text: The two configurations, as `network_configs` makes them.
    """

    def __init__(self, vision: BlipVisionConfig, text: BlipTextConfig) -> None:
        super().__init__()
        self.vision = BlipVisionModel(vision)
        self.text = BlipTextModel(text, add_pooling_layer=False)
        self.head = score_head(text.hidden_size)

    def forward(self, pixels: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Normalised pixels [B, 3, S, S], token ids [B, T] and their mask [B, T] -> scores [B], not standardised."""
        image_tokens = self.vision(pixels).last_hidden_state  # [B, L, D], all of them after the last norm
        states = self.text(
            input_ids=input_ids,
            attention_mask=attention_mask,
            encoder_hidden_states=image_tokens,
            is_decoder=False,  # not causal; the configuration says True, or no cross attention would be built
        ).last_hidden_state
        return self.head(states[:, 0]).squeeze(1)


def rename_weights(published: Mapping[str, Any]) -> dict[str, Any]:
    """Published names -> names in `ImageRewardNetwork`; those that the score does not use are left out."""
    renamed = {}
    for name, value in published.items():
        if name.startswith(UNUSED):
            continue
        for old, new in RENAMED:
            name = name.replace(old, new)
        renamed[name] = value
    return renamed


def network_configs(
    tensors: Mapping[str, Tensor], med_config: Mapping[str, Any], source: object
) -> tuple[BlipVisionConfig, BlipTextConfig]:
    """The two configurations for renamed weights: the ViT's sizes come from their shapes.

    med_config has at least the keys of MED_CONFIG. Raises CheckpointError if the weights are not ImageReward's.
    """
    try:
        width, _, patch_size, _ = tensors["vision.embeddings.patch_embedding.weight"].shape
        num_patches = tensors["vision.embeddings.position_embedding"].shape[1] - 1
        intermediate_size = tensors["vision.encoder.layers.0.mlp.fc1.weight"].shape[0]
    except (KeyError, ValueError) as error:
        raise CheckpointError(
            f"{source} does not hold ImageReward's weights ({error}); the file is called ImageReward.pt"
        ) from error
    layers = {name.split(".")[3] for name in tensors if name.startswith("vision.encoder.layers.")}
    vision = BlipVisionConfig(
        hidden_size=width,
        intermediate_size=intermediate_size,
        num_hidden_layers=len(layers),
        num_attention_heads=VISION_HEADS,
        image_size=patch_size * round(num_patches**0.5),
        patch_size=patch_size,
        layer_norm_eps=1e-6,
    )
    text = BlipTextConfig(
        **{name: med_config[name] for name in MED_CONFIG},
        encoder_hidden_size=width,  # med_config's encoder_width is another model's
        is_decoder=True,
    )
    return vision, text


def _load_network(weights: Path, med_config: dict) -> ImageRewardNetwork:
    if not weights.is_file():
        raise CheckpointError(
            f"ImageReward's weights {str(weights)!r} do not exist; download ImageReward.pt from the hub "
            "(THUDM/ImageReward) and give its path"
        )
    tensors = rename_weights(read_tensors(weights))
    configs = network_configs(tensors, med_config, weights)
    with torch.random.fork_rng(devices=[]):  # weights are drawn before they are loaded
        network = ImageRewardNetwork(*configs)
    load_strictly(network, tensors, weights)
    return network


def _read_med_config(path: Path) -> dict:
    try:
        settings = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"med_config {str(path)!r} cannot be read: {first_line(error)}") from error
    missing = MED_CONFIG.keys() - set(settings)
    if missing:
        raise CheckpointError(
            f"med_config {str(path)!r} is not a med_config.json: {', '.join(sorted(missing))} missing"
        )
    return settings


def _load_tokenizer(name_or_path: str, vocab_size: int) -> BertTokenizer:
    check_exists_if_local("the tokenizer", name_or_path)
    if Path(name_or_path).is_file():
        with open(name_or_path, encoding="utf-8-sig") as lines:
            vocabulary = {line.rstrip("\n"): number for number, line in enumerate(lines)}
        tokenizer = BertTokenizer(vocab=vocabulary, do_lower_case=True)
    else:
        with loading(f"the tokenizer {name_or_path!r}", "; give the path of bert-base-uncased's vocab.txt"):
            tokenizer = BertTokenizer.from_pretrained(name_or_path)
    if len(tokenizer) + MARKERS != vocab_size:
        raise CheckpointError(
            f"the tokenizer {name_or_path!r} has {len(tokenizer)} tokens, but the network's vocabulary of {vocab_size} "
            f"needs {vocab_size - MARKERS}; give bert-base-uncased's vocab.txt"
        )
    return tokenizer
