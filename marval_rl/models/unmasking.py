"""Unmasking orders and schedules: which tokens are known, and which are revealed in which step.

An order is a permutation of the tokens, [B, L]. While m tokens are masked, these are the FIRST m entries of the
order, so tokens appear from its end. Every image of a batch reveals equally many tokens in a step: all gathers are
dense and no step waits for the device.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def random_order(
    batch_size: int, num_tokens: int, device: torch.device | str = "cpu", generator: torch.Generator | None = None
) -> Tensor:
    """A uniformly random unmasking order for each image, int64 [B, L]."""
    # Ranking uniform numbers permutes all rows at once.
    return torch.rand(batch_size, num_tokens, device=device, generator=generator).argsort(dim=1)


def check_order(order: Tensor, batch_size: int, num_tokens: int) -> None:
    """Raises ValueError unless each row of order [B, L] is a permutation of the tokens; waits for the device."""
    everything = torch.arange(num_tokens, device=order.device).expand(batch_size, -1)
    if order.shape != everything.shape or not torch.equal(order.sort(dim=1).values, everything):
        raise ValueError(f"order must hold a permutation of 0..{num_tokens - 1} for each of the {batch_size} images")


def num_masked_after(num_tokens: int, num_unmasking_steps: int) -> list[int]:
    """How many tokens are still masked after each of the K unmasking steps: MAR's cosine schedule, ending in 0.

    With K > L some steps before the last reveal nothing.
    """
    if num_unmasking_steps < 1:
        raise ValueError(f"num_unmasking_steps must be at least 1, not {num_unmasking_steps}")
    masked, counts = num_tokens, []
    for step in range(num_unmasking_steps - 1):
        target = math.floor(num_tokens * math.cos(math.pi / 2 * (step + 1) / num_unmasking_steps))
        masked = max(1, min(masked - 1, target))
        counts.append(masked)
    return [*counts, 0]


def unmasking_steps(num_tokens: int, num_unmasking_steps: int) -> list[tuple[int, int]]:
    """(masked before, masked after) of the unmasking steps that reveal at least one token."""
    after = num_masked_after(num_tokens, num_unmasking_steps)
    before = [num_tokens, *after[:-1]]
    return [(b, a) for b, a in zip(before, after, strict=True) if b > a]


MASK_LAWS = ("truncated_normal", "arccos")


def draw_num_masked(
    num_tokens: int,
    ratio_min: float,
    ratio_std: float,
    generator: torch.Generator | None = None,
    law: str = "truncated_normal",
) -> int:
    """How many tokens a training step masks, at least 1. One draw serves a whole batch, so that its gathers are dense.

    Args:
        num_tokens: L.
        ratio_min, ratio_std: MAR's law "truncated_normal" is ceil(L r), r from a normal distribution of mean 1 and
            deviation `ratio_std`, truncated to [ratio_min, 1]; MAR has 0.7 and 0.25 (arXiv 2406.11838, section 4.3).
        generator: On the CPU.
        law: MaskGen's law "arccos" is `arccos_num_masked` of a uniform number, and reads neither of the two.
    """
    if law == "arccos":
        return arccos_num_masked(num_tokens, torch.rand((), generator=generator).item())
    if not 0 < ratio_min <= 1:
        raise ValueError(f"mask_ratio_min must lie in (0, 1], not {ratio_min}")
    if ratio_std <= 0:
        raise ValueError(f"mask_ratio_std must be positive, not {ratio_std}")
    # Inverse-cdf sampling of the left half of a normal: uniform between cdf(ratio_min) and cdf(1) = 1/2.
    standard = torch.distributions.Normal(0.0, 1.0)
    low = standard.cdf(torch.tensor((ratio_min - 1) / ratio_std, dtype=torch.float64)).item()
    uniform = low + (0.5 - low) * torch.rand((), dtype=torch.float64, generator=generator).item()
    ratio = 1 + ratio_std * standard.icdf(torch.tensor(uniform, dtype=torch.float64)).item()
    return min(num_tokens, max(1, math.ceil(num_tokens * min(1.0, max(ratio_min, ratio)))))


def arccos_num_masked(num_tokens: int, uniform: float) -> int:
    """ceil(L r) with r = (2 / pi) arccos(u), at least 1: MaskGen's law for u uniform in [0, 1) (arXiv 2501.07730).

    Its mean is that of the sampler's cosine schedule, its distribution is not.
    """
    return min(num_tokens, max(1, math.ceil(num_tokens * 2 / math.pi * math.acos(uniform))))


def guidance_scales(num_tokens: int, num_unmasking_steps: int, scale: float, schedule: str) -> list[float]:
    """Guidance scale of each step of `unmasking_steps`. 1.0 is no guidance (MAR's convention).

    "linear" grows with the share of tokens revealed, "constant" does not. In MAR the last step counts one masked token,
    so a linear schedule ends just below `scale`.
    """
    if schedule not in ("linear", "constant"):
        raise ValueError(f'guidance_schedule must be "linear" or "constant", not "{schedule}"')
    if schedule == "constant":
        return [scale] * len(unmasking_steps(num_tokens, num_unmasking_steps))
    return [
        linear_guidance_scale(num_tokens, after, scale) for _, after in unmasking_steps(num_tokens, num_unmasking_steps)
    ]


def linear_guidance_scale(num_tokens: int, num_kept: int, scale: float) -> float:
    """The guidance scale of a step after which `num_kept` tokens are masked, in the linear schedule."""
    return 1 + (scale - 1) * (num_tokens - max(1, num_kept)) / num_tokens


def visible_positions(order: Tensor, num_masked: int) -> Tensor:
    """Positions of the known tokens, ascending, [B, L - num_masked]."""
    return order[:, num_masked:].sort(dim=1).values


def revealed_positions(order: Tensor, num_masked: int, num_kept: int = 0) -> Tensor:
    """Positions revealed when the number of masked tokens falls from num_masked to num_kept, ascending, [B, M]."""
    return order[:, num_kept:num_masked].sort(dim=1).values


def gather_tokens(tokens: Tensor, positions: Tensor) -> Tensor:
    """tokens [B, L, X] at positions [B, M] -> [B, M, X]."""
    return tokens.gather(1, positions.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))


def scatter_tokens(tokens: Tensor, positions: Tensor, values: Tensor) -> Tensor:
    """A copy of tokens [B, L, X] with values [B, M, X] at positions [B, M]."""
    index = positions.unsqueeze(-1).expand(-1, -1, tokens.shape[-1])
    return tokens.scatter(1, index, values.to(tokens.dtype))
