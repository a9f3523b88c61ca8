"""HPS v2 against open_clip and Pillow, from its published file."""

from __future__ import annotations

from pathlib import Path

import open_clip
import pytest
import torch
from marval_rl.rewards.hps import MODEL, Hps
from PIL import Image
from tiny_rewards import (
    CLIP_CONFIG,
    by_open_clip,
    golden_image,
    noise_images,
    to_pictures,
    to_tensor,
    write_clip,
    write_hps,
)
from torch import Tensor

from marval_rl.errors import CheckpointError

PROMPTS = ["a photo of the digit seven", "two red cats", "an umbrella"]
SIZE = CLIP_CONFIG["vision_cfg"]["image_size"]


@pytest.fixture(autouse=True)
def tiny_clip_h(monkeypatch):
    """CLIP-H is as small as its stand-in's file."""
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, MODEL, CLIP_CONFIG)


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    return write_hps(tmp_path_factory.mktemp("hps"))


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory) -> Path:
    """The same weights as open_clip's own folder."""
    return write_clip(tmp_path_factory.mktemp("clip"))


def padded(picture: Image.Image) -> Image.Image:
    """The long side resized to SIZE and black around, as HPS's authors prepare images."""
    width, height = (max(1, round(length * SIZE / max(picture.size))) for length in picture.size)
    square = Image.new("RGB", (SIZE, SIZE))
    resized = picture.convert("RGB").resize((width, height), Image.Resampling.BICUBIC)
    square.paste(resized, ((SIZE - width) // 2, (SIZE - height) // 2))
    return square


def score(reward: Hps, images: Tensor, prompts: list[str] = PROMPTS) -> Tensor:
    return reward(images=images, prompts=prompts, class_names=prompts)


def test_scores_are_the_cosines_of_open_clip(weights, clip_folder):
    images = noise_images(3, SIZE, SIZE)
    _, expected = by_open_clip(clip_folder, to_pictures(images), PROMPTS)
    found = score(Hps(weights), images)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(score(Hps(weights, scale=100.0), images), 100 * found)
    assert found.dtype == torch.float32 and expected.std() > 0.03


def test_images_are_prepared_as_by_the_authors(weights, clip_folder):
    reward = Hps(weights)
    mean, std = (torch.tensor(each).view(3, 1, 1) for each in (reward.preprocessing.mean, reward.preprocessing.std))
    for picture in (golden_image(0), golden_image(1), *to_pictures(noise_images(1, 49, 33)), Image.new("RGB", (1, 90))):
        image, square = to_tensor(picture), padded(picture)
        off = reward.pixels(image)[0] * std + mean - to_tensor(square)[0]
        assert float(off.abs().max()) < 2 / 255
        _, expected = by_open_clip(clip_folder, [square], PROMPTS[:1])
        assert float(score(reward, image, PROMPTS[:1])) == pytest.approx(float(expected), abs=3e-3)


def test_the_whole_image_counts(weights):
    wide = noise_images(1, 32, 64)
    changed = wide.clone()
    changed[..., :8] = 0.5  # a crop would not see it
    assert abs(score(Hps(weights), wide, ["a"]) - score(Hps(weights), changed, ["a"])) > 1e-3


def test_a_template_takes_the_place_of_the_prompts(weights):
    images = noise_images(2, 32, 32)
    reward = Hps(weights, prompt_template="a photo of a {name}")
    found = reward(images=images, prompts=["", ""], class_names=["cat", "dog"])
    torch.testing.assert_close(found, score(Hps(weights), images, ["a photo of a cat", "a photo of a dog"]))


def test_files_that_cannot_be_used_are_refused_in_one_line(weights, tmp_path):
    with pytest.raises(
        CheckpointError, match=r"HPS's weights 'nowhere.pt' do not exist; download HPS_v2_compressed.pt"
    ):
        Hps("nowhere.pt")
    whole = torch.load(weights, weights_only=True)["state_dict"]
    broken = {
        "damaged.pt": weights.read_bytes()[:5000],
        "incomplete.pt": {"state_dict": dict(list(whole.items())[:-1])},
        "hostile.pt": {"state_dict": Path("somewhere")},
    }
    for name, content in broken.items():
        if isinstance(content, bytes):
            (tmp_path / name).write_bytes(content)
        else:
            torch.save(content, tmp_path / name)
        with pytest.raises(CheckpointError, match=f"cannot load the CLIP model 'ViT-H-14' .*{name}") as error:
            Hps(tmp_path / name)
        assert "\n" not in str(error.value)
    nan = {name: tensor * torch.nan if name == "module.visual.proj" else tensor for name, tensor in whole.items()}
    torch.save({"state_dict": nan}, tmp_path / "nan.pt")
    with pytest.raises(CheckpointError, match=r"visual.proj of .*nan.pt holds NaN"):
        Hps(tmp_path / "nan.pt")
