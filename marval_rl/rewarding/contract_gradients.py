"""Whether a reward's claim to be differentiable is true: its gradient against finite differences."""

from __future__ import annotations

import torch
from torch import Tensor

from marval_rl.errors import first_line
from marval_rl.rewarding.contract_probe import FAILS, OK, WARNING, Probe, Verdict
from marval_rl.rewarding.loading import is_differentiable

STEPS = (3e-2, 1e-2, 3e-3, 1e-3)  # grey levels; small ones drown in rounding, large ones in curvature
CLOSE, WRONG = 0.1, 0.25  # relative errors


def check_gradient(probe: Probe) -> Verdict:
    """Exists, is finite, is not zero, and says how the scores change when the images do."""
    images = probe.images.requires_grad_()
    if not is_differentiable(probe.reward):
        try:
            probe.score(images, with_grad=True)
        except ValueError as error:
            return OK, f"none is declared; method reward_backprop would say: {error}"
    scores = probe.score(images, with_grad=True)
    scored = ~scores.isnan()
    if not scored.any():
        return WARNING, "differentiable, but all images are left out (None): nothing to compare"
    try:
        [gradient] = torch.autograd.grad(scores[scored].sum(), images, allow_unused=True)
    except RuntimeError as error:  # an operation without a derivative, or a tensor changed after its use
        return FAILS, f"the gradient cannot be computed: {first_line(error)}"
    if gradient is None:
        return FAILS, "declared differentiable, but the scores do not depend on the images"
    broken = ~gradient.isfinite().flatten(1).all(dim=1)
    if broken.any():
        return FAILS, f"the gradient of sample {int(broken.nonzero()[0])} is not finite"
    flat = scored & (gradient.flatten(1).abs().amax(dim=1) == 0)
    if flat.sum() == scored.sum():
        return FAILS, "declared differentiable, but the gradient is zero for every image"
    error = _error(probe, gradient, scored & ~flat)
    if error > WRONG:
        return (
            FAILS,
            f"the gradient is off by {error:.0%} from finite differences: a part of the way is cut off or wrong",
        )
    if error > CLOSE:
        return (
            WARNING,
            f"the gradient is off by {error:.0%} from finite differences (rounding of a coarse dtype, kinks?)",
        )
    if flat.any():
        return WARNING, f"the gradient is zero for {int(flat.sum())} of {len(flat)} images: they would not train"
    return OK, f"within {error:.2g} of finite differences, relatively"


def _error(probe: Probe, gradient: Tensor, scored: Tensor) -> float:
    """The relative error of the slope along one direction an image; the median of the images, at the best step.

    The direction is random in size and follows the gradient in sign, so that the change stands out of the rounding;
    where the gradient is zero its sign is random, so that a path that is cut off shows.
    """
    generator = torch.Generator().manual_seed(0)
    size, sign = torch.rand(2, *gradient.shape, generator=generator).to(gradient.device)
    direction = size * torch.where(gradient == 0, (sign - 0.5).sign(), gradient.sign())
    slope = (gradient * direction).flatten(1).sum(dim=1)[scored]
    errors = []
    for step in STEPS:
        there, back = (probe.score(probe.images + way * step * direction)[scored] for way in (1, -1))
        measured = (there - back) / (2 * step)
        error = (measured - slope).abs() / torch.maximum(measured.abs(), slope.abs())
        errors.append(float(error.nan_to_num(torch.inf).median()))
    return min(errors)
