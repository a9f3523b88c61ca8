"""The CLIP reward against open_clip's own pipeline, and what it says of weights that do not fit."""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from pathlib import Path

import open_clip
import pytest
import torch
from marval_rl.rewards import network_reward
from marval_rl.rewards.clip import Clip, _warn_of_gelu
from safetensors.torch import load_file, save_file
from tiny_rewards import CLIP_CONFIG, by_open_clip, golden_image, noise_images, to_pictures, to_tensor, write_clip
from torch import Tensor

from marval_rl.errors import CheckpointError, RewardError

PROMPTS = ["a photo of the digit seven", "two red cats", "an umbrella"]
SQUASHED = {"resize_mode": "squash", "interpolation": "bilinear", "mean": [0.5, 0.4, 0.3], "std": [0.5, 0.6, 0.7]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture
def tiny_name(monkeypatch) -> str:
    """The tiny network under a name of open_clip, without and with QuickGELU."""
    for name, config in (("tiny", CLIP_CONFIG), ("tiny-quickgelu", {**CLIP_CONFIG, "quick_gelu": True})):
        monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, name, config)
    return "tiny"


@pytest.fixture(scope="module")
def tensors(folder) -> dict[str, Tensor]:
    return load_file(folder / "open_clip_model.safetensors")


def score(reward: Clip, images: Tensor, prompts: list[str]) -> Tensor:
    return reward(images=images, prompts=prompts, class_names=prompts)


@pytest.mark.parametrize("quick_gelu", [False, True])
def test_scores_are_those_of_open_clip(tmp_path, quick_gelu):
    folder = write_clip(tmp_path, quick_gelu=quick_gelu)
    images = noise_images(3, 32, 44)  # to be cropped, not resized
    _, expected = by_open_clip(folder, to_pictures(images), PROMPTS)
    found = score(Clip(f"local-dir:{folder}", scale=1.0), images, PROMPTS)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    assert expected.std() > 0.03


@pytest.mark.parametrize("preprocess", [{}, SQUASHED], ids=["shortest", "squash"])
def test_images_are_prepared_as_by_open_clip(tmp_path, preprocess):
    folder = write_clip(tmp_path, preprocess)
    reward = Clip(f"local-dir:{folder}", scale=1.0)
    pictures = [golden_image(0), golden_image(1), *to_pictures(noise_images(1, 20, 25))]
    pixels, expected = by_open_clip(folder, pictures, PROMPTS)
    for number, picture in enumerate(pictures):
        image = to_tensor(picture)
        off = (reward.pixels(image)[0] - pixels[number]) * torch.tensor(reward.preprocessing.std).view(3, 1, 1)
        assert float(off.abs().max()) < 2 / 255
        found = score(reward, image, [PROMPTS[number]])
        assert float(found) == pytest.approx(float(expected[number]), abs=3e-3)


def test_the_wrong_gelu_is_worth_a_warning(folder, tmp_path):
    images = noise_images(3, 32, 32)
    other = Clip(f"local-dir:{write_clip(tmp_path, quick_gelu=True)}")
    assert (score(other, images, PROMPTS) - score(Clip(f"local-dir:{folder}"), images, PROMPTS)).abs().max() > 0.1


def test_scaled_by_a_hundred_by_default(folder):
    images = noise_images(3, 32, 32)
    cosines = score(Clip(f"local-dir:{folder}", scale=1.0), images, PROMPTS)
    torch.testing.assert_close(score(Clip(f"local-dir:{folder}"), images, PROMPTS), 100 * cosines)


def test_a_template_takes_the_place_of_the_prompts(folder):
    images = noise_images(2, 32, 32)
    reward = Clip(f"local-dir:{folder}", prompt_template="a photo of a {name}")
    found = reward(images=images, prompts=["", ""], class_names=["cat", "{dog}"])
    torch.testing.assert_close(
        found, score(Clip(f"local-dir:{folder}"), images, ["a photo of a cat", "a photo of a {dog}"])
    )
    with pytest.raises(ValueError, match=r"'a photo' does not contain \{name\}"):
        Clip(f"local-dir:{folder}", prompt_template="a photo")


def test_each_prompt_is_embedded_once(folder, monkeypatch):
    reward, embedded = Clip(f"local-dir:{folder}"), []
    embed_prompt = reward.embed_prompt
    monkeypatch.setattr(
        reward, "embed_prompt", lambda prompt, device: embedded.append(prompt) or embed_prompt(prompt, device)
    )
    first = score(reward, noise_images(3, 32, 32), ["a", "b", "a"])
    assert embedded == ["a", "b"]
    assert torch.equal(score(reward, noise_images(3, 32, 32), ["a", "b", "a"]), first)
    assert embedded == ["a", "b"]
    monkeypatch.setattr(network_reward, "KEPT_PROMPTS", 2)
    score(reward, noise_images(3, 32, 32), ["b", "c", "d"])
    assert embedded == ["a", "b", "c", "d"]
    score(reward, noise_images(2, 32, 32), ["d", "a"])
    assert embedded == ["a", "b", "c", "d", "a"]


def test_a_file_in_any_of_its_forms(folder, tensors, tiny_name, tmp_path):
    images = noise_images(3, 32, 32)
    expected = score(Clip(f"local-dir:{folder}"), images, PROMPTS)
    save_file(tensors, tmp_path / "weights.safetensors")
    torch.save(tensors, tmp_path / "plain.pt")
    torch.save({"state_dict": {f"module.{name}": tensor for name, tensor in tensors.items()}}, tmp_path / "wrapped.pt")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name in ("weights.safetensors", "plain.pt", "wrapped.pt"):
            assert torch.equal(score(Clip(tiny_name, str(tmp_path / name)), images, PROMPTS), expected)


