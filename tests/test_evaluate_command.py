"""`marval-rl evaluate`: models of any data, folders of images, and what is refused before any work."""

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
from marval_rl.data import load_labelled_images
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
        words += ["--steps", 2, "--batch_size", 8, "--device", "cpu", *arguments]
        code = main([str(word) for word in words])
        out, err = capsys.readouterr()
        results = json.loads((tmp_path / "e.json").read_text()) if (tmp_path / "e.json").exists() else None
        return code, out, err.strip(), results

    return call


def class_folders(folder: Path, per_class: int, seed: int) -> Path:
    for index, name in enumerate(NAMES):
        random_images(folder / name, per_class, seed=seed + index, size=4)
    return folder


def test_everything_at_once(evaluate, tmp_path, weights):
    reference = random_images(tmp_path / "real", 60, seed=3)
    code, out, err, results = evaluate(
        *("--num_images", 30, "--images_dir", tmp_path / "set", "--eval_reference", reference),
        *("--eval_features", f"inception:{weights}", "pixels"),  # lists as a recipe's: a b, a,b or [a, b]
        *("--rewards", "tiny_evaluation:brightness", "tiny_evaluation:every_other", "--prompt_template", "a {name}"),
    )
    assert (code, err) == (0, "")
    images = read_images(sorted((tmp_path / "set" / "images").iterdir()))
    assert len(images) == 30
    assert sorted(path.name for path in (tmp_path / "set").iterdir()) == ["images", "settings.json"]
    assert results["rewards/brightness/mean"] == pytest.approx(float(images.float().mean()) / 255, rel=1e-5)
    assert (results["rewards/every_other/mean"], results["left_out"]["every_other"]) == (3.0, 15)
    for name in ("inception", "pixels"):
        assert results[f"frechet_distance/{name}"] > 0 and 0 <= results[f"recall/{name}"] <= 1
        assert 0 <= results[f"mode_coverage/{name}"] < 1.5 and results[f"kid/{name}"] > 0
    assert results["frechet_distance"] == results["frechet_distance/inception"]
    assert results["inception_score"] > 1 and results["image/sharpness/vs_real"] > 0
    assert results["seconds_per_image"] > 0 and results["images_per_second"] > 0
    assert (results["seed"], results["settings"]["num_images"]) == (0, 30)
    assert [note.split(":")[0] for note in results["notes"]] == [
        "inception has other weights than the published ones",
        "FID of 30 against 60 images",
    ]
    assert "frechet_distance/inception" in out and "rewards/brightness/mean" in out

    # The folder by itself has the same figures, and its images may come as an array.
    np.savez(tmp_path / "r.npz", arr_0=read_images(sorted(reference.iterdir())).permute(0, 2, 3, 1).numpy())
    code, _, err, again = evaluate(
        *("--images", tmp_path / "set" / "images", "--eval_reference", tmp_path / "r.npz"),
        *("--eval_features", f"inception:{weights}", "pixels"),  # again, after a recipe was parsed in this process
        model=None,
    )
    assert (code, err) == (0, "")
    for name in ("frechet_distance", "kid", "precision", "recall/pixels", "inception_score", "image/edge_energy"):
        assert again[name] == pytest.approx(results[name], rel=1e-4), name


def test_a_data_set_gives_the_reference_and_the_classes(evaluate, tmp_path):
    data = ("--dataset", class_folders(tmp_path / "data", 30, 0))
    code, _, err, results = evaluate("--num_images", 30, *data, "--redraws", 2, "--eval_holdout", 0.4)
    assert (code, err) == (0, "")
    assert results["frechet_distance"] > results["frechet_floor"] > 0
    assert results["std"]["frechet_distance"] > 0 and results["std"]["frechet_floor"] == 0
    assert results["diversity"] > 0 and 0 <= results["recall"] <= 1
    assert results["settings"]["eval_holdout"] == 0.4
    code, _, err, results = evaluate("--num_images", 30, *data)
    assert (code, err) == (0, "") and "frechet_floor" not in results  # no other real images than the reference
    code, _, err, _ = evaluate("--dataset", random_images(tmp_path / "other" / "a", 3, 0).parent)
    assert (
        code == 2 and "the model knows 3 classes (cat, dog, owl, ...), but evaluation compares with 1 (a, ...)" in err
    )


