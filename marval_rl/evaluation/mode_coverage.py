"""How evenly the modes inside a class (for "even digit": the digits 0, 2, 4, 6, 8) are painted."""

from __future__ import annotations

import torch
from torch import Tensor


def mode_entropy(modes: Tensor, class_labels: Tensor, num_modes: int, class_modes: Tensor | None = None) -> float:
    """Entropy, in nats, of the modes within a class, averaged over the classes that occur: 0..log(num_modes).

    modes and class_labels int64 [N]. class_modes, bool [classes, num_modes], says which modes belong to a class;
    others are then not counted, because a wrong image is no coverage (a class with wrong images only has 0).

    Raises ValueError for mismatched lengths, no images, or modes out of range.
    """
    if len(modes) != len(class_labels):
        raise ValueError(f"{len(modes)} modes but {len(class_labels)} class labels")
    if len(modes) == 0:
        raise ValueError("mode coverage needs at least one image")
    if not 0 <= int(modes.min()) <= int(modes.max()) < num_modes:
        raise ValueError(f"modes must lie in 0..{num_modes - 1}, not {int(modes.min())}..{int(modes.max())}")
    entropies = []
    for label in class_labels.unique().tolist():
        counts = torch.bincount(modes[class_labels == label], minlength=num_modes).double()
        if class_modes is not None:
            counts = counts * class_modes[label].to(counts.device)
        shares = counts / counts.sum().clamp(min=1)
        entropies.append(float(torch.special.entr(shares).sum()))  # entr(p) = -p log p, and 0 at 0
    return sum(entropies) / len(entropies)