@pytest.mark.parametrize(
    ("model", "weights", "fix"),
    [
        ("ViT-B-32", "openai", "ViT-B-32-quickgelu"),
        ("ViT-L-14", "openai", "ViT-L-14-quickgelu"),
        ("ViT-B-32", "ViT-B-32.pt", "ViT-B-32-quickgelu"),
        ("ViT-B-32", "vit_b_32-quickgelu-laion400m_e31-d867053b.pt", "ViT-B-32-quickgelu"),
        (
            "ViT-B-32",
            "models--timm--vit_base_patch32_clip_224.openai/open_clip_model.safetensors",
            "ViT-B-32-quickgelu",
        ),
        ("ViT-H-14", "clip-h-openai-like.safetensors", "ViT-H-14-quickgelu"),
        ("ViT-B-32-quickgelu", "vit_b_32-laion2b_e16-af8dbd0c.pth", "ViT-B-32"),
        ("ViT-B-32-quickgelu", "openai", None),
        ("roberta-ViT-B-32", "laion2b_s12b_b32k", None),
        ("ViT-B-32", "laion2b_s34b_b79k", None),
        ("ViT-B-32", "vit_b_32-laion2b_e16-af8dbd0c.pth", None),
        ("ViT-B-32", "of_my_own.safetensors", None),
    ],
)
def test_a_wrong_gelu_is_warned_of_where_it_is_known(model, weights, fix):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        _warn_of_gelu(open_clip, model, weights)
    assert len(caught) == (fix is not None)
    if fix is not None:
        assert str(caught[0].message).endswith(f"write model: {fix}") and fix in open_clip.list_models()


def test_the_warning_comes_when_the_reward_is_made(tensors, tiny_name, tmp_path):
    save_file(tensors, tmp_path / "openai.safetensors")
    with pytest.warns(UserWarning, match="trained with QuickGELU.*write model: tiny-quickgelu") as caught:
        Clip(tiny_name, str(tmp_path / "openai.safetensors"))
    assert caught[0].filename == __file__


class Hostile:
    def __reduce__(self):
        return exec, ("raise SystemExit('executed')",)


@pytest.mark.parametrize(
    "content",
    [
        {"state_dict": Hostile()},
        {"state_dict": {}, "args": argparse.Namespace(lr=1)},
        {"weight": torch.zeros(3)},
        b"no checkpoint",
        b"",
    ],
    ids=["hostile", "namespace", "another network", "bytes", "empty"],
)
def test_a_broken_file_is_refused_in_one_line(tiny_name, tmp_path, content):
    path = tmp_path / "weights.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    with pytest.raises(CheckpointError, match="cannot load the CLIP model 'tiny' with the weights") as error:
        Clip(tiny_name, str(path))
    assert "\n" not in str(error.value)


def test_weights_that_are_not_finite_are_refused(tensors, tiny_name, tmp_path):
    save_file({**tensors, "visual.proj": tensors["visual.proj"] * torch.nan}, tmp_path / "nan.safetensors")
    with pytest.raises(CheckpointError, match=r"visual.proj of .*nan.safetensors holds NaN"):
        Clip(tiny_name, str(tmp_path / "nan.safetensors"))


def test_a_folder_without_weights_is_refused(folder, tmp_path):
    (tmp_path / "open_clip_config.json").write_text((folder / "open_clip_config.json").read_text())
    with pytest.raises(CheckpointError, match="cannot load the CLIP model 'local-dir:"):
        Clip(f"local-dir:{tmp_path}")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"model": "ViT-B-23"}, "unknown CLIP model 'ViT-B-23'; did you mean ViT-B-32"),
        ({"model": "some/folder"}, r"unknown CLIP model 'some/folder'.*a folder is written local-dir:FOLDER"),
        ({}, "'ViT-B-32' needs pretrained: a file, or one of openai, laion400m_e31"),
        ({"pretrained": "openia"}, r"pretrained 'openia' is neither a file nor a tag of ViT-B-32 \(openai, "),
        ({"model": "local-dir:nowhere"}, "there is no nowhere/open_clip_config.json"),
        ({"model": "hf-hub:a/b", "pretrained": "openai"}, "'hf-hub:a/b' has weights of its own; leave pretrained"),
    ],
)
def test_wrong_arguments_name_the_remedy(arguments, message):
    with pytest.raises((ValueError, CheckpointError), match=message):
        Clip(**arguments)


def test_unsupported_preprocessing_is_refused(tmp_path):
    write_clip(tmp_path, {"resize_mode": "longest"})
    with pytest.raises(ValueError, match="resizes images in a way that is not handled: longest, bicubic"):
        Clip(f"local-dir:{tmp_path}")
    settings = json.loads((tmp_path / "open_clip_config.json").read_text())
    settings["model_cfg"]["vision_cfg"]["image_size"] = [32, 64]
    save_file(open_clip.CLIP(**settings["model_cfg"]).state_dict(), tmp_path / "open_clip_model.safetensors")
    (tmp_path / "open_clip_config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=r"takes images of \[32, 64\] pixels; only squares are handled"):
        Clip(f"local-dir:{tmp_path}")


def test_without_open_clip_the_error_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "open_clip", None)
    with pytest.raises(RewardError, match=r"pip install 'marval-rl\[rewards\]'"):
        Clip("ViT-B-32", "openai")
