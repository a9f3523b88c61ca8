"""Training from cached moments: ours, in any order and any process, and LTH14's .npz files."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny_images import SIZE, write_cache, write_partly_corrupt_folder
from torch.utils.data import DataLoader

from marval_rl.data import MomentsCache, load_moments
from marval_rl.data.moments.reader import map_tensors
from marval_rl.errors import DataError


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A cache of 58 of 60 images; nothing may change it."""
    root = tmp_path_factory.mktemp("cache")
    return write_cache(write_partly_corrupt_folder(root / "images"), root / "finished")


def test_items_are_moments_or_those_of_the_flipped_image(finished):
    cache, tensors = MomentsCache(finished, seed=4), load_file(finished / "shard-00003.safetensors")
    assert (cache.class_names, cache.class_counts) == (["ant", "bee", "cow"], [20, 19, 19])
    assert (cache.image_size, cache.vae, cache.scale, cache.moments_shape) == (SIZE, "tiny", 0.5, (4, 8, 8))
    row = tensors["indices"].tolist().index(30)
    seen = set()
    for epoch in range(6):
        cache.set_epoch(epoch)
        item = cache[29]  # image 30, as 25 was skipped
        name = "moments_flip" if cache.is_flipped(29) else "moments"
        seen.add(name)
        assert torch.equal(item["moments"], tensors[name][row]) and item["class_labels"] == 1
    assert seen == {"moments", "moments_flip"}


def test_every_item_of_every_shard_is_reached(finished):
    cache = MomentsCache(finished, flip=False)
    shards = [load_file(path) for path in sorted(finished.glob("*.safetensors"))]
    expected = torch.cat([shard["moments"] for shard in shards])
    assert torch.equal(torch.stack([cache[i]["moments"] for i in range(len(cache))]), expected)
    with pytest.raises(IndexError):
        cache[58]


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_workers_read_what_the_process_itself_reads(finished, context):
    cache = MomentsCache(finished)
    cache.set_epoch(2)
    expected = torch.stack([cache[i]["moments"] for i in range(58)])  # so that workers inherit open shards
    loader = DataLoader(cache, batch_size=29, num_workers=1, multiprocessing_context=context)
    batches = list(loader)
    assert torch.equal(torch.cat([batch["moments"] for batch in batches]), expected)
    assert batches[0]["class_labels"].dtype == torch.int64


def test_the_data_set_can_be_pickled_after_reading(finished):
    cache = MomentsCache(finished)
    first = cache[0]["moments"]
    assert torch.equal(pickle.loads(pickle.dumps(cache))[0]["moments"], first)


def test_no_file_stays_open_and_what_is_read_is_a_copy(finished):
    cache = MomentsCache(finished, flip=False)
    before = len(os.listdir("/proc/self/fd"))
    for index in range(58):
        cache[index]["moments"].zero_()
    assert len(os.listdir("/proc/self/fd")) <= before
    assert cache[0]["moments"].any() and map_tensors(finished / "shard-00000.safetensors")["moments"].any()


def test_a_cache_keeps_its_class_names(finished, tmp_path):
    assert load_moments(finished, class_names=["ant", "bee", "cow"]).class_names == ["ant", "bee", "cow"]
    with pytest.raises(DataError, match="was made with other class_names"):
        load_moments(finished, class_names=["a", "b", "c"])


# LTH14's layout


@pytest.fixture
def npz(tmp_path) -> Path:
    generator = np.random.default_rng(0)
    for folder in ("n02123045", "n01440764"):
        (tmp_path / "npz" / folder).mkdir(parents=True)
        for i in range(3):
            arrays = {name: generator.normal(size=(4, 2, 2)).astype(np.float32) for name in ("moments", "moments_flip")}
            np.savez(tmp_path / "npz" / folder / f"{folder}_{i}.JPEG.npz", **arrays)
    return tmp_path / "npz"


def test_one_npz_file_an_image_is_read_too(npz):
    data = load_moments(npz, seed=1)
    assert data.class_names == ["tench", "tabby cat"] and len(data) == 6 and data.moments_shape == (4, 2, 2)
    arrays = np.load(npz / "n02123045" / "n02123045_1.JPEG.npz")
    seen = set()
    for epoch in range(6):
        data.set_epoch(epoch)
        name = "moments_flip" if data.is_flipped(4) else "moments"
        seen.add(name)
        assert torch.equal(data[4]["moments"], torch.from_numpy(arrays[name])) and data[4]["class_labels"] == 1
    assert seen == {"moments", "moments_flip"}
    assert load_moments(npz, class_names=["x", "y"]).class_names == ["x", "y"]


def test_damaged_npz_files_are_named(npz):
    data = load_moments(npz, flip=False)
    path = npz / "n01440764" / "n01440764_1.JPEG.npz"
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[200] ^= 1  # inside the first array: the archive's checksum tells
    for data_bytes in (whole[:100], b"", b"text", bytes(flipped)):
        path.write_bytes(data_bytes)
        with pytest.raises(DataError, match=rf"{path} is not a readable .npz file"):
            data[1]
    np.savez(path, moments=np.zeros((4, 3, 2), np.float32))
    with pytest.raises(DataError, match=rf"{path} holds moments of shape \[4, 3, 2\], not \[4, 2, 2\]"):
        data[1]
    np.savez(path, other=np.zeros(2))
    with pytest.raises(DataError, match=rf"{path} holds no array 'moments'"):
        data[1]


def test_pickled_objects_in_npz_files_are_not_loaded(npz):
    data = load_moments(npz, flip=False)

    class Trap:
        def __reduce__(self):
            return pytest.fail, ("the pickle was executed",)

    path = npz / "n01440764" / "n01440764_1.JPEG.npz"
    np.savez(path, moments=np.array([Trap()], dtype=object))
    with pytest.raises(DataError, match=r"allow_pickle=False"):
        data[1]
