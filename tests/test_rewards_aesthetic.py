"""The aesthetic predictor against the authors' lines: CLIP's embedding, divided by its length, through five layers."""

from __future__ import annotations

from pathlib import Path

import open_clip
import pytest
import torch
from marval_rl.rewards.aesthetic import Aesthetic
from safetensors.torch import save_file
from tiny_rewards import CLIP_CONFIG, golden_image, noise_images, to_pictures, to_tensor, write_aesthetic, write_clip
from torch import Tensor, nn

from marval_rl.errors import CheckpointError

WIDTH = CLIP_CONFIG["embed_dim"]


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> str:
    """OpenAI's CLIP stands QuickGELU, and so does this one."""
    return f"local-dir:{write_clip(tmp_path_factory.mktemp('clip'), quick_gelu=True)}"


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    return write_aesthetic(tmp_path_factory.mktemp("aesthetic"))


class Published(nn.Module):
    """The authors' network, dropout and all."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(WIDTH, 1024),
            nn.Dropout(0.2),
            nn.Linear(1024, 128),
            nn.Dropout(0.2),
            nn.Linear(128, 64),
            nn.Dropout(0.1),
            nn.Linear(64, 16),
            nn.Linear(16, 1),
        )


def by_the_authors(clip: str, weights: Path, pictures: list) -> Tensor:
    model, preprocess = open_clip.create_model_from_pretrained(clip)
    head = Published()
    head.load_state_dict(torch.load(weights, weights_only=True))
    with torch.no_grad():
        embeddings = model.eval().encode_image(torch.stack([preprocess(picture) for picture in pictures]))
        return head.eval().layers(embeddings / embeddings.norm(dim=1, keepdim=True)).squeeze(1)


def test_scores_are_those_of_the_authors(clip, weights):
    images = noise_images(4, 32, 45)  # to be cropped, not resized
    expected = by_the_authors(clip, weights, to_pictures(images))
    found = Aesthetic(weights, clip)(images=images)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert found.dtype == torch.float32 and expected.std() > 0.03


def test_images_of_any_size(clip, weights):
    reward = Aesthetic(weights, clip)
    for picture in (golden_image(0), golden_image(1), *to_pictures(noise_images(1, 20, 25))):
        expected = by_the_authors(clip, weights, [picture])
        assert float(reward(images=to_tensor(picture))) == pytest.approx(float(expected), abs=0.02)


def test_the_layers_on_top_stay_in_float32(clip, weights):
    assert Aesthetic(weights, clip, dtype="bfloat16").head[0].weight.dtype == torch.float32


def test_openais_clip_is_the_default(weights, monkeypatch):
    asked = []
    monkeypatch.setattr("marval_rl.rewards.aesthetic.load_clip", lambda *arguments: asked.append(arguments) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        Aesthetic(weights)
    assert asked == [("ViT-L-14-quickgelu", "openai", "float32")]


def test_a_safetensors_file_does_as_well(clip, weights, tmp_path):
    save_file(torch.load(weights, weights_only=True), tmp_path / "head.safetensors")
    images = noise_images(2, 32, 32)
    found = Aesthetic(tmp_path / "head.safetensors", clip)(images=images)
    assert torch.equal(found, Aesthetic(weights, clip)(images=images))


def test_files_that_cannot_be_used_are_refused_in_one_line(clip, weights, tmp_path):
    tensors = torch.load(weights, weights_only=True)
    (tmp_path / "damaged.pth").write_bytes(weights.read_bytes()[:999])
    torch.save({"layers.0.weight": Path("somewhere")}, tmp_path / "hostile.pth")
    torch.save({"weight": torch.zeros(1, 768), "bias": torch.zeros(1)}, tmp_path / "linear.pth")
    torch.save({**tensors, "layers.7.bias": tensors["layers.7.bias"] * torch.nan}, tmp_path / "nan.pth")
    for path, message in (
        ("nowhere.pth", r"weights 'nowhere.pth' do not exist; download sac\+logos\+ava1-l14-linearMSE.pth"),
        (tmp_path / "damaged.pth", "damaged.pth cannot be read as weights"),
        (tmp_path / "hostile.pth", "hostile.pth cannot be read as weights"),
        (tmp_path / "linear.pth", r"linear.pth .* do not fit Sequential: 10 missing .* 2 unknown \(bias, weight\)"),
        (tmp_path / "nan.pth", "7.bias of .*nan.pth .* holds NaN"),
        (write_aesthetic(tmp_path, 768), r"\(for CLIP embeddings of 32 numbers\) do not fit .* of another shape \(0.w"),
    ):
        with pytest.raises(CheckpointError, match=message) as error:
            Aesthetic(path, clip)
        assert "\n" not in str(error.value)
