"""Rewards by pretrained networks at tiny sizes, with random weights in the files that the real ones come in."""

from __future__ import annotations

import json
import math
import zlib
from pathlib import Path

import numpy as np
import open_clip
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTokenizer

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


def write_clip(folder: Path, preprocess: dict | None = None, **config: object) -> Path:
    """A folder for `local-dir:`: open_clip_config.json and weights that tell images and prompts well apart."""
    folder.mkdir(parents=True, exist_ok=True)
    settings = {"model_cfg": {**CLIP_CONFIG, **config}, "preprocess_cfg": preprocess or {}}
    (folder / "open_clip_config.json").write_text(json.dumps(settings))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = open_clip.CLIP(**settings["model_cfg"])
        _spread(network)
    save_file(network.state_dict(), folder / "open_clip_model.safetensors")
    return folder


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
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = CLIPModel(config)
        _spread(network)
    network.save_pretrained(folder)
    CLIPTokenizer(vocab={token: number for number, token in enumerate(tokens)}, merges=[]).save_pretrained(folder)
    size = {"height": 32, "width": 32}
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=size).save_pretrained(folder)
    return folder


def write_image_reward(folder: Path) -> Path:
    """ImageReward.pt with the tiny weights of rule B (see golden_image_reward/README.md), under the published names."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "ImageReward.pt"
    torch.save({name: _rule_b(name, shape) for name, shape in FIGURES["state_dict"].items()}, path)
    return path


def image_reward_arguments(weights: Path) -> dict[str, str]:
    return {
        "weights": str(weights),
        "med_config": str(GOLDEN / "med_config_tiny.json"),
        "tokenizer": str(GOLDEN / "vocab.txt"),
    }


def _spread(network: torch.nn.Module) -> None:
    """Initial weights are so small that all images score alike; a wrong network would go unnoticed."""
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=1 / math.sqrt(parameter[0].numel()))


def _rule_b(name: str, shape: list[int]) -> Tensor:
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
