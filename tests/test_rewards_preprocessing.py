"""The differentiable preprocessing: as near to PIL as bytes allow, exact where nothing is to do, and differentiable."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from marval_rl.rewards.preprocessing import CLIP_MEAN, CLIP_STD, Preprocessing, resize
from PIL import Image
from tiny_rewards import golden_image, noise_images, to_tensor
from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Resize

MODES = {"bicubic": InterpolationMode.BICUBIC, "bilinear": InterpolationMode.BILINEAR}
PLAIN = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
BYTE = 1 / 255


def hard_picture(kind: str, height: int, width: int) -> Image.Image:
    """Nothing but black and white, where resampling overshoots most."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    black = {
        "squares": (rows // 8 + columns // 8) % 2,
        "stripes": columns // 3 % 2,
        "noise": torch.randint(2, (height, width), generator=torch.Generator().manual_seed(0)),
    }[kind]
    return Image.fromarray((black * 255).to(torch.uint8).numpy())


PICTURES = {f"golden {number}": golden_image(number) for number in range(3)} | {
    f"{kind} {height}x{width}": hard_picture(kind, height, width)
    for kind in ("squares", "stripes", "noise")
    for height, width in ((256, 256), (500, 500), (64, 64), (97, 301), (301, 131))
}


@pytest.mark.parametrize("filter", ["bicubic", "bilinear"])
@pytest.mark.parametrize("name", PICTURES)
def test_within_two_bytes_of_pil(name, filter):
    picture = PICTURES[name]
    reference = to_tensor(Compose([Resize(224, MODES[filter]), CenterCrop(224)])(picture))
    ours = Preprocessing(224, **PLAIN, filter=filter)(to_tensor(picture))
    assert ours.shape == (1, 3, 224, 224)
    assert float((ours - reference).abs().max()) < 2 * BYTE


def test_one_pass_would_not_be_within_two_bytes():
    picture = golden_image(1)
    reference = to_tensor(picture.resize((358, 224), Image.Resampling.BICUBIC))
    one_pass = F.interpolate(to_tensor(picture), size=(224, 358), mode="bicubic", antialias=True).clamp(0, 1)
    assert float((one_pass - reference).abs().max()) > 10 * BYTE
    assert float((resize(to_tensor(picture), 224, 358) - reference).abs().max()) < 2 * BYTE


@pytest.mark.parametrize("shape", [(256, 256), (97, 301)])
def test_without_the_ratio_both_sides_are_resized(shape):
    picture = hard_picture("noise", *shape)
    reference = to_tensor(picture.resize((64, 64), Image.Resampling.BICUBIC))
    ours = Preprocessing(64, **PLAIN, keep_ratio=False)(to_tensor(picture))
    assert float((ours - reference).abs().max()) < 2 * BYTE


def test_nothing_is_touched_where_nothing_has_to_be_resized():
    images = torch.rand(2, 3, 32, 50, generator=torch.Generator().manual_seed(0))
    assert torch.equal(Preprocessing(32, **PLAIN)(images), images[..., 9:41])
    assert resize(images, 32, 50) is images


def test_normalised_by_channel():
    images = noise_images(2, 32, 32)
    pixels = Preprocessing(32)(images)
    for channel in range(3):
        expected = (images[:, channel] - CLIP_MEAN[channel]) / CLIP_STD[channel]
        torch.testing.assert_close(pixels[:, channel], expected)


@pytest.mark.parametrize(("crop_start", "first"), [(round, 2), (int, 1)])
def test_the_odd_pixel_goes_where_each_library_puts_it(crop_start, first):
    images = torch.arange(35.0).expand(1, 3, 32, 35) / 35
    pixels = Preprocessing(32, **PLAIN, crop_start=crop_start)(images)
    assert float(pixels[0, 0, 0, 0]) == pytest.approx(first / 35)


@pytest.mark.parametrize("shape", [(48, 36), (20, 24), (32, 40)])
def test_the_gradient_is_the_one_of_finite_differences(shape):
    images = noise_images(1, *shape).double().requires_grad_()
    assert torch.autograd.gradcheck(Preprocessing(32), images, fast_mode=True)


def test_grey_images_stay_grey_and_each_image_is_by_itself():
    images = noise_images(3, 50, 40)
    images[2] = images[2, :1]
    pixels = Preprocessing(32, **PLAIN)(images)
    assert torch.equal(pixels[2, 0], pixels[2, 1]) and torch.equal(pixels[2, 0], pixels[2, 2])
    for number in range(3):
        torch.testing.assert_close(Preprocessing(32, **PLAIN)(images[number : number + 1])[0], pixels[number])
