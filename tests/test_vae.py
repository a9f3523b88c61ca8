"""Latents of a diffusers AutoencoderKL: scale, shift, sampling, and VAEs that cannot be used."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file
from tiny_models import tiny_config

from marval_rl.errors import CheckpointError
from marval_rl.models import codec_for, vae
from marval_rl.models.vae import VAECodec, load_autoencoder, stride_of

WEIGHTS = "diffusion_pytorch_model.safetensors"


def tiny_autoencoder(seed: int = 0, **changes: Any) -> AutoencoderKL:
    """Stride 4, 4 channels, scale 0.5, shift 0.25."""
    settings = {
        "down_block_types": ("DownEncoderBlock2D",) * 3,
        "up_block_types": ("UpDecoderBlock2D",) * 3,
        "block_out_channels": (8, 8, 16),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "latent_channels": 4,
        "scaling_factor": 0.5,
        "shift_factor": 0.25,
    }
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return AutoencoderKL(**{**settings, **changes})


@pytest.fixture
def folder(tmp_path) -> Path:
    tiny_autoencoder().save_pretrained(tmp_path / "vae")
    return tmp_path / "vae"


@pytest.fixture
def codec(folder) -> VAECodec:
    return VAECodec.from_pretrained(folder)


@pytest.fixture
def images() -> torch.Tensor:
    return torch.rand(2, 3, 16, 24, generator=torch.Generator().manual_seed(1))


def test_shapes(codec, images):
    assert stride_of(codec.autoencoder) == 4
    moments = codec.moments(images)
    latents = codec.encode(images)
    assert moments.shape == (2, 8, 4, 6) and latents.shape == (2, 4, 4, 6)
    assert codec.from_moments(moments).shape == latents.shape
    assert codec.decode(latents).shape == images.shape


def test_moments_are_those_of_the_autoencoder(codec, images):
    posterior = codec.autoencoder.encode(images * 2 - 1).latent_dist
    assert torch.equal(codec.moments(images), posterior.parameters)
    assert not codec.moments(images).requires_grad


def test_latents_are_posterior_samples_shifted_and_scaled(codec):
    mean = torch.tensor([1.0, -2.0, 0.0, 5.0]).view(1, 4, 1, 1)
    log_variance = torch.tensor([0.0, -2.0, -40.0, 1.0]).view(1, 4, 1, 1)
    torch.manual_seed(0)
    latents = codec.from_moments(torch.cat([mean, log_variance], dim=1).expand(20000, -1, 1, 1))
    expected_std = (log_variance.clamp(-30, 20) / 2).exp() * 0.5
    torch.testing.assert_close(latents.mean(0), (mean[0] - 0.25) * 0.5, atol=0.02, rtol=0)
    torch.testing.assert_close(latents.std(0), expected_std[0], atol=0.02, rtol=0)
    assert latents[:, 2].std() < 1e-6


def test_each_encoding_is_a_fresh_sample_of_the_seed(codec, images):
    torch.manual_seed(3)
    first, second = codec.encode(images), codec.encode(images)
    torch.manual_seed(3)
    assert torch.equal(codec.encode(images), first) and not torch.equal(first, second)


def test_half_precision_moments_give_float32_latents(codec, images):
    moments = codec.moments(images)
    torch.manual_seed(0)
    exact = codec.from_moments(moments)
    torch.manual_seed(0)
    rounded = codec.from_moments(moments.half())
    assert rounded.dtype == torch.float32
    torch.testing.assert_close(rounded, exact, atol=5e-3, rtol=0)


def test_decoding_undoes_scale_and_shift_and_clips(codec):
    latents = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        raw = codec.autoencoder.decode(latents / 0.5 + 0.25).sample
        assert torch.equal(codec.decode(latents), ((raw + 1) / 2).clamp(0, 1))
        codec.autoencoder.decoder.conv_out.bias += torch.tensor([9.0, -9.0, 0.0])
        images = codec.decode(latents)
    assert (images[:, 0] == 1).all() and (images[:, 1] == 0).all() and images[:, 2].std() > 0


def test_gradients_reach_the_latents_and_no_weight(codec):
    generator = torch.Generator().manual_seed(2)
    latents = torch.randn(1, 4, 4, 4, generator=generator).double().requires_grad_()
    direction = torch.randn(1, 3, 16, 16, generator=generator).double()
    codec.autoencoder.double()
    codec.autoencoder.decoder.conv_out.weight.data *= 0.1  # nothing is clipped
    raw = codec.autoencoder.decode(latents / 0.5 + 0.25).sample
    (inner,) = torch.autograd.grad((raw * direction).sum(), latents)
    (outer,) = torch.autograd.grad((codec.decode(latents) * direction).sum(), latents)
    assert raw.abs().max() < 1 and inner.abs().min() > 0
    torch.testing.assert_close(outer, inner / 2, rtol=1e-4, atol=1e-6)  # from -1..1 to 0..1
    assert not any(parameter.requires_grad for parameter in codec.autoencoder.parameters())
    assert not codec.autoencoder.training


def test_images_that_do_not_divide_into_cells_are_refused(codec):
    with pytest.raises(ValueError, match=r"images of \(16, 18\) pixels do not divide into the VAE's 4 x 4"):
        codec.moments(torch.rand(1, 3, 16, 18))


def test_the_configuration_of_a_model_names_its_vae(folder):
    config = tiny_config(image_size=16, image_channels=3, latent_stride=4, latent_channels=4, vae=str(folder))
    assert isinstance(codec_for(config), VAECodec)
    with pytest.raises(ValueError, match="latents of stride 4 with 4 channels need a VAE"):
        codec_for(tiny_config(image_size=16, image_channels=3, latent_stride=4, latent_channels=4))


@pytest.mark.parametrize("sizes", [{"latent_stride": 8}, {"latent_channels": 16}])
def test_a_vae_of_other_latents_is_refused(folder, sizes):
    config = tiny_config(**{"image_size": 16, "latent_stride": 4, "latent_channels": 4, "vae": str(folder), **sizes})
    with pytest.raises(CheckpointError, match="has latents of stride 4 with 4 channels; the model generates"):
        codec_for(config)


def test_half_precision_weights_load_as_float32(folder):
    weights = load_file(folder / WEIGHTS)
    save_file({name: tensor.half() for name, tensor in weights.items()}, folder / WEIGHTS)
    loaded = load_autoencoder(folder)
    assert loaded.dtype == torch.float32
    assert torch.equal(loaded.decoder.conv_in.weight, weights["decoder.conv_in.weight"].half().float())


def missing(weights: dict) -> None:
    del weights["decoder.conv_in.bias"]


def extra(weights: dict) -> None:
    weights["decoder.surplus"] = torch.zeros(1)


def misshapen(weights: dict) -> None:
    weights["decoder.conv_in.bias"] = torch.zeros(3)


def not_finite(weights: dict) -> None:
    weights["decoder.conv_in.bias"][2] = float("nan")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (missing, "is incomplete or another: 1 missing keys: decoder.conv_in.bias"),
        (extra, "is incomplete or another: 1 unexpected keys: decoder.surplus"),
        (misshapen, "decoder.conv_in.bias expected shape"),
        (not_finite, "the weight decoder.conv_in.bias of .* holds NaN or infinity"),
    ],
)
def test_weights_that_do_not_fit(folder, capfd, damage, message):
    weights = load_file(folder / WEIGHTS)
    damage(weights)
    save_file(weights, folder / WEIGHTS)
    with pytest.raises(CheckpointError, match=message):
        load_autoencoder(folder)
    assert capfd.readouterr().err == ""  # diffusers keeps quiet beside our one line


@pytest.mark.parametrize("data", [b"", b"no weights"])
def test_a_damaged_file_of_weights(folder, data):
    (folder / WEIGHTS).write_bytes(data)
    with pytest.raises(CheckpointError, match=f"cannot load the VAE {folder}"):
        load_autoencoder(folder)


def test_pickled_weights_are_not_read(folder):
    torch.save(load_file(folder / WEIGHTS), folder / "diffusion_pytorch_model.bin")
    (folder / WEIGHTS).unlink()
    with pytest.raises(CheckpointError, match=r"no file named diffusion_pytorch_model\.safetensors"):
        load_autoencoder(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"_class_name": "AsymmetricAutoencoderKL"},
            "is not an AutoencoderKL: .* _class_name 'AsymmetricAutoencoderKL'",
        ),
        ({"_class_name": None}, "is not an AutoencoderKL: its config.json says _class_name None"),
        ({"scaling_factor": "0.5"}, "has scaling_factor '0.5'"),
        ({"scaling_factor": 0}, "has scaling_factor 0"),
        ({"block_out_channels": [8, 8, 15]}, "must be divisible by"),
    ],
)
def test_configurations_that_are_not_a_vae(folder, changes, message):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(CheckpointError, match=message):
        load_autoencoder(folder)


def test_paths_that_hold_no_vae(folder, tmp_path):
    with pytest.raises(CheckpointError, match="is not a VAE folder: it holds no config"):
        load_autoencoder(folder / WEIGHTS)
    with pytest.raises(CheckpointError, match="is not a VAE folder: it holds no config"):
        load_autoencoder(tmp_path)
    for name in (tmp_path / "nowhere", "vae", "./vae", "runs/vae", "models/kl16", "a/b/c"):
        with pytest.raises(CheckpointError, match=f"no VAE at {Path(name)}: the path does not exist"):
            load_autoencoder(name)


def test_a_configuration_that_cannot_be_read(folder, tmp_path):
    (folder / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="cannot load the VAE"):
        load_autoencoder(folder)
    shutil.rmtree(folder)
    tiny_config().save_pretrained(folder)
    with pytest.raises(CheckpointError, match="is not an AutoencoderKL"):
        load_autoencoder(folder)


# In portions: the feature maps of a whole batch would not fit


def test_portions_change_nothing_but_memory(codec, images, monkeypatch):
    images = torch.cat([images, images.flip(-1), images.flip(-2)])[:5]
    moments, latents = codec.moments(images), torch.randn(5, 4, 4, 6, generator=torch.Generator().manual_seed(2))
    decoded = codec.decode(latents)
    monkeypatch.setattr(vae, "IMAGES_AT_ONCE", 2)
    assert torch.allclose(codec.moments(images), moments, atol=1e-5)
    assert torch.allclose(codec.decode(latents), decoded, atol=1e-5)


def test_gradients_flow_through_the_decoder_whose_activations_are_not_kept(codec, monkeypatch):
    latents = torch.randn(5, 4, 4, 6, generator=torch.Generator().manual_seed(2), requires_grad=True)
    (expected,) = torch.autograd.grad(codec._decode(latents).square().sum(), latents)
    monkeypatch.setattr(vae, "IMAGES_AT_ONCE", 2)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.numel()) or tensor, lambda t: t):
        images = codec.decode(latents)
    (gradient,) = torch.autograd.grad(images.square().sum(), latents)
    assert torch.allclose(gradient, expected, atol=1e-5)
    assert sum(kept) <= latents.numel()  # the latents of each portion
