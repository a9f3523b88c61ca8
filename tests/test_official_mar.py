"""Official MAR checkpoints: to our folders and back, bit for bit, with every size taken from the weights."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from official_files import mar_content, official_args, official_config, vae_weights, write_mar, write_vae
from tiny_models import tiny_model, tiny_student

from marval_rl import MARConfig, MARModel, load_model
from marval_rl.cli.main import main
from marval_rl.data.class_names import IMAGENET_CLASS_NAMES
from marval_rl.errors import CheckpointError
from marval_rl.models.checkpoints import load_config
from marval_rl.models.official.mar_weights import mar_config, published_name, read_mar
from marval_rl.models.official.shapes import key_hash

PUBLISHED_FACTS = json.loads((Path(__file__).parent / "parity" / "golden" / "mar.json").read_text())["published_sizes"]
PUBLISHED = {"mar_base": MARConfig.base, "mar_large": MARConfig.large, "mar_huge": MARConfig.huge}


def assert_same_bits(actual: dict, expected: dict) -> None:
    """The same names in the same order, and the same dtypes, shapes and bytes."""
    assert list(actual) == list(expected)
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype and actual[name].shape == tensor.shape
        assert actual[name].detach().numpy().tobytes() == tensor.detach().numpy().tobytes(), name


def meta_weights(config: MARConfig) -> dict:
    with torch.device("meta"):
        return MARModel(config).state_dict()


def sizes(config: MARConfig) -> dict:
    """A configuration without what loading and saving note in it."""
    noted = ("transformers_version", "architectures", "dtype", "_name_or_path")
    return {name: value for name, value in config.to_dict().items() if name not in noted}


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    return write_mar(tmp_path / "checkpoint-last.pth")


# The command


@pytest.mark.parametrize(
    ("flags", "name", "key"), [((), "ema", "model_ema"), (("--weights", "model"), "model", "model")]
)
def test_a_checkpoint_becomes_a_folder(checkpoint, tmp_path, capsys, flags, name, key):
    assert main(["convert", str(checkpoint), str(tmp_path / "out"), *flags]) == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["config.json", "model.safetensors"]
    model = load_model(tmp_path / "out", one_step=False)
    assert_same_bits(model.state_dict(), mar_content()[key])
    assert sizes(model.config) == sizes(official_config())
    printed = capsys.readouterr().out
    assert (
        f"MAR ({'ema' if key == 'model_ema' else 'model'} weights): " in printed
        and key_hash(model.state_dict()) in printed
    )
    assert f"{sum(tensor.numel() for tensor in model.parameters()):,} parameters" in printed


def test_official_to_ours_to_official_changes_no_bit(checkpoint, tmp_path):
    back = tmp_path / "back.pth"
    assert main(["convert", str(checkpoint), str(tmp_path / "out")]) == 0
    assert main(["convert", str(tmp_path / "out"), str(back), "--to_official"]) == 0
    content = torch.load(back, weights_only=False)
    assert list(content) == ["model", "model_ema", "args"]
    assert_same_bits(content["model"], mar_content()["model_ema"])
    assert_same_bits(content["model_ema"], mar_content()["model_ema"])
    assert vars(content["args"]).items() <= vars(official_args(official_config())).items()
    assert sizes(read_mar(back).config) == sizes(official_config())


def test_ours_to_official_to_ours_changes_no_bit(tmp_path):
    model = tiny_model(5, **{"image_channels": 3, "encoder_num_heads": 4, "decoder_hidden_size": 24})
    model.save_pretrained(tmp_path / "model")
    assert main(["convert", str(tmp_path / "model"), str(tmp_path / "file.pth"), "--to_official"]) == 0
    restored = MARModel.from_pretrained(tmp_path / "file.pth")
    assert_same_bits(restored.state_dict(), model.state_dict())
    assert sizes(restored.config) == sizes(model.config)


def test_a_published_size_goes_back_under_its_name():
    from marval_rl.models.official.mar_weights import mar_checkpoint

    with torch.device("meta"):
        args = mar_checkpoint(MARModel(MARConfig.base()), "here")["args"]
    assert (args.model, args.diffloss_d, args.diffloss_w, args.num_sampling_steps) == ("mar_base", 6, 1024, "100")


def test_a_model_of_1000_classes_gets_the_names_of_imagenet(tmp_path):
    config = official_config(num_classes=1000)
    write_mar(tmp_path / "a.pth", config)
    assert main(["convert", str(tmp_path / "a.pth"), str(tmp_path / "out"), "--vae", "some/vae"]) == 0
    written = load_config(tmp_path / "out")
    assert written.class_names == IMAGENET_CLASS_NAMES and written.vae == "some/vae"
    assert main(["convert", str(tmp_path / "out"), str(tmp_path / "b.pth"), "--to_official"]) == 0
    assert_same_bits(torch.load(tmp_path / "b.pth", weights_only=False)["model"], mar_content(config)["model_ema"])


def test_a_converted_model_generates_through_its_converted_vae(checkpoint, tmp_path):
    write_vae(tmp_path / "kl16.ckpt", vae_weights((32,) * 5))
    assert main(["convert", str(tmp_path / "kl16.ckpt"), str(tmp_path / "vae")]) == 0
    assert main(["convert", str(checkpoint), str(tmp_path / "out"), "--vae", str(tmp_path / "vae")]) == 0
    sampling = ["--per_class", "1", "--steps", "2", "--diffusion_steps", "2"]
    assert main(["sample", str(tmp_path / "out"), "--output", str(tmp_path / "a.png"), *sampling]) == 0
    assert (tmp_path / "a.png").stat().st_size > 0


# Loading the file itself


@pytest.mark.parametrize("legacy", [False, True])
def test_the_file_itself_loads_with_its_average_weights(tmp_path, legacy):
    path = write_mar(tmp_path / "checkpoint-last.pth", legacy=legacy)
    average = mar_content()["model_ema"]
    assert_same_bits(MARModel.from_pretrained(path).state_dict(), average)
    assert_same_bits(load_model(str(path), one_step=False).state_dict(), average)
    assert sizes(load_config(path)) == sizes(official_config())
    assert MARModel.from_pretrained(path, dtype=torch.bfloat16).dtype == torch.bfloat16
    with pytest.raises(CheckpointError, match="is a many-step teacher, but a one-step student is needed"):
        load_model(path, one_step=True)


def test_a_loaded_model_outlives_its_file(checkpoint):
    model = MARModel.from_pretrained(checkpoint)
    checkpoint.write_bytes(b"\0" * checkpoint.stat().st_size)
    assert_same_bits(model.state_dict(), mar_content()["model_ema"])


def test_the_official_file_itself_generates(tmp_path):
    config = official_config(image_size=4, latent_stride=1, latent_channels=3)
    path = write_mar(tmp_path / "checkpoint-last.pth", config)
    sampling = ["--per_class", "1", "--steps", "2", "--diffusion_steps", "2"]
    assert main(["sample", str(path), "--output", str(tmp_path / "a.png"), *sampling]) == 0


@pytest.mark.parametrize("name", ["checkpoints/checkpoint-last.pth", "checkpoint-last.pth", "/nowhere/model.ckpt"])
def test_a_missing_file_is_not_taken_for_a_hub_id(name):
    for load in (load_model, load_config):
        with pytest.raises(CheckpointError, match=f"no model at {name}"):
            load(name)
    with pytest.raises(CheckpointError, match=f"no checkpoint at {name}"):
        MARModel.from_pretrained(name)


# What the weights and the arguments tell


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize("args", [{}, None], ids=["without args", "with args"])
def test_published_sizes_are_recognised_from_their_weights(name, args):
    expected = PUBLISHED[name]()
    weights = meta_weights(expected)
    if args is None:
        args = vars(official_args(expected, model=name))
        del args["encoder_num_heads"], args["decoder_num_heads"]
    config = mar_config(weights, args, Path("checkpoint-last.pth"))
    assert sizes(config) == sizes(expected)
    assert published_name(config) == name
    assert sum(tensor.numel() for tensor in weights.values()) == PUBLISHED_FACTS[name]["parameters"]
    assert key_hash(weights) == PUBLISHED_FACTS[name]["key_hash"]


def test_the_head_is_measured_not_assumed():
    weights = meta_weights(MARConfig.base(head_num_layers=3, head_hidden_size=1536, encoder_num_layers=7))
    config = mar_config(weights, {}, Path("a.pth"))
    assert (config.head_num_layers, config.head_hidden_size, config.encoder_num_layers) == (3, 1536, 7)
    assert config.decoder_num_layers == 12 and published_name(config) is None


def test_heads_that_nothing_tells_are_asked_for(tmp_path, fails):
    args = official_args(official_config())
    del args.encoder_num_heads, args.decoder_num_heads
    path = write_mar(tmp_path / "a.pth", args=args)
    line = fails(1, path, tmp_path / "out")
    assert line == f"{path} does not tell how many attention heads its 16 channels have: say so with --num_heads N"
    assert "16 is not a multiple of encoder_num_heads 5" in fails(1, path, tmp_path / "out", "--num_heads", 5)
    assert "num_heads must be at least 1, not 0" in fails(2, path, tmp_path / "out", "--num_heads", 0)
    assert main(["convert", str(path), str(tmp_path / "out"), "--num_heads", "4"]) == 0
    config = load_config(tmp_path / "out")
    assert (config.encoder_num_heads, config.decoder_num_heads) == (4, 4)


def test_a_checkpoint_without_args_has_the_published_settings(tmp_path):
    config = official_config(
        latent_channels=16, patch_size=1, attention_dropout=0.1, projection_dropout=0.1, num_diffusion_steps=100
    )
    path = write_mar(tmp_path / "a.pth", config, args=None)
    assert sizes(read_mar(path, num_heads=2).config) == sizes(config)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"class_num": 4}, "args.class_num is 4, but 3 by the weights"),
        ({"buffer_size": 3}, "args.buffer_size is 3, but 2 by the weights"),
        ({"diffloss_d": 3}, "args.diffloss_d is 3, but 2 by the weights"),
        ({"diffloss_w": 32}, "args.diffloss_w is 32, but 16 by the weights"),
        ({"img_size": 256}, "squared is 64, but 4 by the position table"),
        ({"img_size": 65}, "image_size 65 is not a multiple of latent_stride x patch_size = 16 x 2"),
        ({"patch_size": 1}, "squared is 16, but 4 by the position table"),
        ({"vae_embed_dim": 16}, "16 latent channels x patch size.2 is 64, but 16 by z_proj"),
        ({"patch_size": "two"}, "args.patch_size of .* is 'two', not a positive integer"),
        ({"vae_stride": 0}, "args.vae_stride of .* is 0, not a positive integer"),
        ({"num_sampling_steps": "ddim25"}, "args.num_sampling_steps of .* is 'ddim25'"),
        ({"attn_dropout": 1.5}, "args.attn_dropout of .* is 1.5, not a rate"),
        ({"encoder_num_heads": 3}, "16 is not a multiple of encoder_num_heads 3"),
        ({"encoder_num_heads": True}, "args.encoder_num_heads of .* is True"),
    ],
)
def test_arguments_that_contradict_the_weights(tmp_path, fails, changes, message):
    path = write_mar(tmp_path / "a.pth", args=official_args(official_config(), **changes))
    assert re.search(message, fails(1, path, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_published_name_must_have_its_width():
    weights = meta_weights(MARConfig.base())
    with pytest.raises(CheckpointError, match=r"args.model mar_large is 1024, but 768 by the enc"):
        mar_config(weights, {"model": "mar_large"}, Path("a.pth"))
    with pytest.raises(CheckpointError, match="--num_heads is 16, but 12 by args"):
        mar_config(weights, {"model": "mar_base"}, Path("a.pth"), num_heads=16)


# Weights that do not fit


def test_missing_extra_and_misshapen_weights_are_listed(tmp_path, fails):
    weights = mar_content()["model_ema"]
    for name in [name for name in weights if name.startswith("encoder_blocks.1.mlp")]:
        del weights[name]
    for index in range(7):
        weights[f"surplus.{index}"] = torch.zeros(1)
    weights["decoder_blocks.0.attn.qkv.weight"] = weights["decoder_blocks.0.attn.qkv.weight"].detach().T
    path = write_mar(tmp_path / "a.pth", model_ema=weights)
    assert fails(1, path, tmp_path / "out") == (
        f"the weights of {path} do not fit: 4 missing: encoder_blocks.1.mlp.fc1.weight, encoder_blocks.1.mlp.fc1.bias, "
        "encoder_blocks.1.mlp.fc2.weight, encoder_blocks.1.mlp.fc2.bias; 7 extra: surplus.0, surplus.1, surplus.2, "
        "surplus.3, surplus.4, ...; 1 of another shape: decoder_blocks.0.attn.qkv.weight [16, 48] instead of [48, 16]"
    )


def test_a_gap_between_blocks_is_noticed(tmp_path, fails):
    weights = {
        name.replace("encoder_blocks.1.", "encoder_blocks.999999999."): value
        for name, value in mar_content()["model_ema"].items()
    }
    line = fails(1, write_mar(tmp_path / "a.pth", model_ema=weights), tmp_path / "out")
    assert "12 missing: encoder_blocks.1." in line and "12 extra: encoder_blocks.999999999." in line


def test_weights_that_tell_the_sizes_must_be_there(tmp_path, fails):
    weights = mar_content()["model_ema"]
    del weights["z_proj.weight"]
    line = fails(1, write_mar(tmp_path / "a.pth", model_ema=weights), tmp_path / "out")
    assert line.endswith("do not fit: 1 missing: z_proj.weight")


# What is refused, and what stays as it was


def test_a_one_step_student_has_no_official_form(tmp_path, fails):
    tiny_student(image_channels=3).save_pretrained(tmp_path / "student")
    line = fails(1, tmp_path / "student", tmp_path / "a.pth", "--to_official")
    assert f"{tmp_path / 'student'} is a one-step student" in line
    assert not (tmp_path / "a.pth").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"clip_sample_range": 1.0}, "clip_sample_range 1.0, but the official code knows None only"),
        ({"num_train_timesteps": 500}, "num_train_timesteps 500, but the official code knows 1000 only"),
        ({"layer_norm_eps": 1e-5}, "layer_norm_eps 1e-05, but the official code knows 1e-06 only"),
        ({"image_channels": 1}, "image_channels 1, but the official code knows 3 only"),
    ],
)
def test_models_that_the_official_code_does_not_support_cannot_be_exported(tmp_path, fails, changes, message):
    tiny_model(**{"image_channels": 3, **changes}).save_pretrained(tmp_path / "model")
    assert message in fails(1, tmp_path / "model", tmp_path / "a.pth", "--to_official")


@pytest.mark.parametrize("options", [(), ("--to_official",)])
def test_an_output_that_cannot_be_written_is_refused_before_anything_is_read(tmp_path, fails, options):
    (tmp_path / "file").write_text("")
    line = fails(2, tmp_path / "nowhere", tmp_path / "file" / "out", *options)
    assert line.startswith(f"OUT's folder {tmp_path / 'file'} cannot be written: ")


def test_an_existing_folder_is_replaced_only_on_request(checkpoint, tmp_path, fails):
    out = tmp_path / "out"
    out.mkdir()
    assert main(["convert", str(checkpoint), str(out)]) == 0  # an empty folder is free
    before = (out / "model.safetensors").read_bytes()
    assert fails(2, checkpoint, out, "--weights", "model").startswith(f"{out} is there already")
    assert (out / "model.safetensors").read_bytes() == before
    assert main(["convert", str(checkpoint), str(out), "--weights", "model", "--overwrite"]) == 0
    assert (out / "model.safetensors").read_bytes() != before
    (out / "thesis.tex").write_text("mine")
    assert "holds more than a model, thesis.tex" in fails(2, checkpoint, out, "--overwrite")
    assert (out / "thesis.tex").read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-last.pth", "out"]  # no leftovers


def test_an_existing_file_is_replaced_only_on_request(checkpoint, tmp_path, fails):
    assert main(["convert", str(checkpoint), str(tmp_path / "out")]) == 0
    assert fails(2, tmp_path / "out", checkpoint, "--to_official").startswith(f"{checkpoint} is there already")
    assert main(["convert", str(tmp_path / "out"), str(checkpoint), "--to_official", "--overwrite"]) == 0
    assert "epoch" not in torch.load(checkpoint, weights_only=False)
    back = (tmp_path / "out", tmp_path / "out", "--to_official", "--overwrite")
    assert "is a folder: choose a path that is free" in fails(2, *back)
    assert "is a file: choose a path that is free" in fails(2, checkpoint, checkpoint, "--overwrite")


def test_a_failed_conversion_leaves_an_earlier_one_alone(checkpoint, tmp_path, fails):
    assert main(["convert", str(checkpoint), str(tmp_path / "out")]) == 0
    before = (tmp_path / "out" / "model.safetensors").read_bytes()
    content = mar_content()["model_ema"]
    content["decoder_norm.bias"] = content["decoder_norm.bias"].detach() + float("inf")
    broken = write_mar(tmp_path / "broken.pth", model_ema=content)
    line = fails(1, broken, tmp_path / "out", "--overwrite")
    assert line == f"the weight decoder_norm.bias of {broken} holds NaN or infinity"
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 3


def test_options_that_do_not_belong_are_errors(checkpoint, tmp_path, fails):
    write_vae(tmp_path / "kl16.ckpt")
    line = fails(2, tmp_path / "kl16.ckpt", tmp_path / "out", "--weights", "ema", "--num_heads", 4)
    assert line == f"--weights, --num_heads belong to a MAR, but {tmp_path / 'kl16.ckpt'} is a VAE"
    line = fails(2, checkpoint, tmp_path / "out", "--to_official", "--vae", "a/b")
    assert line == "--vae go with official files, and --to_official takes none of them"
    assert "invalid choice" in fails(2, checkpoint, tmp_path / "out", "--weights", "best")


def test_folders_and_files_are_distinguished(checkpoint, tmp_path, fails):
    assert main(["convert", str(checkpoint), str(tmp_path / "out")]) == 0
    assert "is a model folder already" in fails(1, tmp_path / "out", tmp_path / "again")
    assert "is a folder: give the checkpoint file in it" in fails(1, tmp_path, tmp_path / "again")
    assert f"no model folder at {checkpoint}" in fails(1, checkpoint, tmp_path / "b.pth", "--to_official")
