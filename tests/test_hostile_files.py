"""Files that are damaged, no checkpoints, or meant to do harm: one clear line each, and nothing in them is run."""

from __future__ import annotations

import io
import pickle
import re
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from official_files import mar_content, official_args, official_config, vae_weights, write_mar, write_vae

from marval_rl.cli.main import main
from marval_rl.errors import CheckpointError
from marval_rl.models import MARModel
from marval_rl.models.checkpoints import load_config, load_model
from marval_rl.models.official.reading import read_checkpoint


class Runs:
    """Pickled, it calls `function(*arguments)` in whoever unpickles it."""

    def __init__(self, function: Callable, *arguments: Any):
        self.call = (function, arguments)

    def __reduce__(self) -> tuple:
        return self.call


@pytest.fixture
def refused(tmp_path, capsys):
    """`refused(path)`: every way to open the file fails with the same one line, which is returned without its path.

    Nothing is written, and no file called "canary" appears.
    """

    def check(path: Path) -> str:
        before = sorted(tmp_path.rglob("*"))
        assert main(["convert", str(path), str(tmp_path / "out")]) == 1
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1 and lines[0].startswith("marval-rl: error: "), lines
        line = lines[0].removeprefix("marval-rl: error: ")
        with pytest.raises(CheckpointError) as error:
            MARModel.from_pretrained(path)
        assert " ".join(str(error.value).split()) == line
        with pytest.raises(CheckpointError):
            load_model(path)
        assert sorted(tmp_path.rglob("*")) == before
        assert str(path) in line
        return line.replace(str(path), "FILE")

    return check


# Pickles that would run code


def touch(path: Path) -> Runs:
    return Runs(exec, f"open({str(path)!r}, 'w')")


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("place", ["whole", "model_ema", "weight", "args", "argument", "optimizer"])
def test_code_inside_a_checkpoint_is_not_run(tmp_path, refused, place, protocol):
    content, harm = mar_content(), touch(tmp_path / "canary")
    if place == "whole":
        content = harm
    elif place == "weight":
        content["model_ema"]["decoder_norm.weight"] = harm
    elif place == "argument":
        content["args"].device = harm
    else:
        content[place] = harm
    torch.save(content, tmp_path / "a.pth", pickle_protocol=protocol)
    line = refused(tmp_path / "a.pth")
    assert re.search(r"\b(builtins\.)?exec\b", line)
    torch.load(tmp_path / "a.pth", weights_only=False)  # control: the file is as bad as it looks
    assert (tmp_path / "canary").exists()


def test_code_inside_a_legacy_checkpoint_is_not_run(tmp_path, refused):
    write_mar(tmp_path / "a.pth", legacy=True, epoch=touch(tmp_path / "canary"))
    assert refused(tmp_path / "a.pth").startswith("FILE names exec, which does not belong to weights")


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_a_bare_pickle_is_not_opened(tmp_path, refused, protocol):
    (tmp_path / "a.pth").write_bytes(pickle.dumps({"model": touch(tmp_path / "canary")}, protocol))
    line = refused(tmp_path / "a.pth")
    assert line.startswith("FILE is a bare pickle, not a file of torch.save, and was not opened (it names ")
    assert re.search(r"(builtins|__builtin__)\.exec\)$", line)


@pytest.mark.parametrize(
    ("module", "name"), [("os", "system"), ("posix", "system"), ("builtins", "eval"), ("subprocess", "Popen")]
)
def test_the_forbidden_name_is_reported(tmp_path, refused, module, name):
    """Written by hand, as pickle follows os.system to the platform's own module."""
    with zipfile.ZipFile(tmp_path / "a.pth", "w") as archive:
        archive.writestr(
            "a/data.pkl", b"\x80\x02c%s\n%s\nX\x04\x00\x00\x00true\x85R." % (module.encode(), name.encode())
        )
        archive.writestr("a/version", b"3\n")
    full = name if module == "builtins" else f"{module}.{name}"
    assert refused(tmp_path / "a.pth") == (
        f"FILE names {full}, which does not belong to weights: loading it could run code, so it was refused"
    )


def test_classes_that_are_harmless_but_no_weights_are_refused_too(tmp_path, refused):
    args = official_args(official_config(), output_dir=Path("here"))
    assert "FILE names pathlib." in refused(write_mar(tmp_path / "a.pth", args=args))


def test_the_allowance_for_the_command_line_ends_with_the_reading(tmp_path):
    path = write_mar(tmp_path / "a.pth")
    read_checkpoint(path)
    with pytest.raises(pickle.UnpicklingError, match=r"argparse\.Namespace"):
        torch.load(path, weights_only=True)


