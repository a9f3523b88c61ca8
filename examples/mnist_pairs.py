"""Captions about pairs of digits, and rewards that verify them: text-to-image in miniature, on a CPU.

    python examples/mnist_pairs.py
    marval-rl pretrain recipes/mnist_pairs/teacher.yaml
    marval-rl distill recipes/mnist_pairs/distill.yaml
    marval-rl train recipes/mnist_pairs/reward_backprop.yaml

A caption names two digits of MNIST, in order, and may say of one of them how it is drawn: "a bold three left of a
seven", "a five left of a slanted zero", "two fives". A picture is 28 x 56 pixels, a digit in each half. A digit is made
bold or thin until its strokes have a certain width, and slanted by as much as is missing, so that both can be measured
in a picture. Of the 100 ordered pairs ten are never drawn: their captions are held out, so that a right picture of one
is not remembered. Written are

    runs/mnist_pairs/data/train.parquet      pictures and captions of 90 pairs, of the digits that are trained on
    runs/mnist_pairs/data/test.parquet       the same captions, drawn of held-out digits: to compare with
    runs/mnist_pairs/data/prompts.jsonl      those captions, and what each asks for: "bold left", "nothing", ...
    runs/mnist_pairs/data/held_out.txt       the captions of the other ten pairs

`Verified` is the reward: how probable it is, to a classifier that reads both halves, and by the strokes' width and
slant, that everything in a picture is right. `PictureRight`, `DigitsRight`, `OrderRight` and `AttributeRight` look at
it with another network and are never trained on.
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from datasets import Dataset
from PIL import Image
from torch import Tensor

from marval_rl.data import CroppedImages
from marval_rl.data.bundled import DIGIT_NAMES, SPLITS, BundledImages
from marval_rl.rewarding import load_reward

SIDE = 28
FINER = 4  # strokes grow and shrink by a fourth of a pixel
CONTRAST = 1.5  # thinner strokes would be paler
PLAIN, *ASKED = ATTRIBUTES = ("", "bold", "thin", "slanted")
DRAWN = {"bold": 3.9, "thin": 1.75, "slanted": 0.75}  # how a digit is drawn: stroke width in pixels, and slant
COUNTS = {"bold": 3.4, "thin": 2.0, "slanted": 0.5}  # from where on it counts as that
SHARPNESS = {"bold": 8.0, "thin": 12.0, "slanted": 16.0}  # of the sigmoid that the reward has in place of a step
HELD_OUT = tuple((digit, (3 * digit + 1) % 10) for digit in range(10))  # each digit once on each side
PICTURES = {"train": 16, "test": 2}  # of each caption


# ---- Captions ----


def caption(digits: tuple[int, int], attributes: tuple[str, str]) -> str:
    """ "a bold three left of a seven", "two fives"."""
    names = [DIGIT_NAMES[digit] for digit in digits]
    if digits[0] == digits[1] and attributes == (PLAIN, PLAIN):
        return f"two {names[0]}{'es' if names[0] == 'six' else 's'}"
    phrases = [f"{attribute} {name}".strip() for attribute, name in zip(attributes, names, strict=True)]
    return " left of ".join(f"{'an' if phrase == 'eight' else 'a'} {phrase}" for phrase in phrases)


def captions(held_out: bool) -> dict[str, tuple[tuple[int, int], tuple[str, str]]]:
    """The captions of the pairs that are held out, or of all others, sorted: what they say of left and right."""
    pairs = [pair for pair in itertools.product(range(10), repeat=2) if (pair in HELD_OUT) == held_out]
    attributes = [
        (first, second) for first, second in itertools.product(ATTRIBUTES, repeat=2) if PLAIN in (first, second)
    ]
    meant = ((pair, which) for pair, which in itertools.product(pairs, attributes))
    return dict(sorted((caption(*said), said) for said in meant))


def asks(attributes: tuple[str, str]) -> str:
    """ "bold left": what the anchor compares all pictures of; "nothing" for two plain digits."""
    return next((f"{what} {side}" for what, side in zip(attributes, ("left", "right"), strict=True) if what), "nothing")


MEANING = captions(False) | captions(True)


# ---- Digits: how they are drawn, and what is measured of them ----


def stroke_width(digits: Tensor) -> Tensor:
    """Width of the strokes [B], in pixels, of digits [B, H, W] in 0..1: twice the ink over the length of its edges."""
    padded = F.pad(digits, (0, 1, 0, 1))
    across, down = padded[:, :-1].diff(dim=2), padded[:, :, :-1].diff(dim=1)
    edges = (across.square() + down.square() + 1e-6).sqrt().sum((1, 2))
    return 2 * digits.sum((1, 2)) / edges


def slant(digits: Tensor) -> Tensor:
    """Slant [B] to the right, in pixels across for each one up, of digits [B, H, W] in 0..1, by image moments."""
    ink = digits.sum((1, 2)).clamp(min=1e-3)
    place = torch.arange(digits.shape[-1], device=digits.device, dtype=digits.dtype)
    rows, columns = digits.sum(2), digits.sum(1)  # [B, H], [B, W]
    down = place - ((rows * place).sum(1) / ink).unsqueeze(1)
    across = place - ((columns * place).sum(1) / ink).unsqueeze(1)
    covariance = torch.einsum("bhw,bh,bw->b", digits, down, across)
    return -covariance / (rows * down.square()).sum(1).clamp(min=1e-3)


def draw(digits: Tensor, attribute: str) -> Tensor:
    """Digits [B, 28, 28] in 0..1, drawn as an attribute says."""
    if attribute == PLAIN:
        return digits
    wanted = DRAWN[attribute]
    if attribute == "slanted":
        shear = wanted - slant(digits)
        matrix = torch.eye(2, 3).repeat(len(digits), 1, 1)
        matrix[:, 0, 1] = shear
        grid = F.affine_grid(matrix, [len(digits), 1, SIDE, SIDE], align_corners=False)
        return F.grid_sample(digits.unsqueeze(1), grid, align_corners=False).squeeze(1)
    sign = 1 if attribute == "bold" else -1
    fine = F.interpolate(digits.unsqueeze(1), scale_factor=FINER, mode="bilinear")
    for _ in range(2 * FINER):
        unfinished = sign * (wanted - stroke_width(digits)) > 0
        fine = torch.where(unfinished.view(-1, 1, 1, 1), sign * F.max_pool2d(sign * fine, 3, 1, 1), fine)
        drawn = F.avg_pool2d(fine, FINER).squeeze(1)
        digits = torch.where(
            unfinished.view(-1, 1, 1), (1.5 * drawn / drawn.amax((1, 2), keepdim=True)).clamp(max=1), digits
        )
    return digits


class DrawnDigits(BundledImages):
    """MNIST's digits of a split, each of them drawn in all four ways: what the classifiers learn from."""

    def __init__(self, split: str):
        super().__init__("mnist", split)
        self.plain = torch.from_numpy(self.arrays)  # [N, 28, 28]
        del self.arrays  # drawn when the first is read
        self.modes = self.class_labels = self.modes * len(ATTRIBUTES)
        self.title = f"the {split} split of mnist, drawn as {DRAWN}"

    @cached_property
    def arrays(self) -> np.ndarray:
        """[4 N, 28, 28] in 0..1, by attribute."""
        parts = self.plain.split(500)
        return torch.cat([draw(part, attribute) for attribute in ATTRIBUTES for part in parts]).numpy()


