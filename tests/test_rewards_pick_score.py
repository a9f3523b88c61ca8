"""PickScore against transformers' own pipeline."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from marval_rl.rewards.pick_score import PickScore
from safetensors.torch import load_file, save_file
from tiny_rewards import golden_image, noise_images, to_pictures, to_tensor, write_pick_score
from torch import Tensor
from transformers import AutoTokenizer, CLIPImageProcessor, CLIPModel

from marval_rl.errors import CheckpointError

PROMPTS = ["two red cats", "an umbrella", "a very long prompt with more than sixteen letters"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_pick_score(tmp_path_factory.mktemp("pick_score"))


def copy_with(folder: Path, target: Path, **changes: Tensor | None) -> str:
    """A copy of the folder with some weights changed, or left out where None."""
    shutil.copytree(folder, target)
    tensors = load_file(target / "model.safetensors") | changes
    left = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    save_file(left, target / "model.safetensors", metadata={"format": "pt"})
    return str(target)


def by_transformers(folder: Path, pictures: list, prompts: list[str]) -> tuple[Tensor, Tensor]:
    """Pixels and scores as in the authors' example: processor, both embeddings, logit scale."""
    model = CLIPModel.from_pretrained(folder).eval()
    pixels = CLIPImageProcessor.from_pretrained(folder)(images=pictures, return_tensors="pt")["pixel_values"]
    tokens = AutoTokenizer.from_pretrained(folder)(
        prompts, padding=True, truncation=True, max_length=16, return_tensors="pt"
    )
    with torch.no_grad():
        return pixels, model(pixel_values=pixels, **tokens).logits_per_image.diagonal()


def test_scores_are_those_of_transformers(folder):
    images = noise_images(3, 32, 35)  # to be cropped, not resized
    _, expected = by_transformers(folder, to_pictures(images), PROMPTS)
    found = PickScore(str(folder), str(folder))(images=images, prompts=PROMPTS)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert expected.std() > 0.3


def test_images_are_prepared_as_by_transformers(folder):
    reward = PickScore(str(folder), str(folder))
    pictures = [golden_image(0), golden_image(1), golden_image(2).convert("RGB")]
    pixels, expected = by_transformers(folder, pictures, PROMPTS)
    for number, picture in enumerate(pictures):
        image = to_tensor(picture)
        off = (reward.pixels(image)[0] - pixels[number]) * torch.tensor(reward.preprocessing.std).view(3, 1, 1)
        assert float(off.abs().max()) < 2 / 255
        found = reward(images=image, prompts=[PROMPTS[number]])
        assert float(found) == pytest.approx(float(expected[number]), abs=0.05)


def test_the_logit_scale_of_the_weights_counts(folder, tmp_path):
    images = noise_images(3, 32, 32)
    doubled = load_file(folder / "model.safetensors")["logit_scale"] + torch.tensor(2.0).log()
    other = copy_with(folder, tmp_path / "other", logit_scale=doubled)
    expected = 2 * PickScore(str(folder), str(folder))(images=images, prompts=PROMPTS)
    torch.testing.assert_close(PickScore(other, str(folder))(images=images, prompts=PROMPTS), expected)


def test_weights_that_do_not_fit_are_refused_in_one_line(folder, tmp_path):
    scale = load_file(folder / "model.safetensors")["logit_scale"]
    damaged = Path(copy_with(folder, tmp_path / "damaged"))
    (damaged / "model.safetensors").write_bytes((damaged / "model.safetensors").read_bytes()[:3000])
    for name, message in (
        (copy_with(folder, tmp_path / "missing", logit_scale=None), "1 missing_keys: logit_scale"),
        (copy_with(folder, tmp_path / "nan", logit_scale=scale * torch.nan), "logit_scale of .*nan holds NaN"),
        (str(damaged), "cannot load the CLIPModel .*damaged"),
    ):
        with pytest.raises(CheckpointError, match=message) as error:
            PickScore(name, str(folder))
        assert "\n" not in str(error.value)


def test_a_pickle_is_not_read(folder, tmp_path):
    target = Path(copy_with(folder, tmp_path / "pickled"))
    torch.save(load_file(target / "model.safetensors"), target / "pytorch_model.bin")
    (target / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="cannot load the CLIPModel"):
        PickScore(str(target), str(folder))


def test_wrong_arguments_name_the_remedy(folder, tmp_path):
    with pytest.raises(CheckpointError, match="the model '/no/folder' does not exist; give a folder, or a hub id"):
        PickScore("/no/folder", str(folder))
    with pytest.raises(CheckpointError, match=r"the processor './no' does not exist"):
        PickScore(str(folder), "./no")
    other = Path(copy_with(folder, tmp_path / "other"))
    CLIPImageProcessor(size={"shortest_edge": 64}, crop_size={"height": 64, "width": 64}).save_pretrained(other)
    with pytest.raises(ValueError, match=r"makes images of 64 pixels, but .* takes 32: choose the processor"):
        PickScore(str(folder), str(other))
