"""Our CLIP score against the one that torchmetrics computes with transformers, from one set of weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from marval_rl.rewards.clip import Clip
from marval_rl.rewards.pick_score import PickScore
from open_clip.tokenizer import SimpleTokenizer
from safetensors.torch import load_file
from tiny_rewards import CLIP_CONFIG, golden_image, noise_images, to_tensor, write_clip, write_pick_score
from torch import Tensor
from torchmetrics.functional.multimodal import clip_score
from transformers import AutoTokenizer, CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

PROMPTS = ["a photo of the digit seven", "two red cats", "an umbrella"]
VISION, TEXT = CLIP_CONFIG["vision_cfg"], CLIP_CONFIG["text_cfg"]

# open_clip's name -> transformers'; the rest by RENAMED_PARTS.
RENAMED = {
    "logit_scale": "logit_scale",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
}
RENAMED_PARTS = (
    ("visual.transformer.resblocks.", "vision_model.encoder.layers."),
    ("transformer.resblocks.", "text_model.encoder.layers."),
    ("visual.ln_pre.", "vision_model.pre_layrnorm."),
    ("visual.ln_post.", "vision_model.post_layernorm."),
    ("ln_final.", "text_model.final_layer_norm."),
    (".attn.out_proj.", ".self_attn.out_proj."),
    (".ln_1.", ".layer_norm1."),
    (".ln_2.", ".layer_norm2."),
    (".mlp.c_fc.", ".mlp.fc1."),
    (".mlp.c_proj.", ".mlp.fc2."),
)


def to_transformers(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """open_clip's weights under transformers' names."""
    renamed = {}
    for name, tensor in tensors.items():
        if name in ("text_projection", "visual.proj"):
            renamed["text_projection.weight" if name == "text_projection" else "visual_projection.weight"] = tensor.T
            continue
        new = RENAMED.get(name, name)
        for old_part, new_part in RENAMED_PARTS:
            new = new.replace(old_part, new_part)
        if ".attn.in_proj_" in new:
            for part, chunk in zip("qkv", tensor.chunk(3), strict=True):
                renamed[new.replace(".attn.in_proj_", f".self_attn.{part}_proj.")] = chunk
        else:
            renamed[new] = tensor
    return renamed


def as_transformers_clip(folder: Path) -> CLIPModel:
    def sizes(settings: dict, heads: int) -> dict:
        width = settings["width"]
        return {
            "hidden_size": width,
            "intermediate_size": 4 * width,
            "num_hidden_layers": settings["layers"],
            "num_attention_heads": heads,
            "hidden_act": "gelu",
        }

    heads = VISION["width"] // VISION["head_width"]
    vision = sizes(VISION, heads) | {"image_size": VISION["image_size"], "patch_size": VISION["patch_size"]}
    ends = {"bos_token_id": 49406, "eos_token_id": 49407, "pad_token_id": 49407}
    text = sizes(TEXT, TEXT["heads"]) | {"vocab_size": TEXT["vocab_size"], "max_position_embeddings": 77, **ends}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=CLIP_CONFIG["embed_dim"]))
    model.load_state_dict(to_transformers(load_file(folder / "open_clip_model.safetensors")))
    return model.eval()


class WithPlainFeatures:
    """transformers' CLIP as torchmetrics expects it: the features themselves, as versions before 5 returned them."""

    def __init__(self, model: CLIPModel) -> None:
        self.model = model
        self.config = model.config

    def to(self, device: torch.device) -> WithPlainFeatures:
        return self

    def get_image_features(self, pixel_values: Tensor) -> Tensor:
        return self.model.get_image_features(pixel_values).pooler_output

    def get_text_features(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.model.get_text_features(input_ids, attention_mask).pooler_output


def by_torchmetrics(model: CLIPModel, processor: CLIPProcessor, image: Tensor, prompt: str) -> float:
    """CLIPScore of one image [1, 3, H, W] in 0..1."""
    picture = (image[0] * 255).round().to(torch.uint8)
    with torch.no_grad():
        return float(clip_score(picture, prompt, lambda: (WithPlainFeatures(model), processor)))


def image_processor() -> CLIPImageProcessor:
    size = VISION["image_size"]
    return CLIPImageProcessor(size={"shortest_edge": size}, crop_size={"height": size, "width": size})


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def processor() -> CLIPProcessor:
    """With open_clip's own vocabulary."""
    bundled = SimpleTokenizer()
    merges = sorted(bundled.bpe_ranks, key=bundled.bpe_ranks.get)
    ends = {"bos_token": "<start_of_text>", "eos_token": "<end_of_text>", "pad_token": "<end_of_text>"}
    tokenizer = CLIPTokenizer(vocab=bundled.encoder, merges=merges, unk_token="<end_of_text>", **ends)
    for prompt in PROMPTS:
        ids = bundled([prompt])[0]
        assert tokenizer(prompt)["input_ids"] == ids[ids != 0].tolist()
    return CLIPProcessor(image_processor(), tokenizer)


def test_clip_is_torchmetrics_clip_score(folder, processor):
    reward, model = Clip(f"local-dir:{folder}"), as_transformers_clip(folder)
    images = noise_images(3, 32, 46)  # to be cut, not resized
    found = reward(images=images, prompts=PROMPTS, class_names=PROMPTS)
    expected = [
        by_torchmetrics(model, processor, image.unsqueeze(0), prompt)
        for image, prompt in zip(images, PROMPTS, strict=True)
    ]
    for ours, theirs in zip(found.tolist(), expected, strict=True):
        assert max(ours, 0) == pytest.approx(theirs, abs=1e-4)  # CLIPScore cuts at 0
    assert max(expected) > 5


def test_clip_is_torchmetrics_clip_score_on_pictures_to_be_resized(folder, processor):
    reward, model = Clip(f"local-dir:{folder}"), as_transformers_clip(folder)
    # Cut at even lengths: for odd ones open_clip and transformers differ by a pixel, and we do as open_clip does.
    for image in (to_tensor(golden_image(0)), noise_images(1, 64, 96), noise_images(1, 20, 20)):
        for prompt in PROMPTS:
            ours = float(reward(images=image, prompts=[prompt], class_names=[prompt]))
            assert max(ours, 0) == pytest.approx(by_torchmetrics(model, processor, image, prompt), abs=0.3)


def test_pick_score_is_torchmetrics_clip_score_on_another_scale(tmp_path):
    folder = write_pick_score(tmp_path)
    reward, model = PickScore(str(folder), str(folder)), CLIPModel.from_pretrained(folder).eval()
    processor = CLIPProcessor(image_processor(), AutoTokenizer.from_pretrained(folder))
    images, prompts = noise_images(3, 32, 46), ["two", "red cats", "an"]
    found = reward(images=images, prompts=prompts) * 100 / reward.scale
    expected = [
        by_torchmetrics(model, processor, image.unsqueeze(0), prompt)
        for image, prompt in zip(images, prompts, strict=True)
    ]
    for ours, theirs in zip(found.tolist(), expected, strict=True):
        assert max(ours, 0) == pytest.approx(theirs, abs=1e-3)
    assert max(expected) > 5
