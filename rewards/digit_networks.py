"""Small digit classifiers, trained once from the digits' train split and kept in a cache folder."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from marval_rl.data import load_image_dataset
from marval_rl.errors import CheckpointError

FEATURES = 32  # width of the penultimate layer, in which the Frechet distance is measured
BATCH_SIZE = 64
EPOCHS = 40
LEARNING_RATE = 1.5e-3
NOISE = 0.1  # largest standard deviation of the pixel noise in training


class DigitNetwork(nn.Module):
    """Grey images [B, 1, 8, 8] in 0..1 -> non-negative features [B, 32] -> logits of the ten digits [B, 10]."""

    seed: int
    body: nn.Module

    def features(self, images: Tensor) -> Tensor:
        return F.relu(self.body(images))  # [B, 32]

    def forward(self, images: Tensor) -> Tensor:
        return self.classify(self.features(images))  # [B, 10]


class ConvolutionalNetwork(DigitNetwork):
    """The network of the `classifier` reward: three 3x3 convolutions with group norm, two max pools."""

    seed = 1

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1), nn.GroupNorm(4, 16), nn.ReLU(),
            nn.Conv2d(16, 32, 3, padding=1), nn.GroupNorm(4, 32), nn.ReLU(), nn.MaxPool2d(2),  # 4x4
            nn.Conv2d(32, 64, 3, padding=1), nn.GroupNorm(4, 64), nn.ReLU(), nn.MaxPool2d(2),  # 2x2
            nn.Flatten(), nn.Linear(64 * 2 * 2, FEATURES),
        )  # fmt: skip
        self.classify = nn.Linear(FEATURES, 10)


class PerceptronNetwork(DigitNetwork):
    """The network of the `held_out_classifier` judge: no convolution, so that it errs elsewhere."""

    seed = 2

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Flatten(), nn.Linear(64, 256), nn.LayerNorm(256), nn.SiLU(),
            nn.Linear(256, 128), nn.LayerNorm(128), nn.SiLU(), nn.Linear(128, FEATURES),
        )  # fmt: skip
        self.classify = nn.Linear(FEATURES, 10)


def load_digit_network(architecture: type[DigitNetwork], checkpoint: str | os.PathLike | None = None) -> DigitNetwork:
    """Return the network, frozen and in evaluation mode, from `checkpoint`, from the cache, or newly trained.

    The cache folder is $MARVAL_RL_CACHE, or ~/.cache/marval_rl. A damaged cache file is rebuilt with a warning.

    Raises ValueError for a checkpoint that does not exist, CheckpointError for one that cannot be read or has
    other tensors than the architecture.
    """
    with torch.random.fork_rng(devices=[]):  # the caller's random state stays as it was
        torch.manual_seed(architecture.seed)
        network = architecture()
    if checkpoint is not None:
        if not Path(checkpoint).is_file():
            raise ValueError(f"classifier checkpoint {str(checkpoint)!r} does not exist; give a safetensors file")
        _read_weights(network, Path(checkpoint))
    else:
        _load_or_train(network)
    return network.eval().requires_grad_(False)


def cache_path(architecture: type[DigitNetwork]) -> Path:
    """The cache file of a trained network: its name changes with whatever decides the weights."""
    images, digits = _training_images()
    digest = hashlib.sha256(Path(__file__).read_bytes())  # architectures, settings and seeds
    digest.update(images.numpy().tobytes() + digits.numpy().tobytes())
    digest.update(json.dumps([architecture.__name__, torch.__version__]).encode())
    folder = os.environ.get("MARVAL_RL_CACHE") or Path.home() / ".cache" / "marval_rl"
    return Path(folder).expanduser() / f"digits-{architecture.__name__}-{digest.hexdigest()[:16]}.safetensors"


def train_digit_network(network: DigitNetwork) -> None:
    """Train in place on the digits' train split, with AdamW and a cosine decay; a few seconds on one thread.

    Deterministic: all draws come from a generator of its own. Images are shifted by up to one pixel and made noisy,
    so that the slightly unclean images of a generator are judged by what they show.
    """
    images, digits = _training_images()
    generator = torch.Generator().manual_seed(network.seed)
    steps = EPOCHS * (len(images) // BATCH_SIZE)
    optimizer = torch.optim.AdamW(network.parameters(), lr=LEARNING_RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    with torch.enable_grad(), _one_thread():  # a caller under no_grad must get the same network
        for _ in range(steps):
            chosen = torch.randint(len(images), (BATCH_SIZE,), generator=generator)
            loss = F.cross_entropy(network(_augment(images[chosen], generator)), digits[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    optimizer.zero_grad()  # frees the last gradients


def _training_images() -> tuple[Tensor, Tensor]:
    """Images [N, 1, 8, 8] in 0..1 and the digits that they show [N]."""
    data = load_image_dataset("digits", "train")
    return data.images, data.class_labels


@contextmanager
def _one_thread() -> Iterator[None]:
    """Sums are rounded differently by each number of threads: with one the weights are the same on any of them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Shift each image [B, 1, 8, 8] by -1, 0 or 1 pixel in both directions and add noise of a random strength."""
    count, _, height, width = images.shape
    top, left = torch.randint(3, (2, count, 1), generator=generator)  # [B, 1] each
    rows = (top + torch.arange(height))[:, :, None]  # [B, H, 1]
    columns = (left + torch.arange(width))[:, None, :]  # [B, 1, W]
    padded = F.pad(images, (1, 1, 1, 1))[:, 0]
    shifted = padded[torch.arange(count)[:, None, None], rows, columns].unsqueeze(1)
    strength = NOISE * torch.rand(count, 1, 1, 1, generator=generator)
    return (shifted + strength * torch.randn(shifted.shape, generator=generator)).clamp(0, 1)


def _load_or_train(network: DigitNetwork) -> None:
    path = cache_path(type(network))
    if path.is_file():
        try:
            _read_weights(network, path)
            return
        except CheckpointError as error:
            warnings.warn(f"{error}; training the classifier anew", stacklevel=3)
    train_digit_network(network)
    try:
        _write_atomically(network, path)
    except OSError as error:
        warnings.warn(f"cannot keep the classifier in {path.parent} ({error}); set MARVAL_RL_CACHE", stacklevel=3)


def _read_weights(network: DigitNetwork, path: Path) -> None:
    try:
        network.load_state_dict(load_file(path))
    except (SafetensorError, RuntimeError) as error:  # unreadable; other tensors or sizes
        raise CheckpointError(
            f"classifier checkpoint {path} cannot be loaded as {type(network).__name__}: {error}"
        ) from error


def _write_atomically(network: DigitNetwork, path: Path) -> None:
    """Write beside the file and rename, so that another process never reads half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        draft = Path(folder) / path.name
        save_file(network.state_dict(), draft)
        os.replace(draft, path)
