"""The example that trains a CLIP on captioned digits, and the recipe that uses it as a reward."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import open_clip
import pytest
import torch
import torch.nn.functional as F
import yaml
from open_clip.loss import SigLipLoss
from PIL import Image
from tiny_recipes import RECIPES, is_finite, run_recipe, training_lines

from marval_rl.cli import main as cli
from marval_rl.data import load_image_dataset
from marval_rl.rewarding import load_reward

SCRIPT = Path(__file__).parents[1] / "examples" / "digits_clip.py"


@pytest.fixture(scope="module")
def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("digits_clip", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def trained(example, tmp_path_factory) -> Path:
    """The folder of a CLIP that was trained for a few steps."""
    folder = tmp_path_factory.mktemp("clip")
    with torch.random.fork_rng():
        example.save(example.train(steps=30, seed=0), folder)
    return folder


def test_captions_are_true_of_the_right_digits(example):
    texts, truths = example.captions()
    assert truths.shape == (10, len(texts)) and len(set(texts)) == len(texts)
    assert truths[7].bool().tolist() == ["seven" in text or "odd digit" in text for text in texts]
    assert truths[4].bool().tolist() == ["four" in text or "even digit" in text for text in texts]


def test_captions_fit_into_the_context(example):
    texts, _ = example.captions()
    length = example.MODEL["text_cfg"]["context_length"]
    tokens = open_clip.SimpleTokenizer(context_length=77)(texts)
    assert int((tokens != 0).sum(dim=1).max()) <= length  # or "even" and "odd" would be cut off unseen


def test_the_loss_is_that_of_siglip(example):
    """open_clip's own, for as many captions as images and one true caption each."""
    torch.manual_seed(0)
    model = open_clip.CLIP(**example.MODEL)
    images = torch.rand(4, 1, 8, 8)
    tokens = open_clip.SimpleTokenizer(context_length=12)(["zero", "one", "two", "three"])
    found = example.siglip_loss(model, images, tokens, torch.eye(4))
    pixels = (images.repeat(1, 3, 1, 1) - 0.3) / 0.4
    embeddings = F.normalize(model.encode_image(pixels), dim=1), F.normalize(model.encode_text(tokens), dim=1)
    expected = SigLipLoss()(*embeddings, model.logit_scale.exp(), model.logit_bias)
    torch.testing.assert_close(found, expected)


def test_nothing_is_true_of_a_spoilt_image(example):
    images = torch.arange(8.0).view(8, 1, 1, 1).expand(-1, 1, 8, 8) / 8
    torch.manual_seed(0)
    mixed, truth = example.spoil(images, torch.ones(8, 3))
    assert truth.sum(dim=1).tolist() == [0, 0, 3, 3, 3, 3, 3, 3]
    assert [sorted(set(image.flatten().tolist())) for image in mixed[:3]] == [[0, 0.75], [0.125, 0.875], [0.25]]


def test_it_learns_and_is_read_back_as_a_reward(example, trained):
    """Thirty steps do not make a judge, but what was saved is what was trained, and the loss fell."""
    assert example.zero_shot_accuracy(trained, None) <= 1
    reward = load_reward("clip", model=f"local-dir:{trained}", scale=1.0)
    data = load_image_dataset("digits", "test")
    images, digits = data.images, data.class_labels
    texts, truths = example.captions()
    tokens = open_clip.SimpleTokenizer(context_length=12)(texts)
    torch.manual_seed(0)
    untrained = open_clip.CLIP(**example.MODEL)
    with torch.no_grad():
        losses = [
            float(example.siglip_loss(model.eval(), images[:100], tokens, truths[digits[:100]]))
            for model in (untrained, reward.network)
        ]
    assert losses[1] < losses[0] - 2, losses


def test_the_recipe_rewards_with_it(trained, tiny_runs, tmp_path):
    recipe = yaml.safe_load((RECIPES / "grpo_clip.yaml").read_text())
    kwargs = recipe["reward_kwargs"]
    assert kwargs["clip"]["model"] == "local-dir:runs/digits/clip"  # where the script writes
    kwargs["clip"]["model"] = f"local-dir:{trained}"
    settings = {"reward_funcs": None, "eval_reward_funcs": None, "reward_kwargs": json.dumps(kwargs)}
    models = {"model": tiny_runs.student}
    path = RECIPES / "grpo_clip.yaml"
    assert run_recipe("grpo", tmp_path, path=path, gsim_weight=0, max_steps=2, **models, **settings) == 0
    lines = training_lines(tmp_path)
    assert len(lines) == 2
    assert is_finite(lines[0]["rewards/clip/mean"]) and lines[0]["rewards/clip/std"] > 0


def test_scoring_a_folder_prints_the_mean(trained, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("images").mkdir()
    images = load_image_dataset("digits", "test").images
    for number, image in enumerate(images[:3]):
        Image.fromarray((image[0] * 255).byte().numpy()).save(f"images/{number}.png")
    Path("prompts.txt").write_text("zero\none\ntwo\n")
    kwargs = json.dumps({"model": f"local-dir:{trained}", "prompt_template": "a handwritten {name}"})
    arguments = ["clip", "--images", "images", "--prompts", "prompts.txt", "--reward_kwargs", kwargs]
    assert cli.main(["rewards", "score", *arguments, "--output", "scores.json"]) == 0
    scores = [row["score"] for row in json.loads(Path("scores.json").read_text())]
    assert f"clip: mean {sum(scores) / 3:.4f}, standard deviation" in capsys.readouterr().out
