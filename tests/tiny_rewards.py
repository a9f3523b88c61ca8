"""Rewards by pretrained networks at tiny sizes, with random weights in the files that the real ones come in."""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import open_clip
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import (
    BaseImageProcessor,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPTokenizer,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
)

GOLDEN = Path(__file__).parent / "golden_image_reward"
FIGURES = json.loads((GOLDEN / "figures_tiny.json").read_text())

CLIP_CONFIG = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 4, "layers": 2},
}


def golden_image(number: int) -> Image.Image:
    return Image.open(GOLDEN / f"image{number}.png")


def to_tensor(image: Image.Image) -> Tensor:
    """A picture -> [1, 3, H, W] in 0..1."""
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).unsqueeze(0).float() / 255


def noise_images(count: int, height: int, width: int) -> Tensor:
    """Smooth random images [count, 3, height, width] of whole bytes, far enough from 0 and 1 for any resize."""
    coarse = torch.rand(count, 3, 4, 4, generator=torch.Generator().manual_seed(5))
    images = torch.nn.functional.interpolate(coarse, size=(height, width), mode="bilinear")
    return ((0.1 + 0.8 * images) * 255).round() / 255


def to_pictures(images: Tensor) -> list[Image.Image]:
    pixels = (images * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    return [Image.fromarray(picture) for picture in pixels]


def by_open_clip(folder: Path, pictures: list[Image.Image], prompts: list[str]) -> tuple[Tensor, Tensor]:
    """The pixels and the cosines by open_clip itself, from pictures to scores."""
    model, preprocess = open_clip.create_model_from_pretrained(f"local-dir:{folder}")
    pixels = torch.stack([preprocess(picture) for picture in pictures])
    with torch.no_grad():
        images = model.eval().encode_image(pixels, normalize=True)
        texts = model.encode_text(open_clip.get_tokenizer(f"local-dir:{folder}")(prompts), normalize=True)
    return pixels, (images * texts).sum(dim=1)


def write_clip(folder: Path, preprocess: dict | None = None, **config: object) -> Path:
    """A folder for `local-dir:`: open_clip_config.json and weights that tell images and prompts well apart."""
    folder.mkdir(parents=True, exist_ok=True)
    settings = {"model_cfg": {**CLIP_CONFIG, **config}, "preprocess_cfg": preprocess or {}}
    (folder / "open_clip_config.json").write_text(json.dumps(settings))
    save_file(_random(lambda: open_clip.CLIP(**settings["model_cfg"])), folder / "open_clip_model.safetensors")
    return folder


def write_hps(folder: Path) -> Path:
    """HPS_v2_compressed.pt in its published form, a state_dict of parallel training, with CLIP_CONFIG's sizes."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "HPS_v2_compressed.pt"
    tensors = _random(lambda: open_clip.CLIP(**CLIP_CONFIG))
    torch.save({"state_dict": {f"module.{name}": tensor for name, tensor in tensors.items()}}, path)
    return path


def write_aesthetic(folder: Path, width: int = CLIP_CONFIG["embed_dim"]) -> Path:
    """sac+logos+ava1-l14-linearMSE.pth under the published names, for embeddings of this width."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "sac+logos+ava1-l14-linearMSE.pth"
    generator, sizes = torch.Generator().manual_seed(1), (width, 1024, 128, 64, 16, 1)
    tensors = {}
    for number, before, after in zip((0, 2, 4, 6, 7), sizes, sizes[1:], strict=False):
        tensors[f"layers.{number}.weight"] = torch.randn(after, before, generator=generator) / math.sqrt(before)
        tensors[f"layers.{number}.bias"] = torch.randn(after, generator=generator)
    torch.save(tensors, path)
    return path


CLASS_NAMES = ["tench, Tinca tinca", "crane", "tabby, tabby cat", "tiger cat", "crane"]
TIMM_NAME = "test_resnet.r160_in1k"


def write_classifier(folder: Path, processor: BaseImageProcessor | None = None) -> Path:
    """A transformers image classifier of five classes for 32 pixels, with its image processor."""
    config = ViTConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=32,
        patch_size=8,
        id2label=dict(enumerate(CLASS_NAMES)),
    )
    network = ViTForImageClassification(config)
    network.load_state_dict(_random(lambda: ViTForImageClassification(config)))
    network.save_pretrained(folder)
    (processor or ViTImageProcessor(size={"height": 32, "width": 32})).save_pretrained(folder)
    return folder


def write_timm_classifier(folder: Path, num_classes: int = 5) -> Path:
    """The weights of timm's TIMM_NAME as timm saves them."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "model.safetensors"
    save_file(_random(lambda: timm.create_model(TIMM_NAME, num_classes=num_classes)), path)
    return path


def write_pick_score(folder: Path) -> Path:
    """A transformers CLIPModel with its tokenizer (letters) and its image processor, all in one folder."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    tokens = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = {"vocab_size": len(tokens), "max_position_embeddings": 16, "bos_token_id": 0, "eos_token_id": 1}
    config = CLIPConfig(
        text_config={**sizes, **text, "pad_token_id": 1},
        vision_config={**sizes, "image_size": 32, "patch_size": 8},
        projection_dim=16,
    )
    network = CLIPModel(config)
    network.load_state_dict(_random(lambda: CLIPModel(config)))
    network.save_pretrained(folder)
    CLIPTokenizer(vocab={token: number for number, token in enumerate(tokens)}, merges=[]).save_pretrained(folder)
    size = {"height": 32, "width": 32}
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=size).save_pretrained(folder)
    return folder


def write_image_reward(folder: Path) -> Path:
    """ImageReward.pt with the tiny weights of rule B (see golden_image_reward/README.md), under the published names."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "ImageReward.pt"
    torch.save({name: rule_b(name, shape) for name, shape in FIGURES["state_dict"].items()}, path)
    return path


def image_reward_arguments(weights: Path) -> dict[str, str]:
    return {
        "weights": str(weights),
        "med_config": str(GOLDEN / "med_config_tiny.json"),
        "tokenizer": str(GOLDEN / "vocab.txt"),
    }


def _random(make: Callable[[], nn.Module]) -> dict[str, Tensor]:
    """Weights for a network, the same ones each time.

    Initial weights are so small that all images score alike; a wrong network would go unnoticed.
    """
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        network = make()
        for parameter in network.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=1 / math.sqrt(parameter[0].numel()))
    return network.state_dict()


def rule_b(name: str, shape: list[int]) -> Tensor:
    if name.endswith("position_ids"):
        return torch.arange(shape[1]).unsqueeze(0)
    values = torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))
    if len(shape) == 1:
        values = values * 0.02
    elif any(part in name for part in ("embeddings", "pos_embed", "cls_token")):
        values = values * 0.5
    else:
        values = values / math.sqrt(math.prod(shape[1:]))
    norms = (".norm.weight", ".norm1.weight", ".norm2.weight", ".LayerNorm.weight")
    return values + 1 if name.endswith(norms) else values