class Shadowed:
    """Pickled, it becomes an OrderedDict that carries attributes under the names of its own methods."""

    def __init__(self, content: dict):
        self.content = content

    def __reduce__(self) -> tuple:
        return OrderedDict, (), {"items": 5, "keys": 5, "get": 5}, None, iter(self.content.items())


def test_methods_that_a_file_brings_along_are_not_called(tmp_path):
    content = mar_content()
    torch.save(Shadowed(content | {"model_ema": Shadowed(content["model_ema"])}), tmp_path / "a.pth")
    assert torch.load(tmp_path / "a.pth", weights_only=False).get == 5
    restored = MARModel.from_pretrained(tmp_path / "a.pth")
    assert torch.equal(restored.mask_token, content["model_ema"]["mask_token"])


# Files that were cut off


@pytest.mark.parametrize(
    ("legacy", "kept"), [(False, 0.001), (False, 0.5), (False, 0.9999), (True, 0.5), (True, 0.9999)]
)
def test_truncated_files(tmp_path, refused, legacy, kept):
    path = write_mar(tmp_path / "a.pth", legacy=legacy)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * kept)])
    assert re.match("FILE is (truncated or )?damaged", refused(path))


def test_an_empty_file(tmp_path, refused):
    (tmp_path / "a.pth").touch()
    assert refused(tmp_path / "a.pth") == "FILE is empty: its writing or download was cut off"


def test_a_hole_in_the_middle_of_the_pickle(tmp_path, refused):
    path = write_mar(tmp_path / "a.pth")
    whole = bytearray(path.read_bytes())
    start = whole.index(b"model_ema")
    whole[start : start + 400] = bytes(400)
    path.write_bytes(whole)
    assert "FILE is" in refused(path)


# Files that are something else


def png() -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "png")
    return buffer.getvalue()


def archive(**members: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        for name, data in members.items():
            file.writestr(f"a/{name.replace('_', '.')}", data)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"dear diary, today", "FILE is not a checkpoint: it begins with b'dear dia'"),
        (b"N." + b"0" * 100, "FILE is not a checkpoint: it begins with b'N.000000'"),
        (b"cos\nsystem\n(S'true'\ntR.", "FILE is not a checkpoint: it begins with b'cos\\nsyst'"),
        (png(), "FILE is not a checkpoint: it begins with b'\\x89PNG"),
        (b"\n<!DOCTYPE html><html>quota exceeded", "FILE is a web page, not a checkpoint: the download failed"),
        (archive(word_xml=b"text"), "FILE is a zip file, but torch.save did not write it (it has no data.pkl)"),
        (archive(data_pkl=b"N.", constants_pkl=b""), "FILE is a TorchScript program, not a checkpoint"),
        (archive(data_pkl=b"N."), "FILE is "),
        (b"PK\x03\x04" + bytes(500), "FILE is truncated or damaged: File is not a zip file"),
    ],
    ids=["text", "text that unpickles", "old pickle", "png", "html", "zip", "TorchScript", "None", "zip start"],
)
def test_files_that_are_not_checkpoints(tmp_path, refused, data, message):
    (tmp_path / "checkpoint-last.pth").write_bytes(data)
    assert refused(tmp_path / "checkpoint-last.pth").startswith(message)


def test_a_safetensors_file_is_sent_to_its_folder(tmp_path, refused):
    main(["convert", str(write_mar(tmp_path / "a.pth")), str(tmp_path / "model")])
    line = refused(tmp_path / "model" / "model.safetensors")
    assert line == "FILE is a safetensors file, not an official checkpoint: give the model folder it lies in"


def test_a_checkpoint_that_was_packed_again(tmp_path, refused):
    path = write_mar(tmp_path / "a.pth")
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(tmp_path / "b.pth", "w", zipfile.ZIP_DEFLATED) as new:
        for member in old.infolist():
            new.writestr(member.filename, old.read(member))
    assert refused(tmp_path / "b.pth").startswith("FILE is compressed, which torch.save never does")


def test_a_folder_and_a_missing_file(tmp_path, capsys):
    for path, message in ((tmp_path, "is a folder"), (tmp_path / "a.pth", "the file does not exist")):
        assert main(["convert", str(path), str(tmp_path / "out")]) == 1
        assert message in capsys.readouterr().err
    with pytest.raises(CheckpointError, match="holds no model"):
        load_config(tmp_path)


