"""The noise that belongs to an image's index: its distribution, and that nothing else decides it."""

from __future__ import annotations

import math

import pytest
import torch
from scipy import stats
from tiny_models import tiny_model, tiny_student

from marval_rl.models import generate
from marval_rl.models.noise import GeneratorNoise, IndexedNoise

LABELS = torch.tensor([0, 1, 2, 1, 0])
INDICES = torch.tensor([40, 7, 0, 49_999, 8])
BUILDS = {"teacher": tiny_model, "student": tiny_student}


def normal(seed: int, indices: torch.Tensor, rows: int, channels: int, draws: int = 1) -> torch.Tensor:
    """[draws, B, rows, channels] with `rows` rows per image."""
    noise = IndexedNoise(seed, indices)
    return torch.stack([noise.normal(len(indices) * rows, channels).view(-1, rows, channels) for _ in range(draws)])


# Against the definition, in Python's own integers


def finalize(x: int) -> int:
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) % 2**64
    return x ^ (x >> 31)


def split_mix(state: int, number: int) -> int:
    """Output `number` (from 1) of SplitMix64."""
    return finalize((state + number * 0x9E3779B97F4A7C15) % 2**64)


def test_the_reference_itself():
    """The first outputs that are published for seed 0 and 1234567."""
    assert [split_mix(0, n) for n in (1, 2)] == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4]
    assert split_mix(1234567, 1) == 6457827717110365317


@pytest.mark.parametrize("seed", [0, 1, -5, 2**63 + 11, 2**64 - 1])
def test_normal_numbers_follow_the_definition(seed):
    found = normal(seed, INDICES, rows=2, channels=3, draws=3)
    for draw, image, element in [(0, 0, 0), (0, 3, 5), (1, 1, 2), (2, 4, 4)]:
        key = split_mix(split_mix(split_mix(seed % 2**64, 1) ^ int(INDICES[image]), 1) ^ draw, 1)
        bits = split_mix(key, element + 1)
        radius, angle = ((bits >> 32) + 0.5) / 2**32, (bits % 2**32 + 0.5) / 2**32
        expected = math.sqrt(-2 * math.log(radius)) * math.cos(2 * math.pi * angle)
        assert float(found[draw, image].flatten()[element]) == pytest.approx(expected, rel=1e-6, abs=1e-7)


# The distribution


def test_the_noise_is_standard_normal():
    values = normal(3, torch.arange(400), rows=10, channels=16, draws=4).double().flatten()  # 256 000
    count = len(values)
    assert abs(values.mean()) < 4 / count**0.5
    assert abs(values.var() - 1) < 4 * (2 / count) ** 0.5
    assert abs(stats.skew(values.numpy())) < 4 * (6 / count) ** 0.5
    assert abs(stats.kurtosis(values.numpy())) < 4 * (24 / count) ** 0.5
    assert stats.kstest(values.numpy(), "norm").pvalue > 0.01
    assert 4 < values.abs().max() < 6.8


@pytest.mark.parametrize("along", ["index", "draw", "element", "seed"])
def test_neighbours_are_not_correlated(along):
    """Neither are they equal: consecutive counters must not show, nor their signs or sizes."""
    indices = torch.arange(100, 300)
    values = normal(3, indices, rows=8, channels=16, draws=4).double()
    if along == "index":
        a, b = values[:, :-1], values[:, 1:]
    elif along == "draw":
        a, b = values[:-1], values[1:]
    elif along == "element":
        a, b = values.flatten(2)[..., :-1], values.flatten(2)[..., 1:]
    else:
        a, b = values, normal(4, indices, rows=8, channels=16, draws=4).double()
    for function in (lambda x: x, torch.abs, torch.sign):
        pair = torch.stack([function(a).flatten(), function(b).flatten()])
        assert abs(torch.corrcoef(pair)[0, 1]) < 4 / pair.shape[1] ** 0.5


