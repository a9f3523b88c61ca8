"""`marval-rl sample`: grids with names, two models on the same noise, animations and folders."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_models import tiny_student

from marval_rl.cli.main import main
from marval_rl.models import codec_for
from marval_rl.models.generation import SamplingSettings, generate_images, unmasking_frames

NAMES = ["cat", "catfish", "dog"]


@pytest.fixture(scope="module")
def students(tmp_path_factory) -> list[Path]:
    folders = [tmp_path_factory.mktemp("students") / name for name in ("before", "after")]
    for seed, folder in enumerate(folders):
        tiny_student(seed, class_names=NAMES).save_pretrained(folder)
    return folders


def sample(*words: object) -> int:
    return main(["sample", *map(str, words), "--steps", "3", "--per_class", "2"])


def columns_of(picture: Image.Image) -> np.ndarray:
    """Columns of a picture that hold anything but white."""
    return np.flatnonzero((np.asarray(picture.convert("L")) < 255).any(axis=0))


def test_names_stand_beside_the_rows(students, tmp_path):
    assert sample(students[0], "--output", tmp_path / "grid.png") == 0
    with Image.open(tmp_path / "grid.png") as picture:
        scale = 64 // 4
        assert picture.height == 3 * 5 * scale - scale  # three rows, no border around them
        left = picture.width - (2 * 5 * scale - scale)
        assert left > 40 and columns_of(picture)[0] < left  # there is text in the margin


def test_two_models_share_noise_and_orders(students, tmp_path):
    file = tmp_path / "both.png"
    assert sample(students[0], "--compare", students[0], "--output", file) == 0
    with Image.open(file) as picture:
        width = 2 * 5 * 16 - 16
        pixels = np.asarray(picture)[30:]
        first = pixels[:, -2 * width - 12 : -width - 12]
        assert np.array_equal(first, pixels[:, -width:])
    assert sample(students[0], "--compare", students[1], "--output", file) == 0
    with Image.open(file) as picture:
        pixels = np.asarray(picture)[30:]
        assert np.array_equal(pixels[:, -2 * width - 12 : -width - 12], first)
        assert not np.array_equal(pixels[:, -width:], first)


def test_an_animation_shows_the_tokens_as_they_appear(students, tmp_path):
    for file in (tmp_path / "unmasking.gif", tmp_path / "unmasking.webp"):
        assert sample(students[0], "--output", file) == 0
        with Image.open(file) as animation:
            assert animation.n_frames == 4  # nothing, and after each of three steps


def test_the_frames_uncover_the_images_that_are_sampled_without_them():
    student = tiny_student()
    codec, labels = codec_for(student.config), torch.tensor([0, 1, 2])
    settings, shared = SamplingSettings(3), {"seed": 5, "batch_size": 2, "device": "cpu"}
    frames = unmasking_frames(student, codec, labels, settings, **shared)
    images, _ = generate_images(student, codec, 3, settings, class_labels=labels, **shared)
    finished = (images * 255).round().byte()
    assert torch.equal(frames[-1], finished) and frames.shape == (4, 3, 1, 4, 4)
    grey = frames == 128
    assert grey[0].all()
    hidden = [int(frame.sum()) for frame in grey]
    assert hidden == sorted(hidden, reverse=True) and hidden[1] > hidden[2] > hidden[3]
    assert torch.equal(frames[2][~grey[2]], finished[~grey[2]])


def test_a_folder_has_a_folder_a_class(students, tmp_path):
    assert sample(students[0], "--classes", "dog,cat", "--output", tmp_path / "images") == 0
    files = sorted(str(file.relative_to(tmp_path / "images")) for file in (tmp_path / "images").rglob("*.png"))
    assert files == ["cat/0000.png", "cat/0001.png", "dog/0000.png", "dog/0001.png"]


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        ("dgo", "the model has no class 'dgo'; did you mean dog?; it knows 0..2 or cat, catfish, dog"),
        ("ca", "the model has no class 'ca'; did you mean cat or catfish?"),
        ("", "the model has no class ''"),
    ],
)
def test_an_unknown_class_has_suggestions(students, tmp_path, capsys, classes, message):
    assert sample(students[0], "--classes", classes, "--output", tmp_path / "a.png") == 2
    assert message in capsys.readouterr().err


def test_a_class_is_known_by_its_beginning_and_in_any_case(students, tmp_path):
    assert sample(students[0], "--classes", "DO,Cat,catf,1", "--output", tmp_path / "images") == 0
    assert {folder.name for folder in (tmp_path / "images").iterdir()} == {"cat", "catfish", "dog"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--output", "images", "--compare", "x"], "--compare needs a picture or an animation"),
        (["--output", "a.bmpx"], "pictures are .png"),
    ],
)
def test_an_output_that_cannot_be_is_refused(students, tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    assert sample(students[0], *words) == 2
    assert message in capsys.readouterr().err
