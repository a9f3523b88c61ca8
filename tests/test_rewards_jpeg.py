"""The JPEG reward against the sizes of files that Pillow writes."""

from __future__ import annotations

import pytest
import torch
from marval_rl.rewards.jpeg import Jpeg
from tiny_rewards import golden_image, noise_images, to_pictures, to_tensor

from marval_rl.rewarding import RewardSet


@pytest.mark.parametrize("quality", [10, 95])
@pytest.mark.parametrize("shape", [(8, 8), (33, 50), (256, 256)])
def test_scores_are_the_sizes_of_pillows_files(tmp_path, quality, shape):
    images = torch.rand(3, 3, *shape, generator=torch.Generator().manual_seed(0))
    sizes = []
    for picture in to_pictures(images):
        picture.save(tmp_path / "image.jpg", quality=quality)
        sizes.append((tmp_path / "image.jpg").stat().st_size)
    expected = torch.tensor(sizes) / 1000
    assert torch.equal(Jpeg(quality=quality)(images=images), -expected)
    assert torch.equal(Jpeg("incompressible", quality)(images=images), expected)


def test_a_picture_has_the_bytes_of_its_own_file(tmp_path):
    for number in range(3):
        picture = golden_image(number).convert("RGB")
        picture.save(tmp_path / "image.jpg", quality=95)
        assert float(Jpeg()(images=to_tensor(picture))) == pytest.approx(-(tmp_path / "image.jpg").stat().st_size / 1e3)


def test_smoother_images_score_higher():
    flat, smooth = torch.full((1, 3, 64, 64), 0.5), noise_images(1, 64, 64)
    rough = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    images = torch.cat([flat, smooth, rough])
    compressible, incompressible = Jpeg()(images=images), Jpeg("incompressible")(images=images)
    assert compressible[0] > compressible[1] > compressible[2]
    assert torch.equal(incompressible, -compressible)


def test_pixels_are_rounded_and_not_cut_off():
    images = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    size = Jpeg()(images=images)
    assert torch.equal(size, Jpeg()(images=(images * 255).round() / 255))
    assert not torch.equal(size, Jpeg()(images=(images * 255).floor() / 255))


def test_used_by_a_recipe_and_never_for_gradients():
    rewards = RewardSet(["marval_rl.rewards.jpeg:Jpeg"], None, {"Jpeg": {"encourage": "incompressible"}})
    images = noise_images(2, 16, 16).requires_grad_()
    batch = {"prompts": ["", ""], "class_labels": torch.zeros(2), "class_names": ["", ""]}
    scores = rewards.score(images, **batch).total
    assert scores.dtype == torch.float32 and (scores > 0).all() and not rewards.differentiable
    with pytest.raises(ValueError, match="'Jpeg' is not differentiable"):
        rewards.score(images, **batch, with_grad=True)


def test_wrong_settings_are_refused():
    with pytest.raises(ValueError, match="encourage must be one of compressible, incompressible, not 'small'"):
        Jpeg("small")
    for quality in (0, 96, 50.5, "high"):
        with pytest.raises(ValueError, match=f"quality must be a whole number from 1 to 95, not {quality!r}"):
            Jpeg(quality=quality)
