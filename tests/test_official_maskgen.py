"""Official MaskGen-KL and TA-TiTok weights: to our folders and back, bit for bit; what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_text import tiny_maskgen, tiny_tatitok

from marval_rl import load_model
from marval_rl.cli.main import main
from marval_rl.errors import CheckpointError
from marval_rl.models.checkpoints import load_config
from marval_rl.models.maskgen.codec import load_tokenizer
from marval_rl.models.maskgen.config import MaskGenConfig
from marval_rl.models.maskgen.model import MaskGenModel
from marval_rl.models.maskgen.tatitok import TATiTokConfig, TATiTokModel
from marval_rl.models.official.maskgen_files import OfficialFiles
from marval_rl.models.official.maskgen_weights import maskgen_config, published_name
from marval_rl.models.official.shapes import key_hash
from marval_rl.models.official.tatitok_weights import tatitok_config

FACTS = json.loads((Path(__file__).parent / "parity" / "golden" / "maskgen" / "maskgen.json").read_text())
PUBLISHED = FACTS["published"]


def published_settings(name: str) -> dict:
    """The nested configuration of a published model."""
    return json.loads(json.dumps(PUBLISHED[name]["config"]))


def tiny_settings() -> dict:
    settings = published_settings("maskgen_kl_l")
    settings["model"]["maskgen"] |= {
        "decoder_embed_dim": 32,
        "decoder_depth": 2,
        "decoder_num_heads": 4,
        "micro_condition_embed_dim": 8,
        "sample_aesthetic_score": 6.0,
        "something_new": [1, 2],
    }
    settings["model"]["vq_model"] |= {"num_latent_tokens": 8, "token_size": 4, "text_embed_dim": 16}
    settings["model"]["vq_model"]["text_context_length"] = 6
    settings["losses"] = {"diffloss_d": 2, "diffloss_w": 32}
    settings["dataset"]["preprocessing"]["crop_size"] = 16
    return settings


def tiny_tokenizer_settings() -> dict:
    settings = published_settings("tatitok_bl32_vae")
    settings["model"]["vq_model"] |= {"num_latent_tokens": 8, "token_size": 4}
    settings["model"]["vq_model"] |= {"vit_enc_patch_size": 4, "vit_dec_patch_size": 4}
    settings["model"]["vq_model"] |= {"vit_enc_num_heads": 2, "vit_dec_num_heads": 4}
    return settings


def write_official(folder: Path, model: torch.nn.Module, settings: dict) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(settings))
    save_file(model.state_dict(), folder / "model.safetensors")
    return folder


@pytest.fixture
def official(tmp_path) -> Path:
    return write_official(tmp_path / "official", tiny_maskgen(), tiny_settings())


@pytest.fixture
def official_tokenizer(tmp_path) -> Path:
    return write_official(tmp_path / "official_tokenizer", tiny_tatitok(), tiny_tokenizer_settings())


def assert_same_bits(actual: dict, expected: dict) -> None:
    assert sorted(actual) == sorted(expected)
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype and actual[name].shape == tensor.shape
        assert actual[name].detach().numpy().tobytes() == tensor.detach().numpy().tobytes(), name


def test_official_to_ours_to_official_changes_no_bit(official, tmp_path, capsys):
    ours, back, again = (tmp_path / name for name in ("ours", "back", "again"))
    assert main(["convert", str(official), str(ours), "--vae", "some/tokenizer"]) == 0
    assert sorted(path.name for path in ours.iterdir()) == ["config.json", "model.safetensors"]
    model = load_model(ours, one_step=False)
    assert isinstance(model, MaskGenModel)
    assert_same_bits(model.state_dict(), tiny_maskgen().state_dict())
    assert (model.config.aesthetic_score, model.config.num_heads, model.config.text_length) == (6.0, 4, 6)
    assert (model.config.vae, model.config.latent_scale, model.config.image_size) == ("some/tokenizer", 0.7525, 16)
    assert key_hash(model.state_dict()) in capsys.readouterr().out

    assert main(["convert", str(ours), str(back), "--to_official"]) == 0
    assert_same_bits(load_file(back / "model.safetensors"), load_file(official / "model.safetensors"))
    written, settings = json.loads((back / "config.json").read_text()), tiny_settings()
    for part in ("maskgen", "vq_model"):
        common = written["model"][part].keys() & settings["model"][part].keys()
        assert len(common) >= 8
        expected = {**settings["model"][part], "num_iter": 8}  # K = L
        assert all(written["model"][part][name] == expected[name] for name in common)
    assert main(["convert", str(back), str(again), "--vae", "some/tokenizer"]) == 0
    assert (again / "config.json").read_text() == (ours / "config.json").read_text()


def test_a_tokenizer_there_and_back(official_tokenizer, tmp_path, capsys):
    ours, back = tmp_path / "ours", tmp_path / "back"
    assert main(["convert", str(official_tokenizer), str(ours)]) == 0
    tokenizer = load_tokenizer(ours)
    assert_same_bits(tokenizer.state_dict(), tiny_tatitok().state_dict())
    assert (tokenizer.config.encoder_num_heads, tokenizer.config.decoder_num_heads) == (2, 4)
    assert "TA-TiTok: " in capsys.readouterr().out
    assert main(["convert", str(ours), str(back), "--to_official"]) == 0
    assert_same_bits(load_file(back / "model.safetensors"), load_file(official_tokenizer / "model.safetensors"))
    written = json.loads((back / "config.json").read_text())["model"]["vq_model"]
    assert written["vit_dec_num_heads"] == 4


@pytest.mark.parametrize("kind", ["maskgen", "tatitok"])
def test_a_plain_state_dict(tmp_path, kind, fails):
    """The .bin files of fun-research/TA-TiTok: no settings, so heads of unpublished widths must be given."""
    model = tiny_maskgen() if kind == "maskgen" else tiny_tatitok()
    torch.save(model.state_dict(), tmp_path / "weights.bin")
    command = ["convert", str(tmp_path / "weights.bin"), str(tmp_path / "out")]
    message = fails(1, *command[1:])
    assert "attention heads its" in message
    if kind == "maskgen":
        assert main([*command, "--num_heads", "4"]) == 0
        assert_same_bits(load_model(tmp_path / "out").state_dict(), model.state_dict())


@pytest.mark.parametrize("name", ["maskgen_kl_l", "maskgen_kl_xl", "tatitok_bl32_vae"])
@pytest.mark.parametrize("with_settings", [True, False])
def test_published_sizes(name, with_settings):
    """At full size, on the meta device: from names, shapes and the published settings, or without them."""
    kinds = {
        "maskgen_kl_l": lambda: MaskGenModel(MaskGenConfig.large()),
        "maskgen_kl_xl": lambda: MaskGenModel(MaskGenConfig.extra_large()),
        "tatitok_bl32_vae": lambda: TATiTokModel(TATiTokConfig()),
    }
    with torch.device("meta"):
        model = kinds[name]()
    settings = published_settings(name) if with_settings else {}
    files = OfficialFiles(dict(model.state_dict()), settings, Path(name))
    config = tatitok_config(files) if name == "tatitok_bl32_vae" else maskgen_config(files)
    assert config.to_dict() == model.config.to_dict()
    if name != "tatitok_bl32_vae":
        assert published_name(config) == name


def damaged(change) -> OfficialFiles:
    weights, settings = dict(tiny_maskgen().state_dict()), tiny_settings()
    change(weights, settings)
    return OfficialFiles(weights, settings, Path("x"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w, s: w.pop("mask_token"), "1 missing: mask_token"),
        (lambda w, s: w.update(more=torch.zeros(1)), "1 extra: more"),
        (lambda w, s: w.update(mask_token=torch.zeros(1, 1, 31)), r"mask_token \[1, 1, 31\] instead of"),
        (lambda w, s: s["model"]["maskgen"].update(decoder_depth=3), "decoder_depth is 3, but 2 by the weights"),
        (lambda w, s: s["model"]["maskgen"].update(decoder_num_heads="many"), "decoder_num_heads .* 'many'"),
        (lambda w, s: s["model"]["maskgen"].pop("decoder_num_heads"), "--num_heads N"),
        (lambda w, s: s["model"]["vq_model"].update(scale_factor="x"), "could not convert"),
    ],
)
def test_weights_that_do_not_fit_are_refused(change, message):
    with pytest.raises(CheckpointError, match=message):
        maskgen_config(damaged(change))


def test_what_convert_refuses(official, official_tokenizer, tmp_path, fails):
    assert "--weights ema belongs to a MAR" in fails(2, official, tmp_path / "a", "--weights", "ema")
    assert "is a tokenizer" in fails(2, official_tokenizer, tmp_path / "b", "--num_heads", "4")
    ours = tmp_path / "ours"
    assert main(["convert", str(official), str(ours)]) == 0
    assert "is a model folder already" in fails(1, ours, tmp_path / "c")
    student = tiny_maskgen(one_step_timestep=700)
    student.save_pretrained(tmp_path / "student")
    assert "is a one-step student" in fails(1, tmp_path / "student", tmp_path / "d", "--to_official")
    tiny_maskgen(clip_sample_range=1.0).save_pretrained(tmp_path / "clipped")
    message = fails(1, tmp_path / "clipped", tmp_path / "e", "--to_official")
    assert "clip_sample_range 1.0, but the official code knows None only" in message


def test_official_weights_are_not_a_model_folder_yet(official):
    with pytest.raises(CheckpointError, match="marval-rl convert"):
        load_config(official)


def test_a_hub_id_is_downloaded(official, tmp_path, monkeypatch):
    asked = []

    def snapshot(name, allow_patterns):
        asked.append((name, allow_patterns))
        return str(official)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    assert main(["convert", "someone/generator_maskgen", str(tmp_path / "out")]) == 0
    assert asked == [("someone/generator_maskgen", ["config.json", "model.safetensors"])]
    assert_same_bits(load_model(tmp_path / "out").state_dict(), tiny_maskgen().state_dict())


def test_prompts_are_not_saved_with_a_model(tmp_path):
    tiny_maskgen().save_pretrained(tmp_path / "model")
    config = load_config(tmp_path / "model")
    assert (config.num_classes, config.class_names) == (0, None)