# Checkpoints with the wrong things in them


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "FILE is not a checkpoint: it holds a list, not a dict"),
        ({}, "FILE has no 'model_ema' weights; it holds nothing"),
        ({"state_dict": {}, "epoch": 3}, "FILE has no 'model_ema' weights; it holds 'state_dict', 'epoch'"),
        ({"model_ema": {}}, "'model_ema' of FILE holds no weights: it is a dict"),
        ({"model_ema": [torch.zeros(1)]}, "'model_ema' of FILE holds no weights: it is a list"),
        ({"model_ema": {3: torch.zeros(1)}}, "FILE has a weight without a proper name: 3"),
        ({"model_ema": {"\033[2J": torch.zeros(1)}}, "FILE has a weight without a proper name: '\\x1b[2J'"),
        ({"model_ema": {"a": 1.5}}, "a of FILE is not a tensor but a float"),
        ({"model_ema": {"a": torch.zeros(3, dtype=torch.int64)}}, "a of FILE holds torch.int64; official weights are"),
        ({"model_ema": {"a": torch.zeros(3, dtype=torch.bool)}}, "a of FILE holds torch.bool; official weights are"),
        ({"model_ema": {"a": torch.zeros(3).half()}}, "a of FILE holds torch.float16; official weights are"),
        ({"model_ema": {"a": torch.zeros(0, 4)}}, "a of FILE is empty: its shape is [0, 4]"),
        (
            {"model_ema": {"a": torch.zeros(3, device="meta")}},
            "a of FILE is a sparse or quantised tensor, or one without data",
        ),
        (
            {"model_ema": {"a": torch.eye(3).to_sparse()}},
            "a of FILE is a sparse or quantised tensor, or one without data",
        ),
        ({"model_ema": {"a": torch.zeros(1).expand(10**6, 10**6)}}, "a of FILE claims 1,000,000,000,000 numbers, but"),
        ({"model_ema": {"a": torch.zeros(1)}}, "the weights of FILE do not fit: 7 missing: class_emb.weight"),
        (mar_content() | {"args": {"img_size": 64}}, "'args' of FILE is a dict, not an argparse.Namespace"),
    ],
)
def test_contents_that_are_not_weights(tmp_path, refused, content, message):
    torch.save(content, tmp_path / "a.pth")
    assert refused(tmp_path / "a.pth").startswith(message)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite(tmp_path, refused, value):
    weights = mar_content()["model_ema"]
    broken = weights["diffloss.net.input_proj.weight"].detach().clone()
    broken[3, 1] = value
    path = write_mar(tmp_path / "a.pth", model_ema=weights | {"diffloss.net.input_proj.weight": broken})
    assert refused(path) == "the weight diffloss.net.input_proj.weight of FILE holds NaN or infinity"
    assert main(["convert", str(path), str(tmp_path / "raw"), "--weights", "model"]) == 0  # those are whole


def test_swapped_shapes(tmp_path, refused):
    weights = dict(mar_content()["model_ema"])
    first, second = "decoder_blocks.1.mlp.fc1.weight", "decoder_blocks.1.mlp.fc2.weight"
    weights[first], weights[second] = weights[second], weights[first]
    line = refused(write_mar(tmp_path / "a.pth", model_ema=weights))
    assert line == (
        f"the weights of FILE do not fit: 2 of another shape: {first} [16, 64] instead of [64, 16], "
        f"{second} [64, 16] instead of [16, 64]"
    )


def test_a_tensor_that_claims_more_than_the_file_holds(tmp_path, refused):
    """Its sizes are changed inside the pickle; no memory behind the file may be read as weights."""
    torch.save({"model_ema": {"a": torch.zeros(1021)}}, tmp_path / "a.pth")
    with zipfile.ZipFile(tmp_path / "a.pth") as old, zipfile.ZipFile(tmp_path / "b.pth", "w") as new:
        for member in old.infolist():
            data = old.read(member)
            if member.filename.endswith("data.pkl"):
                assert data.count(b"M\xfd\x03") == 2  # the storage's length and the tensor's size, 1021 both
                data = data.replace(b"M\xfd\x03", b"J" + (2**30).to_bytes(4, "little"))
            new.writestr(member, data)
    assert re.match("FILE is (truncated or )?damaged|a of FILE claims", refused(tmp_path / "b.pth"))


# The VAE's file goes through the same gate


def test_a_hostile_vae(tmp_path, capsys):
    torch.save({"model": vae_weights() | {"loss.x": touch(tmp_path / "canary")}}, tmp_path / "kl16.ckpt")
    assert main(["convert", str(tmp_path / "kl16.ckpt"), str(tmp_path / "vae")]) == 1
    assert "names exec, which does not belong to weights" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kl16.ckpt"]


def test_a_vae_is_not_a_mar(tmp_path):
    path = write_vae(tmp_path / "kl16.ckpt")
    with pytest.raises(CheckpointError, match="has no 'model_ema' weights; it holds 'model'"):
        load_model(path)
