"""torch-fidelity's Inception network: the space of FID, Inception Score, precision and recall."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from marval_rl.errors import CheckpointError, MarvalError, first_line
from marval_rl.evaluation.image_set import read_images
from marval_rl.models.official.reading import read_checkpoint

NUM_FEATURES = 2048
POOL, LOGITS = "2048", "logits_unbiased"  # torch-fidelity's names of the two layers
PUBLISHED_SHA256 = "6726825d"  # how the published file's checksum begins, as its name says


@dataclass(frozen=True)
class InceptionFeatures:
    """float32, on the CPU: pool [N, 2048] for FID, precision and recall; logits [N, 1008] for the Inception Score."""

    pool: Tensor
    logits: Tensor

    def __len__(self) -> int:
        return len(self.pool)


def require_torch_fidelity() -> None:
    """Raises MarvalError if torch-fidelity is not installed."""
    try:
        import torch_fidelity  # noqa: F401
    except ImportError as error:
        raise MarvalError(
            "FID, Inception Score, precision and recall need torch-fidelity: pip install 'marval-rl[evaluate]'"
        ) from error


class Inception:
    """The network in eval mode.

    Args:
        weights: torch-fidelity's file of weights.
        device: Where it runs.
        batch_size: Images at once.

    Raises:
        CheckpointError: If the file is missing, damaged, unsafe or holds other weights.
        MarvalError: If torch-fidelity is not installed.
    """

    def __init__(self, weights: Path, device: torch.device | str, batch_size: int):
        require_torch_fidelity()
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        check_weights_file(weights)
        state = read_checkpoint(weights)
        # torch-fidelity would unpickle whatever is in the file, so it is handed what was read safely.
        buffer = io.BytesIO()
        torch.save(state, buffer)
        buffer.seek(0)
        try:
            network = FeatureExtractorInceptionV3(
                "inception-v3-compat", [POOL, LOGITS], feature_extractor_weights_path=buffer
            )
        except RuntimeError as error:  # load_state_dict's
            raise CheckpointError(
                f"{weights} holds no weights of torch-fidelity's Inception: {first_line(error)}"
            ) from error
        self.network = network.eval().to(device)
        self.device = torch.device(device)
        self.batch_size = batch_size

    @torch.no_grad()
    def __call__(self, pixels: Tensor) -> InceptionFeatures:
        """Features of uint8 [N, 3, H, W] on any device."""
        parts = [self.network(part.to(self.device)) for part in pixels.split(self.batch_size)]
        pool, logits = (torch.cat(layer).cpu() for layer in zip(*parts, strict=True))
        return InceptionFeatures(pool, logits)

    def of_many(self, images: Sequence[Path] | np.ndarray) -> InceptionFeatures:
        """Features of image files of one size, or of an array uint8 [N, H, W, 3], a batch at a time."""
        parts = [self(pixels) for pixels in self._batches(images)]
        return InceptionFeatures(torch.cat([part.pool for part in parts]), torch.cat([part.logits for part in parts]))

    def _batches(self, images: Sequence[Path] | np.ndarray) -> Iterator[Tensor]:
        for start in range(0, len(images), self.batch_size):
            part = images[start : start + self.batch_size]
            if isinstance(part, np.ndarray):
                yield torch.from_numpy(part).permute(0, 3, 1, 2).contiguous()
            else:
                yield read_images(part)


def file_digest(file: Path) -> str:
    """SHA-256 of a file."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def check_weights_file(weights: Path) -> None:
    """Raises CheckpointError, with where to get it, if the file of weights is missing."""
    if weights.is_file():
        return
    require_torch_fidelity()
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3

    raise CheckpointError(
        f"no Inception weights at {weights}: torch-fidelity publishes them as {URL_INCEPTION_V3.rpartition('/')[2]} "
        f"(pytorch-fid has the same file as pt_inception-2015-12-05-6726825d.pth); get {URL_INCEPTION_V3} and give its "
        "path (--inception_weights ...)"
    )
