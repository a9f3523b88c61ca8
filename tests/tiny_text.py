"""A tiny MaskGen, its prompts and its tokenizer, for tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from marval_rl.models.maskgen.config import MaskGenConfig
from marval_rl.models.maskgen.model import MaskGenModel
from marval_rl.models.maskgen.prompts import PromptFeatures
from marval_rl.models.maskgen.tatitok import TATiTokConfig, TATiTokModel

PROMPTS = ("a red square", "a blue square", "two squares")
SIZES = {
    "image_size": 16,
    "num_tokens": 8,
    "latent_channels": 4,
    "text_width": 16,
    "text_length": 6,
    "micro_condition_size": 8,
    "hidden_size": 32,
    "num_layers": 2,
    "num_heads": 4,
    "head_hidden_size": 32,
    "head_num_layers": 2,
    "num_diffusion_steps": 5,
}


def tiny_prompts(prompts: tuple[str, ...] = PROMPTS, seed: int = 0) -> PromptFeatures:
    """Random features of a few prompts."""
    generator = torch.Generator().manual_seed(seed)
    rows, (length, width) = len(prompts) + 1, (SIZES["text_length"], SIZES["text_width"])
    tokens, decoder = (torch.randn(rows, length, width, generator=generator) for _ in range(2))
    return PromptFeatures(list(prompts), tokens, torch.randn(rows, width, generator=generator), decoder)


def tiny_maskgen(seed: int = 0, **overrides: Any) -> MaskGenModel:
    torch.manual_seed(seed)
    model = MaskGenModel(MaskGenConfig(**{**SIZES, "num_diffusion_steps": 100, **overrides}))
    model.set_prompts(tiny_prompts())
    return model.eval()


def tiny_tatitok(seed: int = 0, text_length: int = 6) -> TATiTokModel:
    torch.manual_seed(seed)
    sizes = {"image_size": 16, "patch_size": 4, "num_tokens": 8, "latent_channels": 4, "text_width": 16}
    encoder = {"encoder_hidden_size": 16, "encoder_num_layers": 1, "encoder_num_heads": 2}
    decoder = {"decoder_hidden_size": 32, "decoder_num_layers": 1, "decoder_num_heads": 4}
    return TATiTokModel(TATiTokConfig(**sizes, text_length=text_length, **encoder, **decoder)).eval()


def text_model(seed: int = 0, **overrides: Any) -> MaskGenModel:
    """As `tiny_model` of tiny_models: images of 1 x 4 x 4 pixels, 4 tokens of 4 channels, here for 3 prompts."""
    pixels = {"image_size": 4, "image_channels": 1, "num_tokens": 4, "latent_channels": 4, "hidden_size": 16}
    heads = {"num_heads": 2, "head_hidden_size": 16, "num_diffusion_steps": 4}
    with torch.random.fork_rng():
        return tiny_maskgen(seed, **{**pixels, **heads, **overrides})


def text_student(seed: int = 0, **overrides: Any) -> MaskGenModel:
    """A one-step student, whose pixels are of all greys."""
    student = text_model(seed, **{"one_step_timestep": 400, **overrides})
    with torch.no_grad():
        for parameter in student.diffloss.net.final_layer.linear.parameters():
            parameter *= 0.3
    return student


def tiny_clip(folder: Path) -> Path:
    """A CLIP of open_clip 16 wide, with random weights and quick GELU."""
    import open_clip

    folder.mkdir()
    text = {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2}
    config = {
        "embed_dim": 16,
        "quick_gelu": True,
        "vision_cfg": {"image_size": 8, "layers": 1, "width": 16, "patch_size": 8, "head_width": 8},
        "text_cfg": text,
    }
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {}}))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = open_clip.create_model(f"local-dir:{folder}", load_weights=False)
    save_file(network.state_dict(), folder / "open_clip_model.safetensors")
    return folder
