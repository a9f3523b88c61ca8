"""The KL-16 VAE at full size: official weights through our conversion into diffusers' AutoencoderKL."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from diffusers.models.autoencoders.vae import DecoderOutput
from mar_reference import GOLDEN, assert_parity, drawn_by_rule, golden, meets_parity
from torch import Tensor

from marval_rl.evaluation.image_set import to_pixels
from marval_rl.models import MARConfig
from marval_rl.models.official.shapes import key_hash
from marval_rl.models.official.vae_weights import read_vae, vae_checkpoint
from marval_rl.models.vae import VAECodec

FACTS = json.loads((GOLDEN / "vae.json").read_text())
PATH = Path("kl16.ckpt")
CHANNELS = (128, 128, 256, 256, 512)


@functools.cache
def rule_weights() -> dict[str, Tensor]:
    """The reference's weights under their official names; see golden/README.md."""
    with torch.device("meta"):
        autoencoder = AutoencoderKL(
            down_block_types=["DownEncoderBlock2D"] * 4 + ["AttnDownEncoderBlock2D"],
            up_block_types=["UpDecoderBlock2D"] * 5,
            block_out_channels=list(CHANNELS),
            layers_per_block=2,
            latent_channels=16,
            scaling_factor=0.2325,
        )
    shapes = {name: tensor.shape for name, tensor in vae_checkpoint(autoencoder, PATH)["model"].items()}
    return {name: drawn_by_rule(name, shape) for name, shape in shapes.items()}


def codec_with(**changes: Tensor) -> VAECodec:
    return VAECodec(read_vae({"model": rule_weights() | changes}, PATH))


@pytest.fixture(scope="module")
def codec() -> VAECodec:
    return codec_with()


@pytest.fixture(scope="module")
def images() -> Tensor:
    """The reference's image, [1, 3, 64, 64], moved from -1..1 to our 0..1."""
    return (golden("vae")["image"] + 1) / 2


def test_names_shapes_and_weights_are_those_of_the_figures():
    weights = rule_weights()
    assert key_hash(weights) == FACTS["key_hash"] and len(weights) == FACTS["tensors"]
    assert sum(tensor.numel() for tensor in weights.values()) == FACTS["parameters"]
    total = sum(tensor.double().sum().item() for tensor in weights.values())
    size = sum(tensor.double().abs().sum().item() for tensor in weights.values())
    assert size == pytest.approx(FACTS["rule_weights_abs_sum"], rel=1e-9)
    assert total == pytest.approx(FACTS["rule_weights_sum"], rel=1e-6)


@torch.no_grad()
def test_encoder(codec):
    figures = golden("vae")
    assert_parity(codec.autoencoder.encoder(figures["image"]), figures["encoder_out"])


@torch.no_grad()
def test_moments_and_samples(codec, images, monkeypatch):
    figures = golden("vae")
    moments = codec.moments(images)
    assert_parity(moments, figures["moments"])
    mean, log_variance = moments.chunk(2, dim=1)
    assert_parity(mean, figures["mean"])
    assert_parity(log_variance.clamp(-30, 20), figures["logvar"])
    posterior = codec.autoencoder.encode(figures["image"]).latent_dist
    assert_parity(posterior.std, figures["std"])
    assert_parity(posterior.kl(), figures["kl"])
    monkeypatch.setattr("diffusers.models.autoencoders.vae.randn_tensor", lambda *_, **__: figures["sample_noise"])
    assert_parity(codec.from_moments(moments), figures["sample"] * 0.2325)
    assert_parity(codec.encode(images), figures["sample"] * 0.2325)


@pytest.mark.parametrize(("latents", "decoded"), [("z", "decode"), ("mean", "mean_decode")])
@torch.no_grad()
def test_decoder(codec, latents, decoded):
    figures = golden("vae")
    assert_parity(codec.autoencoder.decode(figures[latents]).sample, figures[decoded])
    images = codec.decode(figures[latents] * 0.2325)
    assert_parity(images, ((figures[decoded] + 1) / 2).clamp(0, 1))


def test_bytes(codec, monkeypatch):
    figures = golden("vae")
    assert figures["u8_input"].max() > 1  # clipped, not wrapped
    monkeypatch.setattr(codec.autoencoder, "decode", lambda _: DecoderOutput(figures["u8_input"]))
    images = codec.decode(torch.zeros(1, 16, 4, 4))
    assert torch.equal(to_pixels(images)[0].permute(1, 2, 0), figures["u8_rgb_hwc"])
    assert not torch.equal((images * 255).to(torch.uint8)[0].permute(1, 2, 0), figures["u8_rgb_hwc"])  # truncated


def test_kl16_is_the_vae_of_the_published_models(codec, tmp_path):
    codec.autoencoder.save_pretrained(tmp_path)
    loaded = VAECodec.from_pretrained(tmp_path, MARConfig.base())
    assert loaded.scale == 0.2325 and loaded.shift == 0


# Controls: what a wrong conversion would do must fail


@pytest.mark.parametrize(
    "swapped",
    [
        ("encoder.mid.attn_1.q.weight", "encoder.mid.attn_1.k.weight"),
        ("encoder.down.4.attn.0.v.weight", "encoder.down.4.attn.1.v.weight"),
        ("encoder.mid.block_1.conv1.weight", "encoder.mid.block_2.conv1.weight"),
        ("encoder.down.0.downsample.conv.weight", "encoder.down.1.downsample.conv.weight"),
    ],
)
@torch.no_grad()
def test_control_swapped_weights_fail_in_the_encoder(images, swapped):
    one, other = swapped
    wrong = codec_with(**{one: rule_weights()[other], other: rule_weights()[one]})
    assert not meets_parity(wrong.moments(images), golden("vae")["moments"])


@torch.no_grad()
def test_control_swapped_levels_fail_in_the_decoder():
    pair = ("decoder.up.2.upsample.conv.weight", "decoder.up.3.upsample.conv.weight")
    wrong = codec_with(**{pair[0]: rule_weights()[pair[1]], pair[1]: rule_weights()[pair[0]]})
    assert not meets_parity(wrong.autoencoder.decode(golden("vae")["z"]).sample, golden("vae")["decode"])


@torch.no_grad()
def test_control_another_epsilon_in_the_norms_fails(images):
    wrong = codec_with()
    for module in wrong.autoencoder.modules():
        if isinstance(module, torch.nn.GroupNorm):
            module.eps = 1e-3
    assert not meets_parity(wrong.moments(images), golden("vae")["moments"])
