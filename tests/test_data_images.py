"""From images to tensors: ADM's centre crop, flips that a resumed run repeats, corrupt images."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_images import SIZE, noise_image, write_folder
from torch.utils.data import DataLoader

from marval_rl.data import CroppedImages
from marval_rl.data.crop import center_crop
from marval_rl.data.datasets import FlippingDataset
from marval_rl.data.image_folder import ImageFolder
from marval_rl.errors import DataError
from marval_rl.models import MARConfig
from marval_rl.recipes.data_arguments import DataArguments

FIRST_FLIPS = [2, 5, 6, 7, 9, 14, 15]  # of seed 0 and epoch 0


def columns(width: int, height: int, repeat: int = 1) -> Image.Image:
    """The red of column x is (x // repeat) % 251, which tells where a crop came from."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[..., 0] = (np.arange(width) // repeat) % 251
    return Image.fromarray(pixels)


def rows(width: int, height: int) -> Image.Image:
    return columns(height, width).transpose(Image.Transpose.TRANSPOSE)


def test_an_image_whose_short_side_fits_is_only_cropped():
    cropped = np.array(center_crop(columns(341, 256), 256))  # (341 - 256) // 2 = 42
    assert cropped.shape == (256, 256, 3)
    assert cropped[0, :, 0].tolist() == [x % 251 for x in range(42, 42 + 256)]
    cropped = np.array(center_crop(rows(256, 341), 256))
    assert cropped[:, 0, 0].tolist() == [y % 251 for y in range(42, 42 + 256)]


def test_an_image_of_twice_the_size_is_halved_by_averaging():
    cropped = np.array(center_crop(columns(682, 512, repeat=2), 256))
    assert cropped[0, :, 0].tolist() == [x % 251 for x in range(42, 42 + 256)]


@pytest.mark.parametrize(
    ("size", "halved", "resized"),
    [
        ((512, 384), (512, 384), (341, 256)),  # 384 < 512: not halved; 512 * 256 / 384 = 341.3
        ((1000, 700), (500, 350), (366, 256)),  # 365.7
        ((2100, 1030), (525, 257), (523, 256)),  # 515 // 2 = 257; 522.96
        ((100, 50), (100, 50), (512, 256)),  # enlarged
        ((300, 511), (300, 511), (256, 436)),  # 436.05
    ],
)
def test_the_steps_are_those_of_adm(size, halved, resized):
    image = noise_image(0, *size)
    step = image
    while step.size != halved:
        step = step.resize((step.width // 2, step.height // 2), Image.Resampling.BOX)
    whole = np.array(step.resize(resized, Image.Resampling.BICUBIC))
    top, left = (resized[1] - 256) // 2, (resized[0] - 256) // 2
    assert np.array_equal(np.array(center_crop(image, 256)), whole[top : top + 256, left : left + 256])


@pytest.fixture
def folder(tmp_path):
    return write_folder(tmp_path / "images", {"ant": 12, "bee": 12})


def test_items_are_crops_in_0_to_1_with_their_labels(folder):
    data = CroppedImages(ImageFolder(folder), SIZE, flip=False)
    item = data[13]
    expected = np.array(center_crop(noise_image(1001), SIZE)).transpose(2, 0, 1) / np.float32(255)
    assert item["images"].dtype == torch.float32 and torch.equal(item["images"], torch.from_numpy(expected))
    assert item["class_labels"] == 1 and data.class_names == ["ant", "bee"] and len(data) == 24
    batch = next(iter(DataLoader(data, batch_size=4)))
    assert batch["images"].shape == (4, 3, SIZE, SIZE) and batch["class_labels"].dtype == torch.int64


def test_flips_mirror_half_of_the_images_others_in_each_epoch(folder):
    source = ImageFolder(folder)
    plain, flipping = CroppedImages(source, SIZE, flip=False), CroppedImages(source, SIZE, seed=3)
    for epoch in range(2):
        flipping.set_epoch(epoch)
        for index in range(6):
            expected = plain[index]["images"]
            expected = expected.flip(-1) if flipping.is_flipped(index) else expected
            assert torch.equal(flipping[index]["images"], expected)


def test_flips_depend_on_seed_epoch_and_index_and_on_nothing_else():
    def flips(seed: int, epoch: int) -> list[bool]:
        data = FlippingDataset(True, seed)
        data.set_epoch(epoch)
        return [data.is_flipped(index) for index in range(2000)]

    first = flips(0, 0)
    torch.manual_seed(1)
    assert flips(0, 0) == first
    for other in (flips(0, 1), flips(1, 0)):
        assert 900 < sum(other) < 1100
        assert 900 < sum(a != b for a, b in zip(first, other, strict=True)) < 1100  # as good as independent
    # Fixed for ever: a changed hash would change resumed runs.
    assert [index for index in range(16) if first[index]] == FIRST_FLIPS
    never = FlippingDataset(False, 0)
    assert not any(never.is_flipped(index) for index in range(100))


def test_workers_that_live_on_see_the_new_epoch(folder):
    data = CroppedImages(ImageFolder(folder), SIZE)
    loader = DataLoader(data, batch_size=24, num_workers=1, persistent_workers=True)
    seen = []
    for epoch in (0, 1):
        data.set_epoch(epoch)
        seen.append(next(iter(loader))["images"])
        assert torch.equal(seen[epoch], torch.stack([data[i]["images"] for i in range(24)]))
    assert not torch.equal(*seen)


def test_the_data_set_can_be_sent_to_another_process(folder):
    data = CroppedImages(ImageFolder(folder), SIZE)
    data.set_epoch(5)
    copy = pickle.loads(pickle.dumps(data))
    assert all(torch.equal(copy[i]["images"], data[i]["images"]) for i in range(24))


def test_a_corrupt_image_is_named_with_the_remedy(folder):
    path = folder / "bee" / "0000.png"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(DataError, match=rf"{path} is corrupt: .*: delete it, or train from `marval-rl cache`"):
        CroppedImages(ImageFolder(folder), SIZE)[12]


# Grey data


def grey_folder(root: Path, in_colour: int | None = None) -> Path:
    """40 grey images of 2 classes; one may be in colour."""
    for index in range(40):
        path = root / ("ant" if index < 20 else "bee") / f"{index:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        image = noise_image(index, 8, 8)
        (image if index == in_colour else image.convert("L")).save(path)
    return root


@pytest.mark.parametrize(
    ("in_colour", "image_channels", "channels"), [(None, None, 1), (None, 3, 3), (7, None, 3), (7, 1, 1), (7, 3, 3)]
)
def test_grey_images_make_a_grey_model_unless_a_setting_says_otherwise(tmp_path, in_colour, image_channels, channels):
    data = DataArguments(dataset=str(grey_folder(tmp_path, in_colour)), image_size=8, image_channels=image_channels)
    dataset = data.load_training(None, seed=0)
    latents = data.latents(dataset)
    assert (latents["image_channels"], latents["latent_channels"]) == (channels, channels)
    assert dataset[7]["images"].shape == (channels, 8, 8)
    expected = np.array(noise_image(8, 8, 8).convert("L"), np.float32) / 255
    flipped = expected[:, ::-1] if dataset.is_flipped(8) else expected
    assert np.array_equal(dataset[8]["images"].numpy(), np.stack([flipped] * channels))


@pytest.mark.parametrize("channels", [1, 3])
def test_images_suit_the_model_that_is_given(tmp_path, channels):
    sizes = {"image_size": 8, "latent_stride": 1, "image_channels": channels, "latent_channels": channels}
    config = MARConfig(**sizes, num_classes=2, class_names=["ant", "bee"])
    data = DataArguments(dataset=str(grey_folder(tmp_path, in_colour=7)))
    dataset = data.load_training(config.image_size, seed=0)
    data.fit(config, "teacher", dataset)
    assert dataset[0]["images"].shape == (channels, 8, 8)
    if channels == 1:
        with pytest.raises(DataError, match=r"ant/07.png is in colour, .* set --image_channels 1"):
            dataset[7]
        other = DataArguments(dataset=str(tmp_path), image_channels=3)
        with pytest.raises(ValueError, match="teacher generates images of 1 x 8 x 8, the data's are 3 x 8 x 8"):
            other.fit(config, "teacher", other.load_training(8, seed=0))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"image_channels": 2}, "image_channels must be 1 or 3, not 2"),
        ({"image_channels": 3, "dataset": "x", "vae": "v"}, "image_channels 3 cannot count with vae"),
        ({"image_channels": 3, "dataset": "x", "cache_dir": "c"}, "image_channels 3 cannot count with cache_dir"),
    ],
)
def test_image_channels_that_cannot_count_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        DataArguments(**settings)
