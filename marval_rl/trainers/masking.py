"""How many tokens a training step masks."""

from __future__ import annotations

import math

import torch


def draw_num_masked(
    num_tokens: int, ratio_min: float, ratio_std: float, generator: torch.Generator | None = None
) -> int:
    """ceil(L r) with r from a normal distribution of mean 1 and deviation `ratio_std`, truncated to [ratio_min, 1].

    One draw serves a whole batch, so that its gathers are dense. MAR uses 0.7 and 0.25 (arXiv 2406.11838, section 4.3).
    """
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
