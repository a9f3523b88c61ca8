"""The official sampler restated without any of our shortcuts: the baseline that ours is compared with.

As LTH14/mar generates: masks and boolean indexing in place of sorted positions, all tokens through each block, the
timestep embedded for each row, each constant of the schedule looked up on the device in each diffusion step. The layers
of the networks are the model's own; the same seed gives the images of `generate`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from marval_rl.models import MARModel, unpatchify
from marval_rl.models.diffusion import DiffusionSchedule, make_schedule

CONSTANTS = (
    "posterior_log_variance_clipped",
    "log_betas",
    "sqrt_alphas_cumprod",
    "sqrt_one_minus_alphas_cumprod",
    "posterior_mean_coef1",
    "posterior_mean_coef2",
)


@torch.no_grad()
def sample_plainly(
    teacher: MARModel,
    class_labels: Tensor,
    *,
    num_unmasking_steps: int,
    guidance_scale: float,
    num_diffusion_steps: int,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Latents [B, c, h, w] of a teacher; arguments as `generate`'s, guidance "linear"."""
    config, device = teacher.config, class_labels.device
    batch, length = len(class_labels), config.num_tokens
    schedule = make_schedule(config.num_train_timesteps, num_diffusion_steps)
    guided = guidance_scale != 1.0
    order = torch.rand(batch, length, device=device, generator=generator).argsort(dim=1)
    mask = torch.ones(batch, length, dtype=torch.bool, device=device)
    tokens = torch.zeros(batch, length, config.token_channels, device=device)
    for step in range(num_unmasking_steps):
        class_embedding, seen, hidden = teacher.class_emb(class_labels), tokens, mask
        if guided:
            class_embedding = torch.cat([class_embedding, teacher.fake_latent.repeat(batch, 1)])
            seen, hidden = tokens.repeat(2, 1, 1), mask.repeat(2, 1)
        condition = _decode(teacher, _encode(teacher, seen, class_embedding, hidden), hidden)

        kept = math.floor(length * math.cos(math.pi / 2 * (step + 1) / num_unmasking_steps))
        kept = max(1, min(int(mask[0].sum()) - 1, kept))
        is_last = step == num_unmasking_steps - 1
        next_mask = torch.zeros_like(mask)
        if not is_last:
            next_mask = next_mask.scatter(1, order[:, :kept], True)
        revealed = mask & ~next_mask
        mask = next_mask
        chosen = revealed.repeat(2, 1) if guided else revealed
        scale = 1 + (guidance_scale - 1) * (length - kept) / length
        tokens[revealed] = _chain(teacher, schedule, condition[chosen], scale if guided else None, generator)
        if is_last or not mask.any():
            break
    return unpatchify(tokens, config.patch_size, config.grid)


def _encode(teacher: MARModel, tokens: Tensor, class_embedding: Tensor, mask: Tensor) -> Tensor:
    batch, buffer = len(tokens), teacher.config.buffer_size
    x = teacher.z_proj(tokens)
    x = torch.cat([torch.zeros(batch, buffer, x.shape[-1], device=x.device), x], dim=1)
    x[:, :buffer] = class_embedding.unsqueeze(1)
    x = teacher.z_proj_ln(x + teacher.encoder_pos_embed_learned)
    visible = torch.cat([torch.ones(batch, buffer, dtype=torch.bool, device=x.device), ~mask], dim=1)
    x = x[visible].reshape(batch, -1, x.shape[-1])
    for block in teacher.encoder_blocks:
        x = block(x)
    return teacher.encoder_norm(x)


def _decode(teacher: MARModel, encoded: Tensor, mask: Tensor) -> Tensor:
    batch, buffer = len(encoded), teacher.config.buffer_size
    encoded = teacher.decoder_embed(encoded)
    visible = torch.cat([torch.ones(batch, buffer, dtype=torch.bool, device=mask.device), ~mask], dim=1)
    x = teacher.mask_token.repeat(batch, visible.shape[1], 1).to(encoded.dtype)
    x[visible] = encoded.reshape(-1, encoded.shape[-1])
    x = x + teacher.decoder_pos_embed_learned
    for block in teacher.decoder_blocks:
        x = block(x)
    return teacher.decoder_norm(x)[:, buffer:] + teacher.diffusion_pos_embed_learned


def _chain(
    teacher: MARModel,
    schedule: DiffusionSchedule,
    condition: Tensor,
    scale: float | None,
    generator: torch.Generator | None,
) -> Tensor:
    """Tokens [N, C] of conditions [N, D], or [2N, D] with guidance."""
    device, channels, clip = condition.device, teacher.config.token_channels, teacher.config.clip_sample_range
    rows = len(condition) // (1 if scale is None else 2)
    x = torch.randn(rows, channels, device=device, generator=generator)
    if scale is not None:
        x = torch.cat([x, x])
    for index in reversed(range(len(schedule))):
        t = torch.full((len(x),), index, device=device)
        timesteps = torch.from_numpy(schedule.timesteps).to(device)[t]
        seen = x if scale is None else torch.cat([x[:rows], x[:rows]])  # the second half has noise of its own, unread
        output = teacher.diffloss(seen, timesteps, condition).float()
        eps, fraction = output.split(channels, dim=1)
        if scale is not None:
            labelled, null = eps.split(rows)
            eps = (null + scale * (labelled - null)).repeat(2, 1)
        low, high, alpha, sigma, of_start, of_x = (
            torch.from_numpy(getattr(schedule, name)).to(device)[t].float()[:, None].expand(x.shape)
            for name in CONSTANTS
        )
        fraction = (fraction + 1) / 2
        log_variance = fraction * high + (1 - fraction) * low
        start = (x - sigma * eps) / alpha
        if clip is not None:
            start = start.clamp(-clip, clip)
        noise = torch.randn(x.shape, device=device, generator=generator)
        is_noisy = (t != 0).float()[:, None]
        x = of_start * start + of_x * x + is_noisy * torch.exp(0.5 * log_variance) * noise
    return x[:rows]
