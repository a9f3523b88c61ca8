"""Large sets of images: the same ones however the work is shared or interrupted, and nothing done twice."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_evaluation import NAMES, colour_student
from tiny_models import tiny_model

from marval_rl.data.moments.fingerprint import hash_weights
from marval_rl.errors import DataError
from marval_rl.evaluation import image_run as image_run_module
from marval_rl.evaluation.evaluator import ImageEvaluator
from marval_rl.evaluation.image_run import ImageRun
from marval_rl.evaluation.image_set import (
    ImagePlan,
    claim_folder,
    generate_batch,
    read_images,
    read_written_images,
    to_pixels,
    write_images,
)
from marval_rl.models import PixelCodec
from marval_rl.models.generation import SamplingSettings
from marval_rl.rewarding import RewardSet

CODEC = PixelCodec()
SAMPLING = SamplingSettings(num_unmasking_steps=2)
PLAN = ImagePlan(num_images=10, num_classes=3, batch_size=4)
SOURCE = {"model": "tiny"}


@pytest.fixture
def model():
    return colour_student()


@pytest.fixture
def generated(monkeypatch) -> list[int]:
    """The batches that are generated, in turn."""
    batches = []

    def noted(model, codec, plan, batch, settings, seed):
        batches.append(batch)
        return generate_batch(model, codec, plan, batch, settings, seed)

    monkeypatch.setattr(image_run_module, "generate_batch", noted)
    return batches


MEASURES = {"rewards": ["tiny_evaluation:brightness"]}


def measuring(reward: str = "tiny_evaluation:brightness") -> ImageEvaluator:
    evaluator = ImageEvaluator()
    evaluator.add_rewards(RewardSet([reward]), lambda names: [f"a {name}" for name in names], NAMES)
    return evaluator


def make_run(folder: Path, **changes) -> ImageRun:
    run = replace(
        ImageRun(folder, keeps_images=True, plan=PLAN, sampling=SAMPLING, seed=0, measured=MEASURES), **changes
    )
    run.claim(SOURCE)
    return run


def pixels_of(folder: Path) -> torch.Tensor:
    return read_images(sorted((folder / "images").glob("*.png")))


# The plan


def test_classes_are_sorted_and_equally_many_as_in_mar():
    plan = ImagePlan(num_images=50, num_classes=5, batch_size=20)
    labels = torch.cat([plan.labels(batch) for batch in range(plan.num_batches)])
    assert labels.tolist() == [index // 10 for index in range(50)]
    uneven = torch.cat([PLAN.labels(batch) for batch in range(PLAN.num_batches)])
    assert uneven.tolist() == [0, 0, 0, 0, 1, 1, 1, 2, 2, 2]


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
def test_every_image_belongs_to_one_process(world_size):
    shares = [PLAN.share(rank, world_size) for rank in range(world_size)]
    indices = [index for share in shares for batch in share for index in PLAN.indices(batch).tolist()]
    assert sorted(indices) == list(range(10))


@pytest.mark.parametrize("name", ["num_images", "batch_size"])
def test_counts_below_one_are_refused(name):
    with pytest.raises(ValueError, match=f"{name} must be at least 1, not 0"):
        replace(PLAN, **{name: 0})


# Pixels and files


def test_pixels_are_rounded_half_to_even_as_in_mar():
    values = torch.tensor([-0.1, 0.5 / 255, 1.5 / 255, 2.5 / 255, 100.6 / 255, 1.0, 1.2])
    expected = np.round(np.clip(values.numpy() * np.float32(255), 0, 255)).astype(np.uint8)
    pixels = to_pixels(values.view(1, 1, 1, -1))
    assert pixels.dtype == torch.uint8 and pixels.shape == (1, 3, 1, 7)
    assert pixels[0, 2, 0].tolist() == expected.tolist() == [0, 0, 2, 2, 101, 255, 255]


def test_files_hold_the_very_pixels(tmp_path):
    pixels = torch.randint(0, 256, (3, 3, 5, 7), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    indices = torch.tensor([0, 7, 123])
    write_images(tmp_path, indices, pixels)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["000000.png", "000007.png", "000123.png"]
    assert torch.equal(read_written_images(tmp_path, indices), pixels)
    assert read_written_images(tmp_path, torch.tensor([0, 1])) is None


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty"])
def test_damaged_files_are_not_taken_for_images(tmp_path, damage):
    write_images(tmp_path, torch.tensor([0]), torch.full((1, 3, 64, 64), 7, dtype=torch.uint8))
    file = tmp_path / "000000.png"
    content = bytearray(file.read_bytes())
    if damage == "flipped":
        content[60] ^= 255
    else:
        content = content[: len(content) // 2 if damage == "cut" else 0]
    file.write_bytes(content)
    assert read_written_images(tmp_path, torch.tensor([0])) is None
    with pytest.raises(DataError, match="cannot read the image"):
        read_images([file])


def test_images_of_several_sizes_are_refused(tmp_path):
    for name, size in (("a.png", (8, 6)), ("b.png", (9, 6))):
        Image.new("RGB", size).save(tmp_path / name)
    with pytest.raises(DataError, match=r"a.png is 6 x 8 and .*b.png is 6 x 9: crop"):
        read_images([tmp_path / "a.png", tmp_path / "b.png"])


# Runs


@pytest.mark.parametrize("world_size", [2, 3])
def test_the_number_of_processes_does_not_change_the_images(tmp_path, model, world_size):
    make_run(tmp_path / "one").do_share(model, CODEC, measuring(), 0, 1)
    shared = make_run(tmp_path / "several")
    for rank in reversed(range(world_size)):
        shared.do_share(model, CODEC, measuring(), rank, world_size)
    whole = pixels_of(tmp_path / "one")
    assert whole.shape == (10, 3, 4, 4)
    assert torch.equal(pixels_of(tmp_path / "several"), whole)
    assert len(whole.unique(dim=0)) == 10


def test_the_batch_size_changes_no_image_beyond_rounding(tmp_path, model):
    whole = torch.cat([generate_batch(model, CODEC, PLAN, batch, SAMPLING, 0) for batch in range(3)]).int()
    for batch_size in (1, 10):
        plan = replace(PLAN, batch_size=batch_size)
        images = torch.cat([generate_batch(model, CODEC, plan, b, SAMPLING, 0) for b in range(plan.num_batches)]).int()
        assert (images - whole).abs().max() <= 1
    other_seed = torch.cat([generate_batch(model, CODEC, PLAN, batch, SAMPLING, 1) for batch in range(3)]).int()
    assert (other_seed - whole).abs().float().mean() > 10


def test_finished_work_is_not_repeated(tmp_path, model, generated):
    run = make_run(tmp_path)
    run.do_share(model, CODEC, measuring(), 0, 2)
    assert generated == [0, 2]
    make_run(tmp_path).do_share(model, CODEC, measuring(), 0, 1)
    assert generated == [0, 2, 1]
    make_run(tmp_path).do_share(model, CODEC, measuring(), 0, 1)
    assert generated == [0, 2, 1]


def test_a_damaged_image_and_a_damaged_measure_are_done_again(tmp_path, model, generated):
    run = make_run(tmp_path)
    run.do_share(model, CODEC, measuring(), 0, 1)
    images, scores = pixels_of(tmp_path), run.collect()
    file, part = tmp_path / "images" / "000005.png", tmp_path / "measures" / "000002.safetensors"
    file.write_bytes(file.read_bytes()[:40])
    part.write_bytes(part.read_bytes()[:10])
    generated.clear()
    run.do_share(model, CODEC, measuring(), 0, 1)
    assert generated == [1]  # batch 2 is only measured again, from its files
    assert torch.equal(pixels_of(tmp_path), images)
    assert torch.equal(run.collect()["reward/brightness"], scores["reward/brightness"])


def test_measures_are_those_of_the_pixels_in_the_order_of_the_images(tmp_path, model):
    kept = make_run(tmp_path / "kept")
    only_measured = make_run(tmp_path / "measured", keeps_images=False)
    for run in (kept, only_measured):
        for rank in (1, 0):
            run.do_share(model, CODEC, measuring(), rank, 2)
    expected = pixels_of(tmp_path / "kept").float().div(255).mean(dim=(1, 2, 3))
    for run in (kept, only_measured):
        scores = run.collect()["reward/brightness"]
        torch.testing.assert_close(scores, expected)
        mean = measuring().figures(run.collect())["rewards/brightness/mean"]
        assert mean == pytest.approx(float(expected.mean()))
    kept.finish(), only_measured.finish()
    assert sorted(file.name for file in (tmp_path / "kept").iterdir()) == ["images", "settings.json"]
    assert not (tmp_path / "measured").exists()


def test_a_reward_that_leaves_images_out(tmp_path, model):
    run, evaluator = make_run(tmp_path), measuring("tiny_evaluation:every_other")
    run.do_share(model, CODEC, evaluator, 0, 1)
    assert evaluator.figures(run.collect())["rewards/every_other/mean"] == 3


def test_an_unfinished_set_is_not_measured(tmp_path, model):
    run = make_run(tmp_path)
    run.do_share(model, CODEC, measuring(), 0, 2)
    with pytest.raises(DataError, match=r"1 of 3 batches were not measured \(the first is 1\)"):
        run.collect()


def test_a_teacher_in_bfloat16_generates_nearly_the_same(model):
    teacher = tiny_model(image_channels=3, latent_channels=3, clip_sample_range=1.0)
    guided = SamplingSettings(num_unmasking_steps=2, guidance_scale=1.5, num_diffusion_steps=3)
    for network, sampling in ((model, SAMPLING), (teacher, guided)):
        exact = generate_batch(network, CODEC, PLAN, 0, sampling, 0).float()
        rough = generate_batch(network, CODEC, PLAN, 0, replace(sampling, autocast_dtype=torch.bfloat16), 0).float()
        assert 0 < (rough - exact).abs().mean() < 8


# Settings


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 1}, "seed was 0 and is now 1"),
        ({"sampling": SamplingSettings(num_unmasking_steps=4)}, "num_unmasking_steps was 2 and is now 4"),
        ({"sampling": replace(SAMPLING, autocast_dtype=torch.bfloat16)}, "autocast_dtype was 'float32' and is now"),
        ({"plan": replace(PLAN, num_images=20)}, "num_images was 10 and is now 20"),
        ({"plan": replace(PLAN, batch_size=5)}, "batch_size was 4 and is now 5"),
        ({"measured": {"rewards": ["jpeg"]}}, r"rewards was \['tiny_evaluation:brightness'\] and is now"),
    ],
)
def test_other_settings_are_named(tmp_path, model, changes, message):
    make_run(tmp_path).do_share(model, CODEC, measuring(), 0, 2)
    make_run(tmp_path)  # the same ones continue
    with pytest.raises(DataError, match=message):
        make_run(tmp_path, **changes)


def test_other_weights_under_the_same_name_are_noticed(tmp_path, model):
    digest = hash_weights(model)
    assert digest == hash_weights(colour_student())
    with torch.no_grad():
        model.diffloss.net.final_layer.linear.bias[0] += 1e-6
    assert hash_weights(model) != digest


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(DataError, match=r"is not empty and has no settings\.json"):
        claim_folder(tmp_path, {}, "images", "choose another")
    (tmp_path / "settings.json").write_text("{")
    with pytest.raises(DataError, match=r"settings\.json is damaged"):
        claim_folder(tmp_path, {}, "images", "choose another")