@pytest.mark.parametrize("groups", [None, "parity"])
def test_the_digits_are_data_with_judges(evaluate, tmp_path, groups):
    digits = load_labelled_images("digits", "test")
    names = digits.class_names if groups is None else ["even digit", "odd digit"]
    folder = tmp_path / "run" / "final"
    tiny_student(image_size=8, num_classes=len(names), class_names=names).save_pretrained(folder)
    recipe = "dataset: digits\nmax_steps: 3\n" + ("" if groups is None else f"class_groups: {groups}\n")
    (tmp_path / "run" / "recipe.yaml").write_text(recipe)
    for model in (folder, tmp_path / "run"):
        code, out, err, results = evaluate("--num_images", 30, model=model)
        assert (code, err) == (0, "")
    assert results["frechet_distance/classifier"] > results["frechet_floor"] > 0
    assert 0 <= results["held_out_classifier/accuracy"] <= 1 and 0 <= results["mode_coverage"] < 1.5
    assert (results["mode_coverage"] == results["mode_coverage/classifier"]) == (groups is None)
    assert results["settings"]["dataset"] == "digits" and "held_out_classifier/accuracy" in out
    accuracies = [row["held_out_classifier/accuracy"] for row in results["per_class"].values()]
    assert list(results["per_class"]) == names
    assert sum(accuracies) / len(names) == pytest.approx(results["held_out_classifier/accuracy"])
    assert all(row["diversity"] >= 0 for row in results["per_class"].values())


