"""What reward hacking moves first: contrast, colour and sharpness, by formulas that no reward shares."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601
NEAR = 0.02  # pixels within this of 0 or 1 count as black or white
ENTROPY_BINS, MAX_COLOURFULNESS = 32, 128.0  # of the histogram whose entropy is taken

STATISTICS = ("edge_energy", "sharpness", "colourfulness", "saturation", "black_share", "white_share")


def image_statistics(images: Tensor) -> Tensor:
    """Of images [B, 3, H, W] in 0..1, H and W at least 3: float32 [B, 6] in the order of STATISTICS.

    edge_energy    mean absolute difference of the luma of neighbouring pixels
    sharpness      variance of the Laplacian of the luma
    colourfulness  Hasler & Suesstrunk 2003, on the scale of their paper (33 is moderate, 109 is extreme)
    saturation     mean of HSV's (max - min) / max
    black_share, white_share  of pixels whose luma lies within .02 of 0 or 1
    """
    images = images.float()
    luma = (images * images.new_tensor(LUMA).view(1, 3, 1, 1)).sum(1)  # [B, H, W]
    across, down = luma.diff(dim=2).abs().mean((1, 2)), luma.diff(dim=1).abs().mean((1, 2))
    kernel = images.new_tensor([[0.0, 1, 0], [1, -4, 1], [0, 1, 0]]).view(1, 1, 3, 3)
    laplacian = F.conv2d(luma.unsqueeze(1), kernel).flatten(1)
    largest, smallest = images.amax(1), images.amin(1)
    columns = {
        "edge_energy": (across + down) / 2,
        "sharpness": laplacian.var(dim=1, correction=0),
        "colourfulness": _colourfulness(images * 255),
        "saturation": ((largest - smallest) / largest.clamp(min=1e-6)).mean((1, 2)),
        "black_share": (luma <= NEAR).float().mean((1, 2)),
        "white_share": (luma >= 1 - NEAR).float().mean((1, 2)),
    }
    return torch.stack([columns[name] for name in STATISTICS], dim=1)


def _colourfulness(images: Tensor) -> Tensor:
    red, green, blue = images.flatten(2).unbind(1)  # [B, H W] each, in 0..255
    opponents = torch.stack([red - green, (red + green) / 2 - blue])  # [2, B, H W]
    spread = opponents.var(dim=2, correction=0).sum(0).sqrt()
    return spread + 0.3 * opponents.mean(2).square().sum(0).sqrt()


def colourfulness_entropy(statistics: Tensor) -> float:
    """Entropy, in nats, of the images' colourfulness [N, 6], in 32 bins: falls where all become equally colourful."""
    values = statistics[:, STATISTICS.index("colourfulness")].float().clamp(0, MAX_COLOURFULNESS)
    counts = torch.histc(values, ENTROPY_BINS, 0, MAX_COLOURFULNESS).double()
    return float(torch.special.entr(counts / counts.sum()).sum())