def test_orders_are_uniform_permutations():
    orders = IndexedNoise(0, torch.arange(6000)).order(6000, 4)
    assert orders.dtype == torch.int64
    assert torch.equal(orders.sort(dim=1).values, torch.arange(4).expand(6000, -1))
    _, counts = orders.unique(dim=0, return_counts=True)
    assert len(counts) == 24
    assert stats.chisquare(counts.numpy()).pvalue > 0.01


# What it depends on


def test_the_same_image_has_the_same_noise_in_any_batch():
    whole = normal(5, INDICES, rows=3, channels=4, draws=2)
    orders = IndexedNoise(5, INDICES).order(5, 64)
    for part in ([2], [4, 0], [3, 2, 1, 0]):
        assert torch.equal(normal(5, INDICES[part], rows=3, channels=4, draws=2), whole[:, part])
        assert torch.equal(IndexedNoise(5, INDICES[part]).order(len(part), 64), orders[part])


def test_images_draws_and_seeds_differ():
    values = normal(5, INDICES, rows=3, channels=4, draws=2)
    rows = [*values.flatten(0, 1).flatten(1), *normal(6, INDICES, rows=3, channels=4)[0].flatten(1)]
    assert len({tuple(row.tolist()) for row in rows}) == 15


def test_the_global_generator_plays_no_part():
    state = torch.get_rng_state()
    first = normal(5, INDICES, rows=3, channels=4)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(99)
    assert torch.equal(normal(5, INDICES, rows=3, channels=4), first)


@pytest.mark.parametrize("build", BUILDS)
@pytest.mark.parametrize("batch_size", [1, 3])
def test_an_image_does_not_depend_on_its_batch(build, batch_size):
    model = BUILDS[build]()
    settings = {"num_unmasking_steps": 3}
    if build == "teacher":
        model.config.clip_sample_range = 1.0  # else the first steps multiply errors of rounding by hundreds
        settings |= {"guidance_scale": 2.0, "num_diffusion_steps": 4}
    whole = generate(model, LABELS, generator=IndexedNoise(1, INDICES), **settings).latents
    parts = [
        generate(model, labels, generator=IndexedNoise(1, indices), **settings).latents
        for labels, indices in zip(LABELS.split(batch_size), INDICES.split(batch_size), strict=True)
    ]
    torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-4, atol=1e-5)
    other_seed = generate(model, LABELS, generator=IndexedNoise(2, INDICES), **settings).latents
    assert (other_seed - whole).abs().amax(dim=(1, 2, 3)).min() > 0.01


def test_a_guided_teacher_has_the_noise_of_an_unguided_one():
    """The rows that MAR draws and drops belong to a stream; an image's own noise has none of them."""
    plain, guided = (IndexedNoise(1, INDICES) for _ in range(2))
    plain.order(5, 4), guided.order(5, 4)
    for rows in (5, 10, 10):
        assert torch.equal(plain.normal(rows, 3), guided.normal(rows, 3, num_unused_rows=rows))


def test_a_generator_draws_the_unused_rows_too():
    first, second = (GeneratorNoise(torch.Generator().manual_seed(0), "cpu") for _ in range(2))
    assert torch.equal(first.normal(2, 8, num_unused_rows=2), second.normal(4, 8)[:2])
    assert torch.equal(first.normal(4, 8), second.normal(4, 8))  # both streams stand at the same place


def test_a_batch_with_other_indices_is_refused():
    with pytest.raises(ValueError, match="4 rows of noise cannot be shared by the 5 images that have indices"):
        generate(tiny_student(), LABELS[:4], num_unmasking_steps=2, generator=IndexedNoise(1, INDICES))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_draws_the_same_noise_as_the_cpu():
    host, device = IndexedNoise(5, INDICES), IndexedNoise(5, INDICES.cuda())
    assert torch.equal(host.order(5, 64), device.order(5, 64).cpu())
    torch.testing.assert_close(host.normal(500, 16), device.normal(500, 16).cpu(), rtol=1e-6, atol=1e-7)
