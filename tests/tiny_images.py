"""Small labelled images on the disk and a small VAE, for tests of data and caches."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image

from marval_rl.data.image_folder import ImageFolder
from marval_rl.data.moments.writer import CacheJob, build_cache
from marval_rl.models.vae import VAECodec

SIZE = 16  # of the crops; the VAE halves it
CACHE_SETTINGS = {"vae_name": "tiny", "shard_size": 8}
NUM_SHARDS = 8  # of the 60 images


def noise_image(seed: int, width: int = 20, height: int = 18) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3))
    return Image.fromarray(pixels.astype(np.uint8))


def png_bytes(image: Image.Image) -> bytes:
    stream = io.BytesIO()
    image.save(stream, "png")
    return stream.getvalue()


def write_folder(root: Path, classes: dict[str, int]) -> Path:
    """`root`/<class>/0000.png, ...: so many different images of each class."""
    for label, (name, number) in enumerate(classes.items()):
        (root / name).mkdir(parents=True)
        for i in range(number):
            noise_image(1000 * label + i).save(root / name / f"{i:04d}.png")
    return root


def tiny_autoencoder(seed: int = 0) -> AutoencoderKL:
    """Stride 2, 2 latent channels: moments [4, 8, 8] of images of 16 x 16."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return AutoencoderKL(
            block_out_channels=(4, 4),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            layers_per_block=1,
            latent_channels=2,
            norm_num_groups=2,
            scaling_factor=0.5,
            sample_size=SIZE,
        )


def tiny_codec(seed: int = 0) -> VAECodec:
    return VAECodec(tiny_autoencoder(seed))


def write_partly_corrupt_folder(root: Path) -> Path:
    """60 images of 3 classes; the 6th of the second (index 25) is truncated, the last one is not an image."""
    write_folder(root, {"ant": 20, "bee": 20, "cow": 20})
    cut = root / "bee" / "0005.png"
    cut.write_bytes(cut.read_bytes()[:100])
    (root / "cow" / "0019.png").write_text("<html>not found</html>")
    return root


def write_cache(images: Path, folder: Path) -> Path:
    """A cache that nothing disturbed, by two processes one after the other."""
    for rank in (1, 0):
        job = CacheJob(ImageFolder(images), tiny_codec(), SIZE, folder, **CACHE_SETTINGS)
        manifest = build_cache(job, batch_size=4, rank=rank, world_size=2)
        assert (manifest is None) == (rank == 1)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}
