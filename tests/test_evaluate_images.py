"""`marval-rl evaluate` of models that paint no digits, and of folders of images."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image
from tiny_evaluation import NAMES, colour_student, random_images, save_student
from tiny_models import tiny_student

from marval_rl.cli.main import main
from marval_rl.evaluation import image_run
from marval_rl.evaluation.image_set import read_images
from marval_rl.models import generate
from marval_rl.models.noise import IndexedNoise


@pytest.fixture(scope="module", autouse=True)
def weights(inception_weights) -> Path:
    return inception_weights


@pytest.fixture
def student(tmp_path) -> Path:
    return save_student(tmp_path / "student")


@pytest.fixture
def evaluate(student, tmp_path, capsys):
    """Runs the command on the tiny student: (exit code, what it printed, what it complained, evaluation.json)."""

    def call(*arguments: object, model: object = student):
        words = ["evaluate", *([] if model is None else [model]), "--output", tmp_path / "e.json"]
        words += ["--steps", 2, "--batch_size", 8, *arguments]
        code = main([str(word) for word in words])
        out, err = capsys.readouterr()
        results = json.loads((tmp_path / "e.json").read_text()) if (tmp_path / "e.json").exists() else None
        return code, out, err.strip(), results

    return call


def test_everything_at_once(evaluate, tmp_path, weights):
    reference = random_images(tmp_path / "real", 16, seed=3)
    code, out, err, results = evaluate(
        *("--num_images", 20, "--images_dir", tmp_path / "set", "--reference", reference),
        *("--inception_weights", weights, "--rewards", "tiny_evaluation:brightness,tiny_evaluation:every_other"),
        *("--prompt_template", "a {name}"),
    )
    assert (code, err) == (0, "")
    images = read_images(sorted((tmp_path / "set" / "images").iterdir()))
    assert len(images) == 20
    assert sorted(path.name for path in (tmp_path / "set").iterdir()) == ["images", "settings.json"]
    assert results["rewards"]["brightness"]["mean"] == pytest.approx(float(images.float().mean()) / 255, rel=1e-5)
    assert results["rewards"]["every_other"] == {"mean": 3.0, "std": 0.0, "left_out": 10}
    assert results["fid"] > 0 and results["inception_score"]["mean"] > 1
    assert 0 <= results["precision"] <= 1 and 0 <= results["recall"] <= 1
    assert results["seconds_per_image"] > 0 and results["images_per_second"] > 0
    assert (results["seed"], results["settings"]["num_images"], results["reference_images"]) == (0, 20, 16)
    assert [note.split(":")[0] for note in results["notes"]] == [
        "the Inception weights are not the published ones",
        "FID of 20 against 16 images",
    ]
    assert "FID" in out and "brightness (reward)" in out

    # The folder by itself has the same figures. (Its FID costs seconds; one shows it.)
    statistics = tmp_path / "images.npz"
    np.savez(statistics, arr_0=read_images(sorted(reference.iterdir())).permute(0, 2, 3, 1).numpy())
    code, _, err, again = evaluate(
        "--images", tmp_path / "set" / "images", "--reference", statistics, "--inception_weights", weights, model=None
    )
    assert (code, err) == (0, "")
    for name in ("fid", "precision", "recall"):
        assert again[name] == pytest.approx(results[name], rel=1e-5)
    assert again["inception_score"] == pytest.approx(results["inception_score"], rel=1e-5)


def test_without_a_reference_there_are_rewards_and_speed(evaluate, tmp_path):
    code, out, _, results = evaluate(
        "--num_images", 6, "--rewards", "tiny_evaluation:brightness", "--prompt_template", "a {name}"
    )
    assert code == 0
    assert results["fid"] is results["inception_score"] is results["precision"] is None
    assert 0 < results["rewards"]["brightness"]["mean"] < 1
    assert "images a second" in out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["e.json", "student"]


def test_without_a_reference_there_still_is_an_inception_score(evaluate, weights):
    code, out, _, results = evaluate("--num_images", 20, "--inception_weights", weights)
    assert code == 0
    assert results["fid"] is results["precision"] is None and results["inception_score"]["mean"] > 1
    assert "note: no reference: no FID, precision and recall" in out


def test_statistics_alone_give_no_precision(evaluate, tmp_path, weights, monkeypatch):
    monkeypatch.setattr(np.linalg, "eigvals", lambda matrix: np.zeros(len(matrix)))  # its value is tested elsewhere
    np.savez(tmp_path / "stats.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    code, out, _, results = evaluate(
        "--num_images", 10, "--inception_weights", weights, "--reference", tmp_path / "stats.npz"
    )
    assert code == 0
    assert results["fid"] > 2048 and results["precision"] is results["recall"] is results["reference_images"] is None
    assert "note: the reference holds statistics and no images: no precision and recall" in out


def test_an_interrupted_evaluation_goes_on_only_with_its_settings(evaluate, student, tmp_path):
    arguments = ("--num_images", 10, "--images_dir", tmp_path / "set")
    assert evaluate(*arguments)[0] == 0
    file = tmp_path / "set" / "images" / "000003.png"
    pixels = np.array(Image.open(file))
    file.write_bytes(b"")
    code, _, err, _ = evaluate(*arguments, "--seed", 4)
    assert code == 1 and "holds images of other settings: seed was 0 and is now 4. Give the same settings" in err
    assert evaluate(*arguments)[0] == 0
    assert np.array_equal(np.array(Image.open(file)), pixels)
    colour_student(seed=1).save_pretrained(student)
    code, _, err, _ = evaluate(*arguments)
    assert code == 1 and "weights_sha256 was" in err


def test_bfloat16_is_recorded(evaluate):
    code, _, _, results = evaluate("--num_images", 3, "--dtype", "bfloat16")
    assert code == 0 and results["settings"]["autocast_dtype"] == "bfloat16"


def test_latents_are_painted_through_a_vae(evaluate, tmp_path):
    vae = AutoencoderKL(
        block_out_channels=(4, 8),
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
        latent_channels=2,
        norm_num_groups=2,
        scaling_factor=0.5,
    )
    vae.save_pretrained(tmp_path / "vae")
    model = tiny_student(image_size=8, image_channels=3, latent_stride=2, latent_channels=2, patch_size=1)
    model.save_pretrained(tmp_path / "latent")
    arguments = ("--num_images", 5, "--images_dir", tmp_path / "set")
    code, _, err, _ = evaluate(*arguments, model=tmp_path / "latent")
    assert code == 2 and "need a VAE" in err
    code, _, _, results = evaluate(*arguments, "--vae", tmp_path / "vae", model=tmp_path / "latent")
    assert code == 0 and results["settings"]["vae"] == str(tmp_path / "vae")
    latents = generate(
        model, torch.tensor([0, 0, 1, 1, 2]), num_unmasking_steps=2, generator=IndexedNoise(0, torch.arange(5))
    )
    images = ((vae.decode(latents.latents / 0.5).sample + 1) / 2).clamp(0, 1)
    painted = read_images(sorted((tmp_path / "set" / "images").iterdir()))
    assert painted.shape == (5, 3, 8, 8)
    assert (painted - images * 255).abs().max() < 0.51


def test_samples_in_bfloat16_differ_from_those_in_float32(student, tmp_path):
    for dtype in ("float32", "bfloat16"):
        words = ["sample", student, "--dtype", dtype, "--output", tmp_path / f"{dtype}.png"]
        assert main([str(word) for word in words]) == 0
    exact, rough = (np.array(Image.open(tmp_path / f"{dtype}.png")).astype(int) for dtype in ("float32", "bfloat16"))
    assert 0 < np.abs(exact - rough).mean() < 8


def test_class_names_from_a_file(evaluate, student, tmp_path):
    config = json.loads((student / "config.json").read_text())
    (student / "config.json").write_text(json.dumps({**config, "class_names": None}))
    rewards = ("--num_images", 3, "--rewards", "tiny_evaluation:brightness", "--prompt_template", "a {name}")
    code, _, err, _ = evaluate(*rewards)
    assert code == 2 and "class_names" in err
    (tmp_path / "names.txt").write_text("\n".join(NAMES))
    assert evaluate(*rewards, "--class_names", tmp_path / "names.txt")[0] == 0
    (tmp_path / "names.txt").write_text("cat\n")
    code, _, err, _ = evaluate(*rewards, "--class_names", tmp_path / "names.txt")
    assert code == 1 and "1 class_names were given" in err


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (
            ("--reference", "r.npz"),
            2,
            "--reference r.npz needs the weights of Inception: torch-fidelity's weights-incep",
        ),
        (("--inception_weights", "w.pth"), 1, "no Inception weights at w.pth: torch-fidelity publishes them as"),
        (("--rewards", "clipp"), 2, "unknown reward 'clipp'"),
        (("--reward_kwargs", "{"), 2, "--reward_kwargs must be a mapping"),
        (("--reward_kwargs", "[1]"), 2, "--reward_kwargs must be a mapping"),
        (("--reward_kwargs", "{clip: 1}"), 2, "--reward_kwargs must look like"),
        (("--num_images", "0"), 2, "num_images must be at least 1, not 0"),
        (("--batch_size", "0"), 2, "--batch_size must be at least 1, not 0"),
        (("--num_processes", "0"), 2, "num_processes 0 and num_machines 1 must be at least 1"),
        (("--inception_batch_size", "0"), 2, "must be at least 1, not 0"),
        (("--guidance_scale", "2.0"), 2, "guidance_scale 2.0 was given to a one-step student"),
        (("--vae", "nowhere"), 1, "no VAE at nowhere"),
        (("--redraws", "2"), 2, "--redraws has no effect here, because"),
        (("--images", "folder"), 2, "give either the model"),
    ],
)
def test_what_cannot_be_evaluated(evaluate, arguments, code, message):
    found, _, err, results = evaluate("--num_images", 4, *arguments)
    assert found == code and message in err and err.count("\n") == 0
    assert results is None


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ((), 2, "give a MODEL to evaluate, or a folder of images (--images DIR)"),
        (("--images", "folder"), 2, "--images needs the weights of Inception"),
        (("--images", "folder", "--rewards", "clip"), 2, "--rewards has no effect here"),
    ],
)
def test_folders_that_cannot_be_evaluated(evaluate, arguments, code, message):
    found, _, err, _ = evaluate(*arguments, model=None)
    assert found == code and message in err


def test_few_images_are_measured_as_far_as_they_go(evaluate, tmp_path, weights):
    images, reference = random_images(tmp_path / "few", 9, seed=0), random_images(tmp_path / "real", 12, seed=1)
    options = ("--images", images, "--inception_weights", weights)
    code, out, err, _ = evaluate(*options, model=None)
    assert code == 2 and f"needs at least 10 images; {images} holds 9" in err
    code, out, err, results = evaluate(*options, "--reference", reference, model=None)
    assert (code, err) == (0, "") and results["fid"] > 0 and results["inception_score"] is None
    assert (
        "note: FID of 9 against 12 images: below 2048" in out
        and "images                                        9" in out
    )


def test_an_output_that_cannot_be_written_is_refused_before_the_work(student, tmp_path, weights, capsys):
    (tmp_path / "file").write_text("")
    folder = ["evaluate", "--images", random_images(tmp_path / "few", 12, seed=0), "--inception_weights", weights]
    for command in (["evaluate", student, "--num_images", "4"], ["sample", student], folder):
        code = main([str(word) for word in (*command, "--device", "cpu", "--output", tmp_path / "file" / "e.json")])
        out, err = capsys.readouterr()
        assert code == 2 and not out and "e.json cannot be written: " in err


def test_rewards_are_loaded_before_anything_is_generated(evaluate, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(image_run, "paint", lambda *_: pytest.fail("images were generated"))
        for wrong in ("no_such", "tiny_evaluation:brightnes"):
            code, _, err, _ = evaluate("--num_images", 4, "--rewards", wrong)
            assert code == 2 and wrong in err, err
    code, _, err, results = evaluate("--num_images", 4, "--rewards", "tiny_evaluation:every_other")
    assert code == 0, err  # what failed before is not in the way
    assert list(results["rewards"]) == ["every_other"]


def test_torch_fidelity_is_an_extra(evaluate, tmp_path, weights, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)  # as if it were not installed
    code, _, err, results = evaluate("--num_images", 10, "--inception_weights", weights)
    assert code == 1 and "need torch-fidelity: pip install 'marval-rl[evaluate]'" in err and results is None
    assert evaluate("--num_images", 3)[0] == 0


def test_digits_take_no_options_of_other_models(tmp_path, capsys):
    folder = tmp_path / "digits"
    tiny_student(image_size=8).save_pretrained(folder)
    assert main(["evaluate", str(folder), "--reference", "r.npz"]) == 2
    assert "--reference has no effect here, because" in capsys.readouterr().err