# ---- Rewards ----


class Verified:
    """Log-probability that a picture is what its caption says: that of the left digit, that of the right one, and,
    where it asks for an attribute, the logarithm of a sigmoid of how far the digit has it.

    Args:
        judge: The reward whose network reads the digits; it learns from those that are trained on.
    """

    differentiable = True

    def __init__(self, judge: str = "classifier"):
        offers = {"training_images": lambda: CroppedImages(DrawnDigits("train"), SIDE, flip=False, channels=1)}
        self.judge = load_reward(judge, offers)

    def __call__(self, *, images: Tensor, prompts: list[str], **_: object) -> Tensor:
        """Scores images [B, 3, 28, 56] in 0..1 -> [B]."""
        halves, digits, asked = self.read(images, prompts)
        log_probs = [self.judge.mode_log_probs(half).gather(1, digits[:, [side]]) for side, half in enumerate(halves)]
        score = torch.cat(log_probs, dim=1).sum(dim=1)
        for side, half in enumerate(halves):
            excess = excesses(half.mean(dim=1))
            for number, attribute in enumerate(ASKED):
                soft = F.logsigmoid(SHARPNESS[attribute] * excess[:, number])
                score = score + torch.where(asked[:, side] == number + 1, soft, 0)
        return score

    def read(self, images: Tensor, prompts: list[str]) -> tuple[list[Tensor], Tensor, Tensor]:
        """The halves of images [B, 3, 28, 56], the digits [B, 2] that the captions name, and indices [B, 2] of the
        attributes that they ask for, 0 for none."""
        meant = [MEANING[prompt] for prompt in prompts]
        digits = torch.tensor([numbers for numbers, _ in meant], device=images.device)
        asked = torch.tensor([[ATTRIBUTES.index(name) for name in names] for _, names in meant], device=images.device)
        return list(images.split(SIDE, dim=-1)), digits, asked

    def features(self, images: Tensor) -> Tensor:
        """The judge's features of both halves of images [B, 3, 28, 56], side by side."""
        return torch.cat([self.judge.features(half) for half in images.split(SIDE, dim=-1)], dim=1)


