"""The diffusion head of MAR: a small MLP with adaptive layer norm that denoises one token given its condition."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

TIMESTEP_FREQUENCIES = 256


def timestep_embedding(t: Tensor, dim: int = TIMESTEP_FREQUENCIES) -> Tensor:
    """Sinusoidal embedding of timesteps t [...] -> [..., dim]: cosines first, then sines."""
    half = dim // 2
    frequencies = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32, device=t.device) / half)
    angles = t[..., None].float() * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return x * (1 + scale) + shift


class ZeroLinear(nn.Linear):
    """A linear layer that starts at zero; a class of its own, as transformers initialises leaf by leaf."""


class SmallLinear(nn.Linear):
    """A linear layer whose weights start from N(0, 0.02^2)."""


class TimestepEmbedder(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.mlp = nn.Sequential(SmallLinear(TIMESTEP_FREQUENCIES, width), nn.SiLU(), SmallLinear(width, width))

    def forward(self, t: Tensor) -> Tensor:
        return self.mlp(timestep_embedding(t).to(next(self.mlp.parameters()).dtype))


class ResidualBlock(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.in_ln = nn.LayerNorm(width, eps=1e-6)
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), ZeroLinear(width, 3 * width))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        shift, scale, gate = self.adaLN_modulation(y).chunk(3, dim=-1)
        return x + gate * self.mlp(modulate(self.in_ln(x), shift, scale))


class FinalLayer(nn.Module):
    def __init__(self, width: int, out_channels: int):
        super().__init__()
        self.width = width
        self.linear = ZeroLinear(width, out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), ZeroLinear(width, 2 * width))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(y).chunk(2, dim=-1)
        return self.linear(modulate(F.layer_norm(x, (self.width,), eps=1e-6), shift, scale))


class AdaLNMLP(nn.Module):
    """eps(x_t, t, c) and the variance values.

    Args:
        channels: C, channels of a token.
        condition_size: D, width of the condition.
        width: Hidden width.
        num_layers: Residual blocks.
    """

    def __init__(self, channels: int, condition_size: int, width: int, num_layers: int):
        super().__init__()
        self.time_embed = TimestepEmbedder(width)
        self.cond_embed = nn.Linear(condition_size, width)
        self.input_proj = nn.Linear(channels, width)
        self.res_blocks = nn.ModuleList(ResidualBlock(width) for _ in range(num_layers))
        self.final_layer = FinalLayer(width, 2 * channels)

    def forward(self, x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        """x [..., C], t [...], condition [..., D] -> [..., 2C]. Leading dimensions broadcast, so that several draws of
        (x, t) for one condition embed the condition once."""
        x = self.input_proj(x.to(self.input_proj.weight.dtype))
        y = self.time_embed(t) + self.cond_embed(condition)
        for block in self.res_blocks:
            x = block(x, y)
        return self.final_layer(x, y)


class DiffusionHead(nn.Module):
    """Holds the network under the name `net`, as the official checkpoints do (`diffloss.net.*`)."""

    def __init__(self, channels: int, condition_size: int, width: int, num_layers: int):
        super().__init__()
        self.net = AdaLNMLP(channels, condition_size, width, num_layers)

    def forward(self, x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        return self.net(x, t, condition)


def guide(model_output: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance: eps = eps_null + s (eps_c - eps_null); the variance values stay the labels' own.

    model_output [2N, ..., 2C], labels first -> [N, ..., 2C].
    """
    labelled, null = model_output.chunk(2)
    channels = labelled.shape[-1] // 2
    eps = null[..., :channels] + scale * (labelled[..., :channels] - null[..., :channels])
    return torch.cat([eps, labelled[..., channels:]], dim=-1)
