"""Small image classifiers, trained once from labelled images and kept in a cache folder."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from marval_rl.data import CroppedImages, fixed_choice
from marval_rl.errors import CheckpointError
from marval_rl.image_size import height_and_width

MIN_FEATURES = 32  # width of the penultimate layer, in which the Frechet distance is measured
MAX_SIZE = 32  # larger images are averaged down to so many pixels
MAX_IMAGES = 50_000  # of the data are learnt from
BATCH_SIZE = 64
MIN_STEPS, MIN_EPOCHS = 800, 10
LEARNING_RATE = 1.5e-3
NOISE = 0.1  # largest standard deviation of the pixel noise in training


class ClassifierNetwork(nn.Module):
    """Images [B, channels, size, size] in 0..1 -> features [B, F], not negative -> logits [B, num_modes]."""

    seed: int

    def __init__(self, channels: int, size: int, num_modes: int) -> None:
        super().__init__()
        self.channels, self.size, width = channels, size, max(MIN_FEATURES, num_modes)
        self.body = self.make_body(channels, size, width)
        self.classify = nn.Linear(width, num_modes)

    @staticmethod
    def make_body(channels: int, size: int, width: int) -> nn.Module:
        """Images [B, channels, size, size] -> [B, width]."""
        raise NotImplementedError

    def features(self, images: Tensor) -> Tensor:
        return F.relu(self.body(images))  # [B, F]

    def forward(self, images: Tensor) -> Tensor:
        return self.classify(self.features(images))  # [B, num_modes]


class ConvolutionalNetwork(ClassifierNetwork):
    """The network of the `classifier` reward: 3x3 convolutions with group norm, and max pools down to 2 or 3 pixels."""

    seed = 1

    @staticmethod
    def make_body(channels: int, size: int, width: int) -> nn.Module:
        stride = 1 if size < 16 else 2
        layers = [nn.Conv2d(channels, 16, 3, stride, padding=1), nn.GroupNorm(4, 16), nn.ReLU()]
        side, maps = -(-size // stride), 16
        while side > 3:
            more = min(2 * maps, 64)
            layers += [nn.Conv2d(maps, more, 3, padding=1), nn.GroupNorm(4, more), nn.ReLU(), nn.MaxPool2d(2)]
            side, maps = side // 2, more
        return nn.Sequential(*layers, nn.Flatten(), nn.Linear(maps * side * side, width))


class PerceptronNetwork(ClassifierNetwork):
    """The network of the `held_out_classifier` judge: no convolutions, so that it makes other errors."""

    seed = 2

    @staticmethod
    def make_body(channels: int, size: int, width: int) -> nn.Module:
        return nn.Sequential(
            nn.Flatten(), nn.Linear(channels * size * size, 256), nn.LayerNorm(256), nn.SiLU(),
            nn.Linear(256, 128), nn.LayerNorm(128), nn.SiLU(), nn.Linear(128, width),
        )  # fmt: skip


@torch.inference_mode(False)  # whatever mode the first caller is in
def load_network(
    architecture: type[ClassifierNetwork], images: CroppedImages, checkpoint: str | os.PathLike | None = None
) -> ClassifierNetwork:
    """Return the network of these images' modes, frozen and in evaluation mode, from `checkpoint`, from the cache, or
    newly trained.

    The cache folder is $MARVAL_RL_CACHE, or ~/.cache/marval_rl. A damaged cache file is rebuilt with a warning.

    Raises ValueError for a checkpoint that does not exist, CheckpointError for one that cannot be read or has
    other tensors than the architecture, and DataError for images that cannot be read.
    """
    with torch.random.fork_rng(devices=[]):  # the caller's random state stays as it was
        torch.manual_seed(architecture.seed)
        network = architecture(
            images.channels, min(*height_and_width(images.image_size), MAX_SIZE), len(images.mode_names)
        )
    if checkpoint is not None:
        if not Path(checkpoint).is_file():
            raise ValueError(f"classifier checkpoint {str(checkpoint)!r} does not exist; give a safetensors file")
        _read_weights(network, Path(checkpoint))
    else:
        _load_or_train(network, images)
    return network.eval().requires_grad_(False)


def fit_images(images: Tensor, network: ClassifierNetwork) -> Tensor:
    """Images [B, 3 or 1, H, W] of any size as the network wants them."""
    images = images.float()
    if images.shape[1] != network.channels:
        images = images.mean(dim=1, keepdim=True).expand(-1, network.channels, -1, -1)
    if images.shape[-2:] == (network.size, network.size):
        return images
    return F.interpolate(images, size=(network.size, network.size), mode="area")


def cache_path(network: ClassifierNetwork, images: CroppedImages) -> Path:
    """The cache file of a trained network: its name changes with everything that the weights depend on."""
    digest = hashlib.sha256(Path(__file__).read_bytes())  # architectures, settings and seeds
    names = [type(network).__name__, torch.__version__, images.mode_names]
    digest.update(json.dumps([images.identity(), *names]).encode())
    folder = Path(os.environ.get("MARVAL_RL_CACHE") or "~/.cache/marval_rl").expanduser()
    return folder / f"{type(network).__name__}-{digest.hexdigest()[:16]}.safetensors"


def train_network(network: ClassifierNetwork, images: Tensor, modes: Tensor) -> None:
    """Train in place on images [N, C, H, W] and their modes [N], with AdamW and a cosine decay.

    Deterministic: all draws come from a generator of its own. Images are shifted a little and made noisy, so that the
    slightly unclean images of a generator are judged by what they show.
    """
    generator = torch.Generator().manual_seed(network.seed)
    steps = max(MIN_STEPS, MIN_EPOCHS * (len(images) // BATCH_SIZE))
    optimizer = torch.optim.AdamW(network.parameters(), lr=LEARNING_RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    with torch.enable_grad(), _one_thread():  # a caller under no_grad must get the same network
        for _ in range(steps):
            chosen = torch.randint(len(images), (BATCH_SIZE,), generator=generator)
            loss = F.cross_entropy(network(_augment(images[chosen], generator)), modes[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    optimizer.zero_grad()  # frees the last gradients


def _images_of(data: CroppedImages, network: ClassifierNetwork) -> tuple[Tensor, Tensor]:
    """Images [N, C, S, S] in 0..1 and the modes that they show [N]; at most MAX_IMAGES, a fixed choice."""
    chosen = fixed_choice(len(data), MAX_IMAGES)
    images = torch.cat([fit_images(data[index]["images"].unsqueeze(0), network) for index in chosen])
    return images, torch.tensor(data.modes)[chosen]


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
    """Shift each image [B, C, S, S] by up to a 14th of its side in both directions; add noise of a random strength."""
    count, channels, size, _ = images.shape
    most = max(1, size // 14)
    top, left = torch.randint(2 * most + 1, (2, count, 1, 1, 1), generator=generator)  # [B, 1, 1, 1] each
    rows, columns = top + torch.arange(size).view(-1, 1), left + torch.arange(size)
    samples, maps = torch.arange(count).view(-1, 1, 1, 1), torch.arange(channels).view(-1, 1, 1)
    shifted = F.pad(images, (most,) * 4)[samples, maps, rows, columns]
    strength = NOISE * torch.rand(count, 1, 1, 1, generator=generator)
    return (shifted + strength * torch.randn(shifted.shape, generator=generator)).clamp(0, 1)


def _load_or_train(network: ClassifierNetwork, data: CroppedImages) -> None:
    path = cache_path(network, data)
    if path.is_file():
        try:
            _read_weights(network, path)
            return
        except CheckpointError as error:
            warnings.warn(f"{error}; training the classifier again", stacklevel=3)
    start = time.monotonic()
    images, modes = _images_of(data, network)
    train_network(network, images, modes)
    described = f"{len(images)} images of {len(data.mode_names)} classes"
    print(f"trained a {type(network).__name__} on {described} in {time.monotonic() - start:.0f} s: {path}", flush=True)
    try:
        _write_atomically(network, path)
    except OSError as error:
        warnings.warn(f"cannot keep the classifier in {path.parent} ({error}); set MARVAL_RL_CACHE", stacklevel=3)


def _read_weights(network: ClassifierNetwork, path: Path) -> None:
    try:
        network.load_state_dict(load_file(path))
    except (SafetensorError, RuntimeError) as error:  # unreadable; other tensors or sizes
        raise CheckpointError(
            f"classifier checkpoint {path} cannot be loaded as {type(network).__name__}: {error}"
        ) from error


def _write_atomically(network: ClassifierNetwork, path: Path) -> None:
    """Write beside the file and rename, so that another process never reads half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        draft = Path(folder) / path.name
        save_file(network.state_dict(), draft)
        os.replace(draft, path)
