"""examples/mnist_pairs.py: captions and what they mean, what is measured of a digit, and the rewards."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from marval_rl.data import load_image_dataset, load_labelled_images
from marval_rl.data.prompts import load_prompts
from marval_rl.models.maskgen.config import MaskGenConfig
from marval_rl.models.maskgen.model import MaskGenModel

EXAMPLES = Path(__file__).parents[1] / "examples"


def script(name: str) -> ModuleType:
    specification = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(specification)
    sys.modules[name] = module
    specification.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def pairs() -> ModuleType:
    yield script("mnist_pairs")
    for name in ("mnist_pairs", "judge_mnist_pairs"):
        sys.modules.pop(name, None)


class Reader:
    """Knows by heart which digit the given images show; others are a zero."""

    def __init__(self, digits: Tensor, labels: Tensor):
        self.digits, self.labels = digits.flatten(1), labels

    def features(self, images: Tensor) -> Tensor:
        return images.mean(dim=1)[:, ::7, ::7].flatten(1)

    def mode_log_probs(self, images: Tensor) -> Tensor:
        nearest = torch.cdist(images.mean(dim=1).flatten(1), self.digits).argmin(dim=1)
        return F.one_hot(self.labels[nearest], 10) * 8.0 - 8.0


@pytest.fixture(scope="module")
def drawn(pairs) -> dict[str, Tensor]:
    """[60, 28, 28] of held-out digits by attribute, six of each digit."""
    data = load_image_dataset("mnist", "test")
    chosen = torch.cat([(data.class_labels == digit).nonzero().flatten()[:6] for digit in range(10)])
    return {attribute: pairs.draw(data.images[chosen, 0], attribute) for attribute in pairs.ATTRIBUTES}


LABELS = torch.arange(10).repeat_interleave(6)


@pytest.fixture(scope="module")
def reader(drawn) -> Reader:
    return Reader(torch.cat(list(drawn.values())), LABELS.repeat(4))


@pytest.mark.parametrize(
    ("digits", "attributes", "text"),
    [
        ((3, 7), ("bold", ""), "a bold three left of a seven"),
        ((8, 8), ("", "thin"), "an eight left of a thin eight"),
        ((5, 5), ("", ""), "two fives"),
        ((6, 6), ("", ""), "two sixes"),
        ((8, 0), ("", "slanted"), "an eight left of a slanted zero"),
    ],
)
def test_a_caption_says_what_it_means(pairs, digits, attributes, text):
    assert pairs.caption(digits, attributes) == text
    assert pairs.MEANING[text] == (digits, attributes)


def test_held_out_pairs_have_every_digit_on_both_sides(pairs):
    seen, held_out = pairs.captions(False), pairs.captions(True)
    assert (len(seen), len(held_out)) == (630, 70) and not seen.keys() & held_out.keys()
    for side in (0, 1):
        assert {digits[side] for digits, _ in held_out.values()} == set(range(10))
    words = {word for text in seen for word in text.split()}
    assert {word for text in held_out for word in text.split()} <= words


def test_width_and_slant_of_shapes_that_are_known(pairs):
    bars = torch.zeros(3, 28, 28)
    for number, width in enumerate((2, 4, 6)):
        bars[number, 2:26, 10 : 10 + width] = 1
    assert torch.allclose(pairs.stroke_width(bars), torch.tensor([2.0, 4.0, 6.0]), rtol=0.25)
    assert pairs.slant(bars).abs().max() < 1e-5
    leaning = torch.zeros(1, 28, 28)
    for row in range(4, 24):
        leaning[0, row, 24 - row : 27 - row] = 1  # one to the right for each one up
    assert pairs.slant(leaning).item() == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize("attribute", ["bold", "thin", "slanted"])
def test_a_drawn_digit_is_measured_as_what_it_is(pairs, drawn, attribute):
    excess = pairs.excesses(drawn[attribute])[:, pairs.ASKED.index(attribute)]
    assert (excess > 0).float().mean() > 0.95
    plain = pairs.excesses(drawn[""])[:, pairs.ASKED.index(attribute)]
    assert (plain > 0).float().mean() < 0.4
    assert drawn[attribute].amin() >= 0 and drawn[attribute].amax() <= 1


def pictures_of(drawn: dict[str, Tensor], left: Tensor, right: Tensor) -> Tensor:
    return torch.cat([left, right], dim=-1).unsqueeze(1).expand(-1, 3, -1, -1).clone()


def test_what_is_checked(pairs, drawn, reader):
    """Of "a bold three left of a seven": right, digits exchanged, without the attribute, and another digit."""
    three, seven, one = (int(digit * 6) for digit in (3, 7, 1))
    bold, plain = drawn["bold"], drawn[""]
    left = torch.stack([bold[three], plain[seven], plain[three], bold[one]])
    right = torch.stack([plain[seven], bold[three], plain[seven], plain[seven]])
    images, texts = pictures_of(drawn, left, right), ["a bold three left of a seven"] * 4
    judge = pairs.Checks.__new__(pairs.PictureRight)
    judge.judge = reader
    checked = judge.checked(images, texts)
    assert checked["digits"].tolist() == [True, True, True, False]
    assert checked["order"].tolist() == [True, False, True, False]
    assert checked["attribute"].tolist() == [True, False, False, True] and checked["asked"].all()
    assert judge(images=images, prompts=texts).tolist() == [1, 0, 0, 0]
    judge.__class__ = pairs.AttributeRight
    plain_text = ["a three left of a seven", *texts[1:]]
    assert judge(images=images, prompts=plain_text) == [None, 0, 0, 1]


def test_the_reward_is_highest_where_all_is_right_and_its_gradient_thickens_strokes(pairs, drawn, reader):
    reward = pairs.Verified.__new__(pairs.Verified)
    reward.judge = reader
    three, seven = 18, 42
    images = pictures_of(drawn, drawn["bold"][[three, three]], drawn[""][[seven, seven]]).requires_grad_()
    texts = ["a bold three left of a seven", "a thin three left of a seven"]
    right, wrong = reward(images=images, prompts=texts)
    assert right > -0.5 and wrong < right - 3
    thin = pictures_of(drawn, drawn[""][[three]], drawn[""][[seven]]).requires_grad_()
    reward(images=thin, prompts=texts[:1]).sum().backward()
    with torch.no_grad():
        moved = (thin + 0.1 * thin.grad / thin.grad.abs().max()).clamp(0, 1)
    before, after = (pairs.stroke_width(images[:, :, :, :28].mean(dim=1)) for images in (thin.detach(), moved))
    assert after.item() > before.item()
    assert thin.grad[..., 28:].abs().max() == 0  # plain, and the reader has no gradient


def write_fewer(pairs, folder, monkeypatch, step: int) -> dict:
    """Held-out pictures of each `step`-th caption."""
    fewer = dict(list(pairs.captions(False).items())[::step])
    with monkeypatch.context() as patch:
        patch.setattr(pairs, "PICTURES", {"test": 2})
        patch.setattr(pairs, "captions", lambda held_out: {} if held_out else fewer)
        pairs.write(folder)
    return fewer


def test_the_files_that_recipes_read(pairs, tmp_path, monkeypatch):
    fewer = write_fewer(pairs, tmp_path, monkeypatch, 9)
    images = load_labelled_images(tmp_path / "test.parquet", caption_column="text")
    assert len(images) == 2 * len(fewer) and images.class_names == list(fewer)
    assert images.read(0).size == (56, 28)
    prompts = load_prompts(tmp_path / "prompts.jsonl")
    assert prompts["prompt"] == list(fewer)
    assert set(prompts["asks"]) == {"nothing", *(f"{a} {s}" for a in pairs.ASKED for s in ("left", "right"))}
    assert json.loads((tmp_path / "prompts.jsonl").read_text().splitlines()[0])["asks"] == "bold left"


def test_the_table_and_the_picture_of_a_student(pairs, drawn, reader, tmp_path, monkeypatch):
    judging = script("judge_mnist_pairs")
    seen = list(write_fewer(pairs, tmp_path, monkeypatch, 90))
    held_out = list(pairs.captions(held_out=True))[:2]
    settings = {"SEEN": seen, "HELD_OUT": held_out, "DATA": tmp_path, "SHOWN": (seen[0], held_out[0])}
    for name, value in settings.items():
        monkeypatch.setattr(judging, name, value)
    monkeypatch.setattr(pairs.Checks, "__init__", lambda self: setattr(self, "judge", reader))
    words = sorted({word for text in pairs.MEANING for word in text.split()})
    sizes = {"hidden_size": 16, "num_layers": 1, "num_heads": 2, "head_hidden_size": 16, "head_num_layers": 1}
    text = {"vocabulary": words, "text_length": 7, "text_width": len(words) + 7, "micro_condition_size": 0}
    pixels = {"image_size": [28, 56], "image_channels": 1, "num_tokens": 8, "latent_channels": 14**2}
    student = MaskGenModel(MaskGenConfig(**pixels, **sizes, **text, one_step_timestep=700))
    student.save_pretrained(tmp_path / "student")
    models = ["real", str(tmp_path / "student")]
    table = judging.compare(models, judging.Sampling(2, 1.0), [0, 1], tmp_path / "pairs.png")
    real, generated = (table[model] for model in models)
    assert real["attribute, seen"][0] > 0.9 and generated["all, seen"][0] < 0.5
    assert {"all, held out", "FD, digits", "recall, pixels", "diversity"} <= generated.keys()
    assert len(generated["FD, pixels"]) == 2 and generated["FD, pixels"][0] != generated["FD, pixels"][1]
    with Image.open(tmp_path / "pairs.png") as picture:
        assert picture.width > picture.height * 2
