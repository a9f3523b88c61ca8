"""`marval-rl cache`: from a recipe to a cache, in one process and in several, and what users get wrong."""

from __future__ import annotations

import math
import os
from pathlib import Path

import pytest
import yaml
from huggingface_hub import constants
from tiny_images import SIZE, contents, noise_image, tiny_autoencoder, write_partly_corrupt_folder

from marval_rl.cli import cache as cache_command
from marval_rl.cli.launch import Launch
from marval_rl.cli.main import main
from marval_rl.data import MomentsCache
from marval_rl.errors import CheckpointError, MarvalError, RecipeError
from marval_rl.launched import LAUNCHER, find_place

CLASSES = "60 images of 3 classes: ant, bee, cow"
DONE = "holds 58 images of 3 classes in 8 shards (0.00 GiB); 2 corrupt ones skipped"


@pytest.fixture(autouse=True)
def no_place(monkeypatch):
    """The tests may themselves run under a launcher."""
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", LAUNCHER):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    """A recipe for distillation that also says where images and VAE are."""
    root = tmp_path_factory.mktemp("recipe")
    tiny_autoencoder().save_pretrained(root / "vae")
    write_partly_corrupt_folder(root / "images" / "train")
    settings = {
        "dataset": str(root / "images"),
        "vae": str(root / "vae"),
        "image_size": SIZE,
        "shard_size": 8,
        "cache_batch_size": 4,
        "guidance_scale": 1.2,  # the trainer's
        "output_dir": str(root / "run"),
    }
    (root / "recipe.yaml").write_text(yaml.safe_dump(settings))
    return root / "recipe.yaml"


@pytest.fixture
def cache(recipe, tmp_path, capsys):
    """`cache(*words)` returns the exit code, stdout and stderr."""

    def run(*words: str) -> tuple[int, str, str]:
        code = main(["cache", str(recipe), "--cache_dir", str(tmp_path / "cache"), *words])
        return code, *capsys.readouterr()

    return run


def test_a_recipe_becomes_a_cache_and_skipped_images_are_listed(cache, recipe, tmp_path):
    code, out, err = cache()
    assert code == 0 and out.splitlines()[:2] == [CLASSES, f"done: {tmp_path / 'cache'} {DONE}"]
    assert out.splitlines()[3] == "  cow/0019.png: not an image format that Pillow knows"
    assert err.splitlines()[1] == "skipped cow/0019.png: not an image format that Pillow knows"
    assert len(MomentsCache(tmp_path / "cache")) == 58
    assert not (recipe.parent / "run").exists()  # nothing is trained
    before = contents(tmp_path / "cache")
    code, out, err = cache()
    assert code == 0 and DONE in out and err == ""
    assert contents(tmp_path / "cache") == before


def test_a_dry_run_writes_nothing(cache, tmp_path):
    code, out, _ = cache("--dry_run")
    assert code == 0 and not (tmp_path / "cache").exists()
    assert f"{CLASSES}\nshards: 8 of 8 images, 0 of them done\ndisk: 0.00 GiB in all" in out
    assert "image_size: 16" in out and out.endswith("nothing was encoded (--dry_run)\n")
    code, out, _ = cache("--dry_run", "--vae", "/no/such/vae")
    assert code == 0 and out.splitlines()[-1].startswith("missing: no VAE at /no/such/vae")


def test_a_dry_run_does_not_ask_the_hub(cache, monkeypatch):
    asked = []

    def load(name):
        asked.append((name, constants.HF_HUB_OFFLINE))
        raise CheckpointError("not in the hub's cache")

    monkeypatch.setattr(cache_command, "load_codec", load)
    assert "missing: not in the hub's cache" in cache("--dry_run", "--vae", "owner/vae")[1]
    assert asked == [("owner/vae", True)] and not constants.HF_HUB_OFFLINE


def test_a_repaired_image_is_found_by_the_same_command(cache, recipe, tmp_path):
    images = tmp_path / "images"
    write_partly_corrupt_folder(images)
    words = ("--dataset", str(images))
    cache(*words)
    noise_image(1005).save(images / "bee" / "0005.png")
    changed = "1 images changed since they were cached (bee/0005.png): 1 shards are encoded again"
    before = contents(tmp_path / "cache")
    code, out, _ = cache(*words, "--dry_run")
    assert code == 0 and changed in out and "shards: 8 of 8 images, 7 of them done" in out
    assert contents(tmp_path / "cache") == before
    code, out, _ = cache(*words)
    assert code == 0 and out.splitlines()[1] == changed and "holds 59 images" in out and "1 corrupt ones skipped" in out
    assert "changed" not in cache(*words)[1]


def test_processes_that_a_launcher_places_share_the_work(cache, monkeypatch, tmp_path):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    code, out, err = cache()
    assert code == 0 and out.startswith("this process is done; the last one writes the manifest")
    assert err.startswith("process 1 of 2: skipped") and len(list((tmp_path / "cache").glob("*.safetensors"))) == 4
    monkeypatch.setenv("RANK", "0")
    assert DONE in cache("--num_processes", "2")[1]  # the number may be said again, if it is the same
    code, _, err = cache("--num_processes", "4")
    assert code == 2 and "num_processes is 4, but the environment says WORLD_SIZE=2" in err


def test_several_processes_are_started_and_the_end_is_reported_once(cache, monkeypatch, tmp_path, recipe):
    started = []

    def run_both(launch, arguments, grace):
        started.append((launch, list(arguments), grace))
        for rank in range(launch.num_processes):
            monkeypatch.setenv("WORLD_SIZE", str(launch.num_processes))
            monkeypatch.setenv("RANK", str(rank))
            monkeypatch.setenv(LAUNCHER, str(os.getppid()))
            assert main(list(arguments)) == 0
        monkeypatch.delenv("WORLD_SIZE")
        monkeypatch.delenv(LAUNCHER)

    monkeypatch.setattr("marval_rl.cli.cache.run_processes", run_both)
    code, out, _ = cache("--num_processes", "2")
    assert code == 0 and out.count("done: ") == 1 and DONE in out
    words = ["cache", str(recipe), "--cache_dir", str(tmp_path / "cache"), "--num_processes", "2"]
    assert started == [(Launch(num_processes=2), words, math.inf)]  # one that fails does not end the others
    assert DONE in cache("--num_processes", "2")[1] and len(started) == 1  # nothing is missing: none is started


def test_a_process_that_fails_is_named_with_the_way_to_resume(cache, monkeypatch):
    def fail(*_, **__):
        raise MarvalError("process 1 of 2: was killed by SIGKILL")

    monkeypatch.setattr("marval_rl.cli.cache.run_processes", fail)
    code, _, err = cache("--num_processes", "2")
    assert (code, err) == (
        1,
        "marval-rl: error: process 1 of 2: was killed by SIGKILL; finished shards are kept: run the same command "
        "again to resume\n",
    )


def test_verify_names_bad_shards_which_a_rerun_repairs(cache, tmp_path):
    cache()
    before = contents(tmp_path / "cache")
    code, out, _ = cache("--verify")
    assert code == 0 and out == f"{tmp_path / 'cache'}: all shards are as they were written\n"
    path = tmp_path / "cache" / "shard-00003.safetensors"
    path.write_bytes(before[path.name][:-1] + b"\x00\x01"[before[path.name][-1] == 0 :][:1])
    code, _, err = cache("--verify")
    assert code == 1 and "1 bad shards" in err and "shard-00003.safetensors: its bytes are not those" in err
    assert DONE in cache()[1] and contents(tmp_path / "cache") == before


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["--dataset", "null"], 2, "dataset is not set"),
        (["--dataset", "/no/such/images"], 1, "no images at /no/such/images: the path does not exist"),
        (["--vae", "null"], 2, "vae is not set, and no teacher names one"),
        (["--vae", "models/kl16"], 1, "no VAE at models/kl16: the path does not exist"),
        (["--image_size", "null"], 2, "image_size is not set"),
        (["--cache_dir", "null"], 2, "cache_dir is not set"),
        (["--cache_dtype", "int8"], 2, "--cache_dtype: expected one of float32, float16, bfloat16, got 'int8'"),
        (["--num_processes", "0"], 2, "num_processes must be at least 1, not 0"),
        (["--shard_size", "0"], 2, "shard_size must be at least 1, not 0"),
        (["--image_size", "15"], 2, "image_size 15 is not a multiple of the VAE's stride 2"),
        (["--shard_sise", "4"], 2, "unknown option --shard_sise; did you mean shard_size"),
    ],
)
def test_an_error_is_one_line(cache, words, code, message):
    found, _, err = cache(*words)
    assert found == code and len(err.splitlines()) == 1 and message in err


def test_other_settings_than_before_are_refused(cache, tmp_path):
    cache()
    code, _, err = cache("--cache_dtype", "float16")
    assert code == 1 and f"{tmp_path / 'cache'} was begun with another setting: cache_dtype was float32" in err


def test_lines_of_progress_come_now_and_then(cache, monkeypatch):
    monkeypatch.setattr(cache_command, "SECONDS_BETWEEN_LINES", 0)
    out = cache()[1].splitlines()
    assert len(out) == 1 + 15 + 3  # the images, a line per batch, and the summary
    assert out[3].startswith("1 of 8 shards, ") and out[15].endswith(" images/s, 2 skipped")


@pytest.mark.parametrize(("rank", "world_size"), [("2", "2"), ("-1", "2"), ("x", "2"), ("0", "")])
def test_a_place_that_makes_no_sense_is_refused(monkeypatch, rank, world_size):
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", world_size)
    with pytest.raises(RecipeError, match="the environment gives this process no place"):
        find_place()
