"""Rewards that ask for the same network have one between them, and only then."""

from __future__ import annotations

import gc
import os
import shutil
import weakref
from pathlib import Path

import open_clip
import pytest
import torch
from marval_rl.rewards.aesthetic import Aesthetic
from marval_rl.rewards.clip import Clip
from marval_rl.rewards.hps import MODEL, Hps
from marval_rl.rewards.image_classifier import ImageClassifier
from marval_rl.rewards.pick_score import PickScore
from marval_rl.rewards.sharing import network_on, shared_network, weights_identity
from safetensors.torch import load_file, save_file
from tiny_rewards import (
    CLIP_CONFIG,
    TIMM_NAME,
    noise_images,
    write_aesthetic,
    write_classifier,
    write_clip,
    write_hps,
    write_pick_score,
    write_timm_classifier,
)
from torch import nn

META = torch.device("meta")  # the one other device that every machine has


@pytest.fixture
def folder(tmp_path) -> Path:
    return write_clip(tmp_path / "clip")


@pytest.fixture
def makers(tmp_path, folder, monkeypatch):
    """Makes a pair of rewards that want the same network, by name."""
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, MODEL, CLIP_CONFIG)
    pick_score = str(write_pick_score(tmp_path / "pick_score"))
    classifier = str(write_classifier(tmp_path / "classifier"))
    hps, head = write_hps(tmp_path / "hps"), write_aesthetic(tmp_path / "aesthetic")
    timm_weights = str(write_timm_classifier(tmp_path / "timm"))
    clip = f"local-dir:{folder}"
    return {
        "clip": lambda: (Clip(clip), Clip(clip, scale=1.0, prompt_template="a {name}")),
        "clip and aesthetic": lambda: (Clip(clip), Aesthetic(head, clip)),
        "hps": lambda: (Hps(hps), Hps(hps, scale=100.0)),
        "pick_score": lambda: (PickScore(pick_score, pick_score), PickScore(pick_score, pick_score)),
        "classifier": lambda: (ImageClassifier(classifier), ImageClassifier(classifier, score="margin")),
        "timm": lambda: tuple(ImageClassifier(f"timm:{TIMM_NAME}", timm_weights) for _ in range(2)),
    }


PAIRS = ["clip", "clip and aesthetic", "hps", "pick_score", "classifier", "timm"]


def num_weights() -> int:
    """Numbers in all the networks that are alive."""
    gc.collect()
    return sum(each.numel() for each in gc.get_objects() if type(each) is nn.Parameter)


@pytest.mark.parametrize("name", PAIRS)
def test_two_rewards_that_ask_for_one_network_have_one(makers, name):
    first, second = makers[name]()
    assert first.network is second.network


def test_memory_is_not_doubled(folder):
    before = num_weights()
    first = Clip(f"local-dir:{folder}")
    one = num_weights() - before
    second = Clip(f"local-dir:{folder}")
    assert one > 1_000_000 and num_weights() - before == one
    assert first is not second


def test_sharing_changes_no_score(folder):
    images, prompts = noise_images(2, 32, 40), ["two red cats", "an umbrella"]

    def score(reward: Clip) -> torch.Tensor:
        return reward(images=images, prompts=prompts, class_names=prompts)

    alone = score(Clip(f"local-dir:{folder}"))
    first, second = Clip(f"local-dir:{folder}"), Clip(f"local-dir:{folder}")
    assert torch.equal(score(first), alone) and torch.equal(score(second), alone)


def test_the_network_goes_with_its_last_reward(folder):
    first = Clip(f"local-dir:{folder}")
    second, network = Clip(f"local-dir:{folder}"), weakref.ref(first.network)
    del first
    gc.collect()
    assert network() is second.network
    del second
    gc.collect()
    assert network() is None


def test_nothing_is_shared_where_anything_differs(folder, tmp_path):
    first = Clip(f"local-dir:{folder}")
    other = write_clip(tmp_path / "other")
    kept = [first, Clip(f"local-dir:{folder}", dtype="bfloat16"), Clip(f"local-dir:{other}")]
    assert len({id(reward.network) for reward in kept}) == 3
    assert [next(reward.network.parameters()).dtype for reward in kept[:2]] == [torch.float32, torch.bfloat16]


def test_one_folder_by_two_paths_is_one(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to(folder)
    first = Clip(f"local-dir:{folder}")
    assert Clip("local-dir:clip").network is first.network
    assert Clip("local-dir:./link").network is first.network


def test_a_file_that_changed_is_read_again(folder):
    first = Clip(f"local-dir:{folder}")
    path = folder / "open_clip_model.safetensors"
    tensors = load_file(path)
    save_file({name: 2 * tensor for name, tensor in tensors.items()}, path)
    os.utime(path, ns=(0, 1))
    second = Clip(f"local-dir:{folder}")
    assert second.network is not first.network
    torch.testing.assert_close(second.network.visual.proj, 2 * first.network.visual.proj)


def test_the_same_file_for_another_architecture_is_not_shared(folder, monkeypatch):
    for name, config in (("tiny", CLIP_CONFIG), ("tiny-quickgelu", {**CLIP_CONFIG, "quick_gelu": True})):
        monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, name, config)
    file = str(folder / "open_clip_model.safetensors")
    first, second = Clip("tiny", file), Clip("tiny-quickgelu", file)
    assert first.network is not second.network
    assert Clip("tiny", file).network is first.network


def test_on_another_device_each_follows_its_own_images(folder):
    first, second = Clip(f"local-dir:{folder}"), Clip(f"local-dir:{folder}")
    here = first.network
    first._move_to(META)
    assert first.network.visual.proj.device == META and first.network.visual.conv1.weight.device == META
    assert first.network.attn_mask.device == META  # a buffer that is in no file
    assert not first.network.training and not any(each.requires_grad for each in first.network.parameters())
    assert second.network is here and here.visual.proj.device.type == "cpu"
    second._move_to(META)
    assert second.network is first.network


def test_on_the_way_to_another_device_the_old_copy_is_freed(folder):
    first, second = Clip(f"local-dir:{folder}"), Clip(f"local-dir:{folder}")
    here = weakref.ref(first.network)
    first._move_to(META)
    gc.collect()
    assert here() is second.network
    second._move_to(META)
    gc.collect()
    assert here() is None


def test_what_is_not_shared_is_moved():
    network = nn.Linear(2, 2)
    assert network_on(network, torch.device("cpu")) is network
    assert network_on(network, META) is network and network.weight.device == META


def test_a_network_that_could_not_be_loaded_is_asked_for_again():
    def fail() -> nn.Module:
        raise OSError("no such file")

    with pytest.raises(OSError, match="no such file"):
        shared_network("source", fail)
    network = shared_network("source", lambda: nn.Linear(2, 2))
    assert shared_network("source", fail) is network


def test_the_identity_of_weights(tmp_path):
    (tmp_path / "a").write_bytes(b"12")
    shutil.copy2(tmp_path / "a", tmp_path / "b")
    assert weights_identity(str(tmp_path / "a")) != weights_identity(str(tmp_path / "b"))
    folder = weights_identity(str(tmp_path))
    (tmp_path / "b").write_bytes(b"123")
    assert weights_identity(str(tmp_path)) != folder
    assert weights_identity("org/name") == "org/name"
