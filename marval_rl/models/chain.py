"""The teacher's reverse chain: the diffusion head at inference, for one set of conditions and all timesteps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from marval_rl.models.diffusion import DiffusionSchedule, reverse_step
from marval_rl.models.head import DiffusionHead, ResidualBlock
from marval_rl.models.matmul import quick_products
from marval_rl.models.noise import Noise

ROWS_AT_ONCE = 128  # of a product for the modulations of several timesteps


class ChainHead:
    """A head whose work for each timestep is done once, and whose blocks are modulated by one matrix product.

    The modulation SiLU(t + c) W does not depend on the state of the chain, so it is computed for several timesteps at
    once: W is most of the head's weights, and with few rows reading them takes most of a step. Of a block's adaptive
    norm (1 + scale) (g n + b) + shift, with n the normalised input, the products with the norm's own g and b are folded
    into W: what is left is n a + s.

    Args:
        head: The diffusion head; its weights are copied, so a change of them needs a new one.
        timesteps: Those of the chain, int64 [T].

    Raises:
        ValueError: If a modulation has adapters that are not merged.
    """

    def __init__(self, head: DiffusionHead, timesteps: Tensor):
        net: Any = head.net
        for layer in (*(block.adaLN_modulation[1] for block in net.res_blocks), net.final_layer.adaLN_modulation[1]):
            if not isinstance(layer, nn.Linear):
                raise ValueError(f"a modulation of the head is a {type(layer).__name__}: merge its adapters first")
        self.net = net
        self.width = net.input_proj.out_features
        self.times = net.time_embed(timesteps)  # [T, W]
        with torch.autocast(timesteps.device.type, enabled=False):
            parts = [part for block in net.res_blocks for part in _folded_block(block)]
            final = net.final_layer.adaLN_modulation[1]
            (shift, scale), (shift_bias, scale_bias) = final.weight.chunk(2), final.bias.chunk(2)
            parts += [(scale, 1 + scale_bias), (shift, shift_bias)]
            dtype = _product_dtype(final.weight)
            self.weight = torch.cat([weight for weight, _ in parts]).to(dtype)  # [(3 blocks + 2) W, W]
            self.bias = torch.cat([bias for _, bias in parts]).to(dtype)

    def conditions(self, condition: Tensor) -> Tensor:
        """What is computed of the conditions [..., D] before the chain: [..., W]."""
        return self.net.cond_embed(condition)

    def modulations(self, conditions: Tensor, first: int, end: int) -> Tensor:
        """What `__call__` needs beside x, at the timesteps of the indices first..end - 1.

        conditions [..., N, W], of `conditions`. Returns [end - first, ..., N, M W], with M = 3 blocks + 2.
        """
        times = self.times[first:end].view(-1, *[1] * (conditions.ndim - 1), self.width)
        y = F.silu(conditions + times)
        with quick_products(y.device, y.numel() // self.width, self.width):
            return F.linear(y, self.weight, self.bias)

    def __call__(self, x: Tensor, modulation: Tensor) -> Tensor:
        """The head's output [..., N, 2C] at one timestep.

        Args:
            x: [N, C], the same for all leading dimensions of the conditions.
            modulation: [..., N, M W], of `modulations`.
        """
        net, norm_shape = self.net, (self.width,)
        parts = modulation.split(self.width, dim=-1)
        x = net.input_proj(x)
        for number, block in enumerate(net.res_blocks):
            factor, shift, gate = parts[3 * number : 3 * number + 3]
            hidden = torch.addcmul(shift, F.layer_norm(x, norm_shape, eps=1e-6).to(factor.dtype), factor)
            x = torch.addcmul(x, gate, block.mlp(hidden).to(gate.dtype))
        hidden = torch.addcmul(parts[-1], F.layer_norm(x, norm_shape, eps=1e-6).to(modulation.dtype), parts[-2])
        return net.final_layer.linear(hidden)


def _folded_block(block: ResidualBlock) -> list[tuple[Tensor, Tensor]]:
    """Weights and biases of the modulation's factor, shift and gate; see `ChainHead`."""
    modulation: Any = block.adaLN_modulation[1]
    norm = block.in_ln
    (shift, scale, gate), (shift_bias, scale_bias, gate_bias) = modulation.weight.chunk(3), modulation.bias.chunk(3)
    g, b = norm.weight, norm.bias
    return [
        (g[:, None] * scale, g * (1 + scale_bias)),
        (shift + b[:, None] * scale, shift_bias + b * (1 + scale_bias)),
        (gate, gate_bias),
    ]


def _product_dtype(weight: Tensor) -> torch.dtype:
    """The type of products with this weight; autocast would cast the folded weights again in each step."""
    device = weight.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype


@torch.no_grad()
def sample_chain(
    head: DiffusionHead | ChainHead,
    schedule: DiffusionSchedule,
    condition: Tensor,
    noise: Noise,
    guidance_scale: float | None = None,
    temperature: float = 1.0,
    clip_range: float | None = None,
    return_trajectory: bool = False,
) -> Tensor:
    """The reverse diffusion chain for N tokens.

    Args:
        head: The teacher's head, or what `ChainHead` made of it for this schedule.
        schedule: The process, respaced to as many steps as the chain is to have.
        condition: [N, D]; with guidance [2N, D], the null class in the second half.
        noise: Source of the noise; with an `IndexedNoise` the tokens stand image by image, equally many each.
        guidance_scale: None for no guidance.
        temperature: Scales the noise added in each step.
        clip_range: Predicted clean tokens are clamped to +- this; None for no limit.
        return_trajectory: Return every state, [steps, N, C], instead of the last.

    Returns:
        Tokens [N, C], float32.
    """
    if isinstance(head, DiffusionHead):
        head = chain_head(head, schedule, condition.device)
    rows = condition.shape[0] // (1 if guidance_scale is None else 2)
    channels = head.net.input_proj.in_features
    conditions = head.conditions(condition)
    if guidance_scale is not None:
        conditions = conditions.view(2, rows, -1)
    x = noise.normal(rows, channels)  # [N, C]
    states = []
    at_once = max(1, ROWS_AT_ONCE // condition.shape[0])
    modulations: Sequence[Tensor] = ()  # of the timesteps that come next, the next one last
    for index in reversed(range(len(schedule))):
        if not modulations:
            modulations = head.modulations(conditions, max(0, index + 1 - at_once), index + 1).unbind()
        *modulations, modulation = modulations
        output = head(x, modulation).float()
        if guidance_scale is not None:  # as `guide`, in place: the variance values stay the labels' own
            labelled, null = output.unbind()
            torch.lerp(null[:, :channels], labelled[:, :channels], guidance_scale, out=labelled[:, :channels])
            output = labelled
        # MAR draws noise for both halves and for index 0 too; drawing alike keeps a seed's images the same.
        step_noise = noise.normal(rows, channels, num_unused_rows=condition.shape[0] - rows)
        x = reverse_step(schedule, output, x, index, step_noise, temperature, clip_range)
        if return_trajectory:
            states.append(x)
    return torch.stack(states) if return_trajectory else x


def chain_head(head: DiffusionHead, schedule: DiffusionSchedule, device: torch.device) -> ChainHead:
    """The head for the chain of this schedule, at inference."""
    with torch.no_grad():
        return ChainHead(head, torch.from_numpy(schedule.timesteps).to(device))
