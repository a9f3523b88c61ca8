"""ImageReward's network (arXiv 2304.05977) out of transformers' BLIP blocks, with the published weights' names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from transformers import BlipTextConfig, BlipVisionConfig
from transformers.models.blip.modeling_blip import BlipVisionModel
from transformers.models.blip.modeling_blip_text import BlipTextModel

from marval_rl.errors import CheckpointError

# Scores are standardised by these, measured by the authors on their data.
SCORE_MEAN = 0.16717362830052426
SCORE_STD = 1.0333394966054072

VISION_HEADS = 16  # of ViT-L; the one size that no shape of the weights tells

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


class ImageRewardNetwork(nn.Module):
    """A ViT reads the image, a BERT that attends to it reads the prompt, and five linear layers score its [CLS].

    vision, text  the two configurations, as `network_configs` makes them
    """

    def __init__(self, vision: BlipVisionConfig, text: BlipTextConfig) -> None:
        super().__init__()
        self.vision = BlipVisionModel(vision)
        self.text = BlipTextModel(text, add_pooling_layer=False)
        self.head = nn.Sequential(  # no activation; an Identity where the published head has dropout, for its numbering
            nn.Linear(text.hidden_size, 1024), nn.Identity(),
            nn.Linear(1024, 128), nn.Identity(),
            nn.Linear(128, 64), nn.Identity(),
            nn.Linear(64, 16),
            nn.Linear(16, 1),
        )  # fmt: skip

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
    """The two configurations for renamed weights: the ViT's sizes are read off their shapes.

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
