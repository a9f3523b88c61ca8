"""The official VAE's file (kl16.ckpt) <-> diffusers' AutoencoderKL: names, order, sizes, and every bit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from official_files import vae_shapes, vae_weights, write_vae

from marval_rl.cli.main import main
from marval_rl.errors import CheckpointError
from marval_rl.models.official.reading import read_checkpoint
from marval_rl.models.official.shapes import key_hash
from marval_rl.models.official.vae_weights import official_names, read_vae, vae_checkpoint
from marval_rl.models.vae import VAECodec, load_autoencoder, stride_of

GOLDEN = json.loads((Path(__file__).parent / "parity" / "golden" / "vae.json").read_text())
KL16 = {"channels": (128, 128, 256, 256, 512), "blocks": 2, "latents": 16}


def meta_weights(**sizes) -> dict[str, torch.Tensor]:
    return {name: torch.empty(shape, device="meta") for name, shape in vae_shapes(**sizes).items()}


def test_kl16_has_the_official_names_and_shapes():
    weights = meta_weights(**KL16)
    assert key_hash(weights) == GOLDEN["key_hash"] and len(weights) == GOLDEN["tensors"]
    with torch.device("meta"):
        names = official_names(
            AutoencoderKL(
                down_block_types=("DownEncoderBlock2D",) * 4 + ("AttnDownEncoderBlock2D",),
                up_block_types=("UpDecoderBlock2D",) * 5,
                block_out_channels=KL16["channels"],
                layers_per_block=2,
                latent_channels=16,
            )
        )
    assert list(names) == list(weights)  # the same names, in the order of the official state dict
    assert len(set(names.values())) == len(names)


def test_the_decoders_levels_count_the_other_way_round():
    with torch.device("meta"):
        names = official_names(
            AutoencoderKL(
                down_block_types=("DownEncoderBlock2D",) * 3,
                up_block_types=("UpDecoderBlock2D",) * 3,
                block_out_channels=(32, 64, 64),
                layers_per_block=1,
            )
        )
    assert names["encoder.down.0.block.0.conv1.weight"] == "encoder.down_blocks.0.resnets.0.conv1.weight"
    assert names["decoder.up.2.block.1.norm2.bias"] == "decoder.up_blocks.0.resnets.1.norm2.bias"
    assert names["decoder.up.1.upsample.conv.bias"] == "decoder.up_blocks.1.upsamplers.0.conv.bias"
    assert names["decoder.up.0.block.0.nin_shortcut.weight"] == "decoder.up_blocks.2.resnets.0.conv_shortcut.weight"
    assert names["decoder.mid.attn_1.proj_out.weight"] == "decoder.mid_block.attentions.0.to_out.0.weight"


@pytest.mark.parametrize(
    "sizes",
    [
        {"channels": (32, 64, 64), "blocks": 1, "latents": 4},
        {"channels": (32, 32, 96, 64, 128), "blocks": 2, "latents": 16},
        {"channels": (64,), "blocks": 3, "latents": 3, "attention": False},
    ],
)
def test_official_to_ours_to_official_changes_no_bit(tmp_path, sizes):
    weights = vae_weights(**sizes)
    path, back = write_vae(tmp_path / "kl16.ckpt", weights), tmp_path / "back.ckpt"
    assert main(["convert", str(path), str(tmp_path / "vae")]) == 0
    assert main(["convert", str(tmp_path / "vae"), str(back), "--to_official"]) == 0
    content = torch.load(back, weights_only=True)
    assert list(content) == ["model"] and list(content["model"]) == list(weights)
    for name, tensor in weights.items():
        restored = content["model"][name]
        assert restored.dtype == tensor.dtype and restored.shape == tensor.shape, name
        assert restored.numpy().tobytes() == tensor.numpy().tobytes(), name


def test_the_folder_is_that_of_diffusers(tmp_path, capsys):
    path = write_vae(tmp_path / "kl16.ckpt")
    assert main(["convert", str(path), str(tmp_path / "vae")]) == 0
    names = sorted(entry.name for entry in (tmp_path / "vae").iterdir())
    assert names == ["config.json", "diffusion_pytorch_model.safetensors"]
    printed = capsys.readouterr().out
    assert "VAE (model weights): " in printed and key_hash(vae_weights()) in printed
    autoencoder = AutoencoderKL.from_pretrained(tmp_path / "vae")
    config = autoencoder.config
    assert list(config.block_out_channels) == [32, 64, 64] and config.layers_per_block == 1
    assert (config.latent_channels, config.scaling_factor, stride_of(autoencoder)) == (4, 0.2325, 4)
    codec = VAECodec.from_pretrained(tmp_path / "vae")
    assert codec.moments(torch.rand(2, 3, 16, 24)).shape == (2, 8, 4, 6)


def test_weights_of_the_vaes_own_training_are_left_out_and_nothing_else(tmp_path, fails):
    weights = vae_weights()
    extra = {"loss.logvar": torch.zeros(1), "loss.discriminator.main.0.weight": torch.zeros(2, 2)}
    path = write_vae(tmp_path / "kl16.ckpt", weights | extra)
    assert main(["convert", str(path), str(tmp_path / "vae")]) == 0
    assert list(vae_checkpoint(load_autoencoder(tmp_path / "vae"), path)["model"]) == list(weights)
    path = write_vae(tmp_path / "other.ckpt", weights | {"lossless.weight": torch.zeros(1)})
    assert fails(1, path, tmp_path / "b") == f"the weights of {path} do not fit: 1 extra: lossless.weight"


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("decoder.up.0.block.1.conv2.bias", None, "1 missing: decoder.up.0.block.1.conv2.bias"),
        ("encoder.down.1.block.0.nin_shortcut.weight", None, "1 missing: encoder.down.1.block.0.nin_shortcut.weight"),
        ("encoder.down.1.block.0.conv1.weight", None, "1 missing: encoder.down.1.block.0.conv1.weight"),
        ("encoder.mid.attn_1.q.weight", (64, 64), "encoder.mid.attn_1.q.weight [64, 64] instead of [64, 64, 1, 1]"),
        ("decoder.conv_in.weight", (4, 64, 3, 3), "encoder.conv_out.weight [8, 64, 3, 3] instead of [128, 64, 3, 3]"),
        ("encoder.conv_in.weight", (32,), "encoder.conv_in.weight of .* has the shape"),
        ("encoder.down.0.block.0.conv1.weight", (30, 32, 3, 3), "has blocks of [30, 64, 64] channels"),
    ],
)
def test_weights_that_do_not_fit_are_named(tmp_path, fails, name, shape, message):
    weights = vae_weights()
    del weights[name]
    if shape is not None:
        weights[name] = torch.zeros(shape)
    line = fails(1, write_vae(tmp_path / "kl16.ckpt", weights), tmp_path / "vae")
    assert all(part in line for part in message.split(".*"))
    assert not (tmp_path / "vae").exists()


def test_a_weight_that_is_not_finite_is_named(tmp_path, fails):
    weights = vae_weights()
    weights["decoder.mid.attn_1.k.weight"][3, 5] = float("nan")
    path = write_vae(tmp_path / "kl16.ckpt", weights)
    assert fails(1, path, tmp_path / "vae").endswith(f"of {path} holds NaN or infinity")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scaling_factor": 0.18215}, "scaling_factor 0.18215, but the official VAE has 0.2325"),
        ({"shift_factor": 0.1}, "shift_factor 0.1, but the official VAE has None"),
        ({"norm_num_groups": 8}, "norm_num_groups 8, but the official VAE has 32"),
        ({"use_quant_conv": False}, "use_quant_conv False, but the official VAE has True"),
        ({"act_fn": "gelu"}, "act_fn gelu, but the official VAE has silu"),
    ],
)
def test_another_vae_has_no_official_form(tmp_path, fails, changes, message):
    sizes = {"block_out_channels": (32, 32), "latent_channels": 4, "layers_per_block": 1, "scaling_factor": 0.2325}
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    autoencoder = AutoencoderKL(**{**sizes, **blocks, **changes})
    autoencoder.save_pretrained(tmp_path / "vae")
    assert message in fails(1, tmp_path / "vae", tmp_path / "a.ckpt", "--to_official")
    assert not (tmp_path / "a.ckpt").exists()


def test_the_vaes_attention_may_stand_in_the_decoder_too(tmp_path):
    """Latent diffusion's own autoencoders have it there; the official MAR's has not."""
    autoencoder = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
        up_block_types=("AttnUpDecoderBlock2D", "UpDecoderBlock2D"),
        block_out_channels=(32, 64),
        layers_per_block=1,
        scaling_factor=0.2325,
    )
    content = vae_checkpoint(autoencoder, tmp_path)
    assert "decoder.up.1.attn.1.proj_out.weight" in content["model"]
    torch.save(content, tmp_path / "a.ckpt")
    restored = read_vae(read_checkpoint(tmp_path / "a.ckpt"), tmp_path / "a.ckpt")
    images = torch.rand(1, 3, 8, 8)
    with torch.no_grad():
        assert torch.equal(restored(images).sample, autoencoder.eval()(images).sample)


def test_a_file_of_neither_kind_is_refused(tmp_path, fails):
    torch.save({"model": {"weight": torch.zeros(1)}, "model_ema": {"weight": torch.zeros(1)}}, tmp_path / "a.pth")
    line = fails(1, tmp_path / "a.pth", tmp_path / "out")
    assert line.startswith(f"the weights of {tmp_path / 'a.pth'} do not fit: 7 missing: class_emb.weight")
    with pytest.raises(CheckpointError, match="has no 'model' weights"):
        read_vae({"state_dict": {}}, tmp_path / "a.pth")