def test_without_real_images_there_are_rewards_statistics_and_speed(evaluate, tmp_path):
    code, out, _, results = evaluate(
        "--num_images", 6, "--rewards", "tiny_evaluation:brightness", "--prompt_template", "a {name}"
    )
    assert code == 0
    assert not {"frechet_distance", "kid", "recall", "diversity"} & set(results)
    assert 0 < results["rewards/brightness/mean"] < 1 and results["image/edge_energy"] > 0
    assert "images_per_second" in out and "note: no real images: " in out
    brightness = [row["brightness"] for row in results["per_class"].values()]  # of 3 classes, two images each
    assert sum(brightness) / 3 == pytest.approx(results["rewards/brightness/mean"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["e.json", "student"]


def test_statistics_give_a_frechet_distance_alone(evaluate, tmp_path):
    np.savez(tmp_path / "stats.npz", mu=np.zeros(48), sigma=np.eye(48))
    options = ("--num_images", 10, "--eval_reference", tmp_path / "stats.npz")
    code, out, _, results = evaluate(*options, "--eval_features", "pixels")
    assert code == 0 and results["frechet_distance"] > 0 and "precision" not in results
    assert "note: the reference holds statistics and no images: the Frechet distance alone" in out
    code, _, err, _ = evaluate(*options, "--eval_features", "pixels:1")
    assert code == 1 and "stats.npz holds the statistics of 48 features, but pixels, " in err


def test_an_interrupted_evaluation_continues_only_with_its_settings(evaluate, student, tmp_path):
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


def test_latents_are_decoded_by_a_vae(evaluate, tmp_path):
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
    kept = read_images(sorted((tmp_path / "set" / "images").iterdir()))
    assert kept.shape == (5, 3, 8, 8)
    assert (kept - images * 255).abs().max() < 0.51


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
        (("--eval_reference", "r.npz"), 1, "no reference at r.npz: give a folder of images, an .npz"),
        (("--eval_features", "inception:w.pth"), 1, "no Inception weights at w.pth: torch-fidelity publishes them as"),
        (("--eval_features", "jpeg"), 2, "the reward 'jpeg' has no method `features`"),
        (("--judges", "classifier"), 2, "dataset is not set: name the images"),
        (("--eval_refrence", "r.npz"), 2, "did you mean --eval_reference"),
        (("--eval_reference_images", "1"), 2, "eval_reference_images must be at least 2, not 1"),
        (("--dataset", "nowhere"), 1, "set eval_reference to a folder or statistics of others, or to none"),
        (("--recipe", "nowhere.yaml"), 2, "no recipe at nowhere.yaml"),
        (("--rewards", "jpeg,clipp"), 2, "unknown reward 'clipp'"),
        (("--rewards", "[jpeg"), 2, "--rewards: expected a list, written [a, b] or a,b"),
        (
            ("--rewards", "jpeg", "--prompt_template", "a picture"),
            2,
            'prompt_template "a picture" does not contain {name}',
        ),
        (("--reward_kwargs", "{"), 2, "--reward_kwargs must be a mapping"),
        (("--reward_kwargs", "[1]"), 2, "--reward_kwargs must be a mapping"),
        (("--reward_kwargs", "{clip: 1}"), 2, "--reward_kwargs must look like"),
        (("--num_images", "0"), 2, "num_images must be at least 1, not 0"),
        (("--redraws", "0"), 2, "--redraws must be at least 1, not 0"),
        (("--batch_size", "0"), 2, "--batch_size must be at least 1, not 0"),
        (("--num_processes", "0"), 2, "num_processes 0 and num_machines 1 must be at least 1"),
        (("--guidance_scale", "2.0"), 2, "guidance_scale 2.0 was given to a one-step student"),
        (("--vae", "nowhere"), 1, "no VAE at nowhere"),
        (("--images", "folder"), 2, "give either the model"),
    ],
)
def test_models_and_settings_that_cannot_be_evaluated(evaluate, arguments, code, message):
    found, _, err, results = evaluate("--num_images", 4, *arguments)
    assert found == code and message in err and err.count("\n") == 0
    assert results is None


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ((), 2, "give a MODEL to evaluate, before the options, or a folder of images (--images DIR)"),
        (("--images", "folder"), 1, "folder is not a folder of images"),
        (("--images", "folder", "--rewards", "clip"), 2, "--rewards has no effect here"),
    ],
)
def test_folders_that_cannot_be_evaluated(evaluate, arguments, code, message):
    found, _, err, _ = evaluate(*arguments, model=None)
    assert found == code and message in err


def test_an_output_that_cannot_be_written_is_refused_before_the_work(student, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    folder = ["evaluate", "--images", random_images(tmp_path / "few", 12, seed=0)]
    for command in (["evaluate", student, "--num_images", "4"], ["sample", student], folder):
        code = main([str(word) for word in (*command, "--device", "cpu", "--output", tmp_path / "file" / "e.json")])
        out, err = capsys.readouterr()
        assert code == 2 and not out and "e.json cannot be written: " in err


def test_rewards_are_loaded_before_anything_is_generated(evaluate, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(image_run, "generate_batch", lambda *_: pytest.fail("images were generated"))
        for wrong in ("no_such", "tiny_evaluation:brightnes"):
            code, _, err, _ = evaluate("--num_images", 4, "--rewards", wrong)
            assert code == 2 and wrong in err, err
    code, _, err, results = evaluate("--num_images", 4, "--rewards", "tiny_evaluation:every_other")
    assert code == 0, err  # what failed before is not in the way
    assert results["rewards/every_other/mean"] == 3


def test_torch_fidelity_is_an_extra(evaluate, weights, monkeypatch):
    name = "torch_fidelity.feature_extractor_inceptionv3"
    monkeypatch.setitem(sys.modules, name, None)  # as if it were not installed
    code, _, err, results = evaluate("--num_images", 10, "--eval_features", f"inception:{weights}")
    assert code == 1 and "need torch-fidelity: pip install 'marval-rl[evaluate]'" in err and results is None
    assert evaluate("--num_images", 3)[0] == 0
