"""Writing a cache of VAE moments: what is in it; killed and resumed; damaged and repaired."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_images import (
    CACHE_SETTINGS,
    NUM_SHARDS,
    SIZE,
    contents,
    noise_image,
    tiny_codec,
    write_cache,
    write_folder,
    write_partly_corrupt_folder,
)

from marval_rl.data import CroppedImages, MomentsCache, load_moments
from marval_rl.data.image_folder import ImageFolder
from marval_rl.data.moments.manifest import verify
from marval_rl.data.moments.writer import CacheJob, build_cache
from marval_rl.errors import DataError


@pytest.fixture(scope="module")
def codec():
    return tiny_codec()


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    return write_partly_corrupt_folder(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def finished(images, tmp_path_factory) -> Path:
    """A cache that nothing disturbed; nothing may change it."""
    return write_cache(images, tmp_path_factory.mktemp("cache") / "finished")


@pytest.fixture
def build(images, codec, tmp_path):
    """`build(folder, source, codec, **settings)`: the manifest."""

    def run(folder: Path = tmp_path / "cache", source=None, codec=codec, **settings):
        stored = {name: settings.pop(name) for name in CacheJob.__dataclass_fields__ if name in settings}
        stored = {"image_size": SIZE, **CACHE_SETTINGS, **stored}
        job = CacheJob(source or ImageFolder(images), codec, folder=folder, **stored)
        return build_cache(job, batch_size=4, **settings)

    return run


@pytest.fixture
def copy(finished, tmp_path) -> Path:
    """A copy of the finished cache, to be damaged."""
    return Path(shutil.copytree(finished, tmp_path / "copy"))


def times_of(folder: Path) -> dict[str, int]:
    """When each file of a shard was written."""
    return {path.name: path.stat().st_mtime_ns for path in folder.glob("shard-*")}


def change_last_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


# What is in it


def test_every_image_is_there_once_with_its_label_and_moments(finished, images, codec):
    source, manifest = ImageFolder(images), json.loads((finished / "manifest.json").read_text())
    shards = [load_file(finished / shard["file"]) for shard in manifest["shards"]]
    indices = torch.cat([shard["indices"] for shard in shards]).tolist()
    assert indices == [index for index in range(60) if index not in (25, 59)]
    assert torch.cat([shard["class_labels"] for shard in shards]).tolist() == [i // 20 for i in indices]
    plain = CroppedImages(source, SIZE, flip=False)
    pixels = torch.stack([plain[index]["images"] for index in indices])
    for name, expected in (("moments", codec.moments(pixels)), ("moments_flip", codec.moments(pixels.flip(-1)))):
        found = torch.cat([shard[name] for shard in shards])
        assert found.dtype == torch.float32 and found.shape == (58, 4, SIZE // 2, SIZE // 2)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_the_manifest_counts_images_and_lists_skipped_ones(finished):
    manifest = json.loads((finished / "manifest.json").read_text())
    assert manifest["images"] == 58 and manifest["class_counts"] == [20, 19, 19]
    assert (
        len(manifest["shards"]) == NUM_SHARDS
        and manifest["class_names"] == ["ant", "bee", "cow"]
        and manifest["image_size"] == SIZE
    )
    skipped = manifest["skipped"]
    assert [(image["index"], image["name"]) for image in skipped] == [(25, "bee/0005.png"), (59, "cow/0019.png")]
    assert skipped[1]["reason"] == "not an image format that Pillow knows" and skipped[0]["reason"]
    assert manifest["bytes"] == sum(path.stat().st_size for path in finished.glob("*.safetensors"))


@pytest.mark.parametrize(("dtype", "tolerance"), [("float16", 1e-3), ("bfloat16", 1e-2)])
def test_moments_may_be_stored_in_half_precision(build, finished, tmp_path, dtype, tolerance):
    build(dtype=dtype)
    half, whole = MomentsCache(tmp_path / "cache"), MomentsCache(finished)
    assert load_file(tmp_path / "cache" / "shard-00000.safetensors")["moments"].dtype == getattr(torch, dtype)
    for index in (0, 30, 57):
        assert half[index]["moments"].dtype == torch.float32
        torch.testing.assert_close(half[index]["moments"], whole[index]["moments"], rtol=tolerance, atol=tolerance)


def test_without_flips_half_the_room_is_enough(build, tmp_path):
    build(flip=False)
    assert set(load_file(tmp_path / "cache" / "shard-00000.safetensors")) == {"moments", "class_labels", "indices"}
    assert len(MomentsCache(tmp_path / "cache", flip=False)) == 58
    with pytest.raises(DataError, match="was made without flipped images: train with --flip false"):
        MomentsCache(tmp_path / "cache")


def test_workers_that_decode_change_nothing(build, finished, tmp_path):
    build(num_workers=2)
    assert contents(tmp_path / "cache") == contents(finished)


def test_progress_is_reported(build):
    reports = []
    build(progress=reports.append)
    assert [p.shards_done for p in reports] == [shard for shard in range(8) for _ in range(2 if shard < 7 else 1)]
    assert reports[-1].num_skipped == 2 and [image["index"] for p in reports for image in p.skipped] == [25, 59]
    assert all(p.shards_total == 8 and p.images_per_second > 0 for p in reports)


@pytest.mark.parametrize(("number", "shards"), [(10, [0, 2]), (8, [0])])
def test_a_shard_of_corrupt_images_only_is_empty(build, tmp_path, number, shards):
    root = write_folder(tmp_path / "bad", {"ant": number})
    for i in range(8):
        (root / "ant" / f"{i:04d}.png").write_bytes(b"")
    manifest = build(source=ImageFolder(root))
    assert [shard["images"] for shard in manifest["shards"]] == shards and len(manifest["skipped"]) == 8
    if sum(shards):
        cache = MomentsCache(tmp_path / "cache", flip=False)
        assert len(cache) == 2 and torch.isfinite(cache[0]["moments"]).all()
        return
    with pytest.raises(DataError, match="holds no images: all 8 were corrupt"):
        MomentsCache(tmp_path / "cache")


# Killed and resumed


def start_processes(images: Path, folder: Path, seconds_per_batch: float) -> list[multiprocessing.Process]:
    def encode(rank: int) -> None:
        job = CacheJob(ImageFolder(images), tiny_codec(), SIZE, folder, **CACHE_SETTINGS)
        wait = {"progress": lambda progress: time.sleep(seconds_per_batch)}
        build_cache(job, batch_size=4, rank=rank, world_size=2, **wait)

    processes = [multiprocessing.get_context("fork").Process(target=encode, args=(rank,)) for rank in (0, 1)]
    for process in processes:
        process.start()
    return processes


def test_killed_processes_leave_a_cache_that_is_resumed_to_the_same_bytes(images, finished, tmp_path):
    folder = tmp_path / "cache"
    processes = start_processes(images, folder, seconds_per_batch=0.2)
    while len(list(folder.glob("shard-*.json"))) < 3:
        assert all(process.is_alive() for process in processes)
        time.sleep(0.01)
    for process in processes:
        os.kill(process.pid, signal.SIGKILL)
        process.join()
    kept = {name: (folder / name).stat().st_mtime_ns for name in contents(folder) if name.endswith(".json")}
    assert 3 <= len(kept) - 1 < NUM_SHARDS and not (folder / "manifest.json").exists()
    with pytest.raises(DataError, match=rf"is unfinished: {len(kept) - 1} of 8 shards; run `marval-rl cache` again"):
        MomentsCache(folder)

    processes = start_processes(images, folder, seconds_per_batch=0)
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert contents(folder) == contents(finished)
    assert all((folder / name).stat().st_mtime_ns == when for name, when in kept.items())  # nothing was done twice


def test_files_that_a_killed_process_left_half_written_are_rebuilt(build, copy, finished):
    (copy / "manifest.json").unlink()
    before = times_of(copy)
    half = (copy / "shard-00001.safetensors").read_bytes()[:500]
    (copy / "shard-00001.safetensors").write_bytes(half)  # with its sidecar
    (copy / "shard-00004.json").write_text('{"file": "shard-000')
    # The second is complete, but nothing says so.
    for name in ("00002.json", "00003.safetensors", "00005.json", "00005.safetensors"):
        (copy / f"shard-{name}").unlink()
    for name in ("cache.json", "manifest.json", "shard-00005.safetensors"):
        (copy / f"{name}.tmp-1234").write_bytes(half)
    build(copy)
    assert contents(copy) == contents(finished)
    assert times_of(copy)["shard-00000.safetensors"] == before["shard-00000.safetensors"]


def test_a_finished_cache_is_left_alone_even_if_the_vae_has_moved(build, copy):
    before = times_of(copy)
    assert build(copy)["images"] == 58
    (copy / "manifest.json").unlink()
    assert build(copy, vae_name="elsewhere/tiny")["images"] == 58
    assert times_of(copy) == before


def test_a_rebuilt_shard_takes_the_manifest_away_until_it_is_done(build, copy):
    (copy / "shard-00002.json").unlink()
    assert build(copy, rank=1, world_size=2) is None  # shard 2 belongs to the other process
    assert not (copy / "manifest.json").exists()
    assert build(copy, rank=0, world_size=2)["images"] == 58


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_size": 32}, "image_size was 16 and is now 32"),
        ({"dtype": "float16"}, "cache_dtype was float32 and is now float16"),
        ({"shard_size": 4}, "shard_size was 8 and is now 4"),
        ({"flip": False}, "flip was True and is now False"),
        ({"codec": tiny_codec(1)}, "the weights of the VAE was"),
    ],
)
def test_a_cache_is_not_resumed_with_other_settings(build, copy, finished, changes, message):
    with pytest.raises(DataError, match=f"was begun with another setting: {message}"):
        build(copy, **changes)
    assert contents(copy) == contents(finished)


def test_a_cache_is_not_resumed_with_other_images(build, copy, tmp_path):
    root = write_folder(tmp_path / "other", {"ant": 20, "bee": 20, "cow": 20})

    def refused(message: str) -> None:
        with pytest.raises(DataError, match=message):
            build(copy, source=ImageFolder(root))

    for path in root.glob("*/*.png"):
        noise_image(0, 30, 30).save(path)
    refused(r"60 images changed since they were cached .* of 60: .* Delete \S*copy to")
    (root / "ant" / "0000.png").rename(root / "ant" / "x.png")
    refused(r"the images \(names or labels\) was")
    (root / "ant" / "x.png").unlink()
    refused(r"the number of images was 60 and is now 59; set it back, delete \S*copy to")


@pytest.fixture
def repaired(tmp_path) -> Path:
    """A folder with two corrupt images, to be repaired; with its cache in `cache`."""
    root = write_partly_corrupt_folder(tmp_path / "repaired")
    write_cache(root, tmp_path / "cache")
    return root


def test_repaired_and_replaced_images_are_noticed_and_only_their_shards_rebuilt(build, repaired, tmp_path):
    folder, found = tmp_path / "cache", []
    before = times_of(folder)
    noise_image(1005).save(repaired / "bee" / "0005.png")  # image 25, of shard 3
    noise_image(77).save(repaired / "ant" / "0003.png")  # of shard 0
    assert MomentsCache(folder).changes().startswith(f"{repaired / 'ant' / '0003.png'} changed since it was cached: ")
    manifest = build(folder, source=ImageFolder(repaired), report_changes=found.append)
    assert manifest["images"] == 59 and [image["index"] for image in manifest["skipped"]] == [59]
    assert found[0].names == ["ant/0003.png", "bee/0005.png"] and found[0].shards == [0, 3]
    assert {name[6:11] for name, when in times_of(folder).items() if when != before[name]} == {"00000", "00003"}
    build(tmp_path / "fresh", source=ImageFolder(repaired))
    assert contents(folder) == contents(tmp_path / "fresh") and MomentsCache(folder).changes() is None


def test_an_image_of_the_same_size_and_an_image_readable_by_now_are_noticed(build, repaired, tmp_path, monkeypatch):
    folder, found = tmp_path / "cache", []
    path = repaired / "ant" / "0001.png"
    change_last_byte(path)  # another checksum of the last, empty chunk: Pillow does not mind
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))
    build(folder, source=ImageFolder(repaired), report_changes=found.append)
    assert found[0].names == ["ant/0001.png"]
    sidecar = json.loads((folder / "shard-00000.json").read_text())
    sidecar["skipped"] = [{"index": 2, "name": "ant/0002.png", "reason": "an older Pillow could not read it"}]
    (folder / "shard-00000.json").write_text(json.dumps(sidecar))
    build(folder, source=ImageFolder(repaired), report_changes=found.append)
    assert found[1].names == ["ant/0002.png"]


def test_a_copy_of_the_images_with_other_times_rebuilds_nothing(build, repaired, tmp_path):
    folder = tmp_path / "cache"
    before = times_of(folder)
    for path in repaired.glob("*/*.png"):
        os.utime(path, ns=(1, 1))
    assert MomentsCache(folder).changes() is None
    build(folder, source=ImageFolder(repaired))
    after = times_of(folder)
    assert all(after[name] == when for name, when in before.items() if name.endswith(".safetensors"))
    build(tmp_path / "fresh", source=ImageFolder(repaired))
    assert contents(folder) == contents(tmp_path / "fresh")  # the new times are recorded


def test_training_reports_added_and_lost_images(repaired, tmp_path):
    noise_image(3).save(repaired / "ant" / "new.png")
    assert "images were added, removed or renamed in" in MomentsCache(tmp_path / "cache").changes()
    repaired.rename(tmp_path / "elsewhere")
    assert MomentsCache(tmp_path / "cache").changes() is None  # the cache does without the images


def test_shards_of_other_settings_do_not_count(build, copy, tmp_path):
    (copy / "cache.json").unlink()
    (copy / "manifest.json").unlink()
    build(copy, dtype="float16")
    build(tmp_path / "fresh", dtype="float16")
    assert contents(copy) == contents(tmp_path / "fresh")


def test_a_full_disk_ends_in_one_error_and_leaves_no_temporary_file(build, copy, finished, monkeypatch):
    (copy / "shard-00003.json").unlink()
    synchronise = os.fsync

    def full(descriptor: int) -> None:
        if b"shard-00003.safetensors" in os.readlink(f"/proc/self/fd/{descriptor}").encode():
            raise OSError(errno.ENOSPC, "No space left on device")
        synchronise(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(DataError, match=r"cannot write .*shard-00003.safetensors: No space left on device; "):
            build(copy)
    assert not list(copy.glob("*.tmp-*"))
    build(copy)
    assert contents(copy) == contents(finished)


def test_moments_that_overflow_are_refused_with_the_name_of_the_image(build):
    broken = tiny_codec()
    with torch.no_grad():
        broken.autoencoder.quant_conv.bias[0] = 1e5  # finite, but not in float16
    with pytest.raises(DataError, match=r"the moments of ant/0000.png are not finite as float16"):
        build(codec=broken, dtype="float16")


def test_images_that_cannot_be_read_at_all_are_not_skipped(build, tmp_path):
    root = write_folder(tmp_path / "gone", {"ant": 10})
    source = ImageFolder(root)
    (root / "ant" / "0003.png").unlink()
    with pytest.raises(DataError, match=r"cannot read .*0003.png: No such file"):
        build(source=source)


def test_a_size_that_does_not_suit_the_vae_is_refused_before_anything_is_written(build, tmp_path):
    with pytest.raises(ValueError, match="image_size 15 is not a multiple of the VAE's stride 2"):
        build(image_size=15)
    assert not (tmp_path / "cache").exists()


# Damage


def test_verify_finds_changed_bytes_and_a_rerun_repairs_them(build, copy, finished):
    assert verify(copy) == []
    change_last_byte(copy / "shard-00004.safetensors")
    (copy / "shard-00006.safetensors").unlink()
    assert verify(copy) == [
        "shard-00004.safetensors: its bytes are not those that were written",
        "shard-00006.safetensors: missing, cut off or unfinished",
    ]
    with pytest.raises(DataError, match="is unfinished: 6 of 8 shards"):
        MomentsCache(copy)
    build(copy)
    assert contents(copy) == contents(finished) and verify(copy) == []


def test_a_missing_or_shortened_shard_is_noticed_before_training(copy):
    path = copy / "shard-00002.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DataError, match=r"shard-00002.safetensors has \d+ of its \d+ bytes: run `marval-rl cache`"):
        MomentsCache(copy)
    path.unlink()
    with pytest.raises(DataError, match=r"shard-00002.safetensors has 0 of its"):
        MomentsCache(copy)


def test_a_shard_whose_header_is_damaged_is_named(copy):
    path = copy / "shard-00000.safetensors"
    data = path.read_bytes()
    for header in (b"\xff" * 8 + data[8:], data[:8] + b"x" + data[9:]):
        path.write_bytes(header)
        with pytest.raises(DataError, match=r"cannot read the shard .*shard-00000.safetensors"):
            MomentsCache(copy)[0]


def test_a_folder_that_is_not_a_cache_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"no cache at .*nowhere: the folder does not exist"):
        load_moments(tmp_path / "nowhere")
    with pytest.raises(DataError, match="holds no class folders"):
        load_moments(tmp_path)
    with pytest.raises(DataError, match=r"holds no cache: cache.json is missing or damaged"):
        verify(tmp_path)
