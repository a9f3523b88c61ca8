"""ImageReward by its authors' package, served from the package's own environment, against ours.

`make test-image-reward`: installs that environment and needs 8 GB of memory, so it is not run by default.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from marval_rl.rewards.image_reward import MED_CONFIG, ImageReward, ImageRewardNetwork, network_configs, rename_weights
from marval_rl.rewards.remote import Remote
from remote_servers import ROOT, is_healthy, wait_until
from tiny_rewards import FIGURES, GOLDEN, noise_images, rule_b, to_pictures, to_tensor
from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Resize

pytestmark = [pytest.mark.image_reward_environment, pytest.mark.timeout(3600)]

ENVIRONMENT = ROOT / "rewards" / "environments" / "image_reward"
PROMPTS = FIGURES["prompts"]
VOCABULARY = 30522  # of bert-base-uncased


@pytest.fixture(scope="module")
def python() -> Path:
    subprocess.run(["make", "-C", str(ENVIRONMENT), "venv"], check=True)
    return ENVIRONMENT / ".venv" / "bin" / "python"


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, str]:
    """Random weights at full size (rule B: images score far apart) under the published names, and a vocabulary of the
    published size."""
    folder = tmp_path_factory.mktemp("image_reward")
    names = json.loads((GOLDEN / "key_map.json").read_text())
    shapes = {ours: list(tensor.shape) for ours, tensor in full_size_network().state_dict().items()}
    published = {name: shapes[ours] for name, ours in names.items() if ours is not None}
    torch.save({name: rule_b(name, shape) for name, shape in published.items()}, folder / "ImageReward.pt")
    words = (GOLDEN / "vocab.txt").read_text().splitlines()
    words += [f"[further{number}]" for number in range(VOCABULARY - len(words))]
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    return {
        "weights": str(folder / "ImageReward.pt"),
        "med_config": str(GOLDEN / "med_config.json"),
        "tokenizer": str(folder),
    }


def full_size_network() -> ImageRewardNetwork:
    vision = {
        "vision.embeddings.patch_embedding.weight": torch.empty(1024, 3, 16, 16, device="meta"),
        "vision.embeddings.position_embedding": torch.empty(1, 197, 1024, device="meta"),
        **{f"vision.encoder.layers.{n}.mlp.fc1.weight": torch.empty(4096, 1024, device="meta") for n in range(24)},
    }
    with torch.device("meta"):
        return ImageRewardNetwork(*network_configs(vision, MED_CONFIG, "the published sizes"))


@pytest.fixture(scope="module")
def package(python, files):
    """The package's scores, through its server."""
    command = [str(python), "-m", "marval_rl.rewarding.serving.server", "reward.py:PackageImageReward", "--port", "0"]
    command += ["--reward_kwargs", json.dumps(files)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    with subprocess.Popen(command, cwd=ENVIRONMENT, stdout=subprocess.PIPE, text=True, env=environment) as process:
        try:
            url = next((line.split()[-1] for line in process.stdout if "is served at http://" in line), None)
            assert url is not None, f"the server ended with {process.wait()}"
            wait_until(lambda: is_healthy(url))
            yield Remote(url, timeout=1800, max_wait=0)
        finally:
            process.kill()


@pytest.fixture(scope="module")
def ours(files) -> ImageReward:
    return ImageReward(files["weights"], files["med_config"], files["tokenizer"])


def test_the_server_runs_on_the_versions_of_its_own_environment(python):
    code = "import transformers, timm; print(transformers.__version__, timm.__version__)"
    found = subprocess.run([python, "-c", code], check=True, capture_output=True, text=True).stdout.split()
    assert found == ["4.55.4", "0.6.13"]


def test_the_names_are_those_of_the_published_file():
    names = json.loads((GOLDEN / "key_map.json").read_text())
    assert set(full_size_network().state_dict()) == set(rename_weights(dict.fromkeys(names)))


def scores(reward: Any, images: torch.Tensor) -> torch.Tensor:
    """[prompt, image]."""
    batch = {"class_names": ["none"] * len(images), "class_labels": torch.zeros(len(images), dtype=torch.int64)}
    with torch.no_grad():
        return torch.stack(
            [torch.as_tensor(reward(images=images, prompts=[prompt] * len(images), **batch)) for prompt in PROMPTS]
        )


@pytest.mark.parametrize(("height", "width"), [(224, 224), (256, 256), (200, 320)])
def test_both_score_alike(package, ours, height, width):
    images = noise_images(2, height, width)
    theirs = scores(package, images)
    # The package rounds to bytes where PIL has resized, which has no gradient, so ours does not. On the same bytes:
    prepare = Compose([Resize(224, InterpolationMode.BICUBIC), CenterCrop(224)])
    prepared = torch.cat([to_tensor(prepare(picture)) for picture in to_pictures(images)])
    on_bytes = float((theirs - scores(ours, prepared)).abs().max())
    resized = float((theirs - scores(ours, images)).abs().max())
    spread = float(theirs.std())
    print(
        f"{height} x {width}: {on_bytes:.1e} apart on PIL's bytes, {resized:.1e} with our resizing; spread {spread:.3f}"
    )
    assert on_bytes < 1e-5 and resized < 5e-3
    assert spread > 10 * 5e-3  # else a wrong network would score alike too
