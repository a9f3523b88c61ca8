"""Images that are not square: `image_size: [height, width]`, where the latents are the pixels."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
import torch
from datasets import Dataset
from PIL import Image

from marval_rl.cli.main import main
from marval_rl.data.crop import center_crop
from marval_rl.image_size import height_and_width
from marval_rl.models import MARConfig, codec_for
from marval_rl.models.checkpoints import load_config
from marval_rl.models.maskgen.config import MaskGenConfig
from marval_rl.recipes.data_arguments import DataArguments
from marval_rl.recipes.reading import read_settings

PIXELS = {"image_channels": 1, "latent_channels": 1, "latent_stride": 1}


@pytest.mark.parametrize(
    ("width", "height", "size"),
    [(56, 28, (28, 56)), (200, 50, (20, 40)), (50, 200, (20, 40)), (40, 20, (20, 40)), (2000, 30, (12, 24))],
)
def test_the_central_part_has_the_right_place_and_scale(width, height, size):
    """A ramp across or down keeps its middle; its slope tells by how much the image was resized."""
    across = np.linspace(0, 1, width, dtype=np.float32) * np.ones((height, 1), np.float32)
    down = np.linspace(0, 1, height, dtype=np.float32)[:, None] * np.ones((1, width), np.float32)
    scale = max(size[0] / height, size[1] / width)
    for ramp, axis, length in ((across, 1, width), (down, 0, height)):
        part = np.array(center_crop(Image.fromarray(ramp), size))
        assert part.shape == size
        profile = part.mean(axis=1 - axis)
        inner = profile[2:-2]
        assert inner.mean() == pytest.approx(0.5, abs=0.51 / (length * scale))
        assert np.diff(inner) == pytest.approx(1 / (length - 1) / scale, rel=0.1, abs=1e-3)


def test_a_model_has_rows_and_columns():
    mar = MARConfig(**PIXELS, image_size=[8, 12], patch_size=2)
    assert (mar.image_shape, mar.grid, mar.num_tokens) == ((1, 8, 12), (4, 6), 24)
    text = MaskGenConfig(image_size=[8, 12], image_channels=1, num_tokens=6, latent_channels=16)
    images = torch.rand(2, 1, 8, 12)
    codec = codec_for(text)
    latents = codec.encode(images)
    assert latents.shape == (2, 16, 1, 6) and torch.allclose(codec.decode(latents), images, atol=1e-6)
    assert torch.equal(latents[0, :, 0, 4].view(4, 4), images[0, 0, 4:, 4:8] * 2 - 1)  # row by row
    assert MARConfig(**PIXELS, image_size=[8, 8]).image_size == 8


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MARConfig(image_size=[128, 256]), r"image_size \[128, 256\] is not square.* a VAE"),
        (lambda: MaskGenConfig(image_size=[128, 256], vae="tatitok"), "TA-TiTok's images are"),
        (lambda: MARConfig(**PIXELS, image_size=[8, 9], patch_size=2), "not a multiple"),
        (lambda: height_and_width([8, 8, 8]), r"or \[height, width\], not \[8, 8, 8\]"),
        (lambda: height_and_width([8, 0]), "at least 1"),
        (lambda: DataArguments(image_size=[8, 12], vae="vae"), "not square, but with vae images must be"),
        (lambda: DataArguments(image_size=[8, 12], cache_dir="c"), "not square, but with cache_dir"),
    ],
)
def test_what_must_be_a_square_is_refused_by_name(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(("written", "size"), [("28", 28), ("[28, 56]", [28, 56]), ("28,56", [28, 56]), ("8, 8", 8)])
def test_a_size_as_it_is_written(written, size):
    settings = read_settings(None, ["--image_size", written], (DataArguments,))
    assert DataArguments(**settings).crop_size == size


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> str:
    """Parquet of 24 pictures of 12 x 8 pixels, two captions and two labels."""
    folder = tmp_path_factory.mktemp("rectangles")
    random = np.random.default_rng(0)
    rows: dict[str, list] = {"image": [], "text": [], "label": []}
    for number in range(24):
        data = io.BytesIO()
        Image.fromarray(random.integers(256, size=(8, 12), dtype=np.uint8)).save(data, "PNG")
        rows["image"].append({"bytes": data.getvalue(), "path": None})
        rows["text"].append(("a dark picture", "a light one")[number % 2])
        rows["label"].append(number % 2)
    Dataset.from_dict(rows).to_parquet(folder / "train.parquet")
    return str(folder / "train.parquet")


@pytest.mark.parametrize("backbone", ["mar", "maskgen"])
def test_a_teacher_of_rectangles_trains_is_evaluated_and_sampled(pictures, tmp_path, backbone):
    words = {"text_tower": "words", "caption_column": "text"} if backbone == "maskgen" else {}
    settings = {
        **{"dataset": pictures, "backbone": backbone, **words, "image_size": [8, 12], "patch_size": 4, "flip": False},
        **{"hidden_size": 32, "num_heads": 2, "decoder_num_layers": 1, "head_hidden_size": 32, "head_num_layers": 1},
        **{"max_steps": 1, "per_device_train_batch_size": 4, "warmup_steps": 0, "save_steps": 1, "eval_steps": 1},
        **{"eval_num_images": 8, "eval_unmasking_steps": 2, "eval_diffusion_steps": 2, "eval_on_start": False},
        **{"eval_features": ["pixels:4"], "use_cpu": True, "output_dir": str(tmp_path / "run")},
    }
    (tmp_path / "teacher.yaml").write_text(json.dumps(settings))
    assert main(["pretrain", str(tmp_path / "teacher.yaml")]) == 0
    config = load_config(tmp_path / "run")
    assert config.image_shape == (1, 8, 12) and config.num_tokens == 6
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert any(line.get("eval_frechet_distance", 0) > 0 for line in lines)
    assert "images of 8 x 12 pixels" in (tmp_path / "run" / "final" / "README.md").read_text()
    grid = tmp_path / "grid.png"
    of_what = ["--prompt", "a dark picture"] if backbone == "maskgen" else ["--classes", "0"]
    sample = ["sample", str(tmp_path / "run"), *of_what, "--steps", "2", "--per_class", "2", "--plain"]
    assert main([*sample, "--output", str(grid)]) == 0
    with Image.open(grid) as picture:
        assert picture.width / picture.height == pytest.approx(2 * 12 / 8, rel=0.1)