def excesses(digits: Tensor) -> Tensor:
    """How far digits [B, 28, 28] are past the bounds of bold, thin and slanted: [B, 3], positive for those that are."""
    width = stroke_width(digits)
    return torch.stack([width - COUNTS["bold"], COUNTS["thin"] - width, slant(digits) - COUNTS["slanted"]], dim=1)


class Checks(Verified):
    """What is right in a picture, by a network that RL never sees: 1 or 0."""

    differentiable = False

    def __init__(self) -> None:
        super().__init__("held_out_classifier")

    def checked(self, images: Tensor, prompts: list[str]) -> dict[str, Tensor]:
        """bool [B]: digits: both are there, in whatever order; order: each where it should be; attribute: as asked, and
        asked: whether the caption asks for one."""
        halves, digits, asked = self.read(images, prompts)
        found = torch.stack([self.judge.mode_log_probs(half).argmax(dim=1) for half in halves], dim=1)
        past = torch.stack([excesses(half.mean(dim=1)) > 0 for half in halves], dim=1)  # [B, 2, 3]
        fulfilled = F.pad(past, (1, 0), value=True).gather(2, asked.unsqueeze(2)).squeeze(2)
        return {
            "digits": (found.sort(dim=1).values == digits.sort(dim=1).values).all(dim=1),
            "order": (found == digits).all(dim=1),
            "attribute": fulfilled.all(dim=1),
            "asked": (asked > 0).any(dim=1),
        }


class PictureRight(Checks):
    """The share of pictures in which digits, order and attribute are right."""

    def __call__(self, *, images: Tensor, prompts: list[str], **_: object) -> Tensor:
        checked = self.checked(images, prompts)
        return (checked["order"] & checked["attribute"]).float()


class DigitsRight(Checks):
    """The share of pictures with the right two digits, in whatever order."""

    def __call__(self, *, images: Tensor, prompts: list[str], **_: object) -> Tensor:
        return self.checked(images, prompts)["digits"].float()


class OrderRight(Checks):
    """The share of pictures in which each digit is where it should be."""

    def __call__(self, *, images: Tensor, prompts: list[str], **_: object) -> Tensor:
        return self.checked(images, prompts)["order"].float()


class AttributeRight(Checks):
    """Of the pictures whose caption asks for an attribute, the share that has it where it should be."""

    def __call__(self, *, images: Tensor, prompts: list[str], **_: object) -> list[float | None]:
        checked = self.checked(images, prompts)
        pairs = zip(checked["attribute"].tolist(), checked["asked"].tolist(), strict=True)
        return [float(right) if asked else None for right, asked in pairs]


# ---- Pictures ----


def pictures(split: str, repeats: int) -> dict[str, list]:
    """Pictures of all captions that are not held out, `repeats` of each, of random digits of a split."""
    drawn = DrawnDigits(split)
    count = len(drawn.plain)
    labels = torch.tensor(drawn.class_labels[:count])
    by_digit = [(labels == digit).nonzero().flatten() for digit in range(10)]
    generator = torch.Generator().manual_seed(SPLITS.index(split))
    rows: dict[str, list] = {"image": [], "text": []}
    for text, (digits, attributes) in list(captions(held_out=False).items()) * repeats:
        halves = []
        for digit, attribute in zip(digits, attributes, strict=True):
            choices = by_digit[digit]
            chosen = choices[torch.randint(len(choices), (), generator=generator)]
            halves.append(drawn.arrays[ATTRIBUTES.index(attribute) * count + int(chosen)])
        buffer = io.BytesIO()
        Image.fromarray((np.concatenate(halves, axis=1) * 255).round().astype(np.uint8)).save(buffer, "PNG")
        rows["image"].append({"bytes": buffer.getvalue(), "path": None})
        rows["text"].append(text)
    return rows


def write(folder: Path) -> None:
    """Writes the pictures and the captions."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, repeats in PICTURES.items():
        rows = pictures(split, repeats)
        Dataset.from_dict(rows).to_parquet(folder / f"{split}.parquet")
        print(f"{len(rows['text'])} pictures of digits of the {split} split: {folder / split}.parquet")
    asked = {text: asks(attributes) for text, (_, attributes) in captions(held_out=False).items()}
    rows = [json.dumps({"prompt": text, "asks": what}) for text, what in asked.items()]
    for name, lines in (("prompts.jsonl", rows), ("held_out.txt", list(captions(held_out=True)))):
        (folder / name).write_text("\n".join(lines) + "\n")
        print(f"{len(lines)} captions: {folder / name}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/mnist_pairs/data"))
    write(parser.parse_args().output)


if __name__ == "__main__":
    main()
