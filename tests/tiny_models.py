"""Small MAR models whose weights are all different from zero, for tests."""

from __future__ import annotations

from typing import Any

import torch

from marval_rl.models import MARConfig, MARModel

DISTURBANCE = 0.2  # deviation of what is added to each weight of a new model


def tiny_config(**changes: Any) -> MARConfig:
    """Images of 1 x 4 x 4 pixels, 4 tokens of 4 channels, 3 classes; no dropout."""
    settings = {
        "image_size": 4,
        "image_channels": 1,
        "latent_stride": 1,
        "latent_channels": 1,
        "patch_size": 2,
        "num_classes": 3,
        "buffer_size": 2,
        "encoder_hidden_size": 16,
        "encoder_num_layers": 2,
        "encoder_num_heads": 2,
        "decoder_hidden_size": 16,
        "decoder_num_layers": 2,
        "decoder_num_heads": 2,
        "head_hidden_size": 16,
        "head_num_layers": 2,
        "attention_dropout": 0.0,
        "projection_dropout": 0.0,
        "num_diffusion_steps": 4,
    }
    return MARConfig(**{**settings, **changes})


def tiny_model(seed: int = 0, **changes: Any) -> MARModel:
    """A model in eval mode, made by the seed alone. A new MAR predicts zeros, so its weights are disturbed."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = MARModel(tiny_config(**changes)).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += DISTURBANCE * torch.randn_like(parameter)
    return model


def tiny_student(seed: int = 0, **changes: Any) -> MARModel:
    """A one-step student."""
    return tiny_model(seed, **{"one_step_timestep": 700, **changes})
