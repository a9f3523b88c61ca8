"""Captions about pairs of digits, and rewards that verify them: text-to-image in miniature, on a CPU.

    python examples/digit_pairs.py
    marval-rl pretrain recipes/digit_pairs/teacher.yaml
    marval-rl distill recipes/digit_pairs/distill.yaml
    marval-rl train recipes/digit_pairs/grpo.yaml

A caption names two digits, how they stand and how bright each is: "a three left of a faint seven", "a faint two above a
two". The pictures are made of scikit-learn's 8x8 digits on a canvas of 16 x 16. Of the 100 ordered pairs of digits ten
are never drawn: their captions are held out, so that a right picture of one is not remembered. Written are

    runs/digit_pairs/data/train.parquet      pictures and captions of 90 pairs
    runs/digit_pairs/data/prompts.txt        their captions, in the order of the pictures' labels
    runs/digit_pairs/data/held_out.txt       the captions of the other ten

`Verified` and `HeldOutVerified` say how far a picture is what its caption says, by a classifier on each half and the
ink that is measured there; the second one has another network, and is only looked at.
"""

from __future__ import annotations

import argparse
import io
import itertools
from pathlib import Path

import torch
from datasets import Dataset
from PIL import Image
from torch import Tensor

from marval_rl.data import load_image_dataset
from marval_rl.data.bundled import DIGIT_NAMES
from marval_rl.rewarding import load_reward

SIDE, CANVAS = 8, 16
PLACES = {  # top left corners of the two digits
    "left of": ((4, 0), (4, 8)),
    "above": ((0, 4), (8, 4)),
}
FAINT, BETWEEN = 0.4, 0.7  # brightness of a faint digit, and where faint ends
HELD_OUT = tuple((digit, (3 * digit + 1) % 10) for digit in range(10))  # each digit once on each side
PICTURES = 8  # of each caption


def caption(first: str, second: str, relation: str, faint: tuple[bool, bool]) -> str:
    """ "a three left of a faint seven"."""
    left, right = (
        f"a faint {name}" if pale else f"{'an' if name == 'eight' else 'a'} {name}"
        for name, pale in zip((first, second), faint, strict=True)
    )
    return f"{left} {relation} {right}"


def parse(text: str) -> tuple[list[int], str, list[bool]]:
    """The digits, the relation and which are faint; the inverse of `caption`."""
    relation = next(name for name in PLACES if f" {name} " in text)
    parts = text.split(f" {relation} ")
    return [DIGIT_NAMES.index(part.split()[-1]) for part in parts], relation, ["faint" in part for part in parts]


def captions(held_out: bool) -> list[str]:
    """The captions of the pairs that are held out, or of all others, sorted."""
    pairs = [pair for pair in itertools.product(range(10), repeat=2) if (pair in HELD_OUT) == held_out]
    faint = list(itertools.product((False, True), repeat=2))
    return sorted(
        caption(DIGIT_NAMES[first], DIGIT_NAMES[second], relation, pale)
        for (first, second), relation, pale in itertools.product(pairs, PLACES, faint)
    )


def draw(text: str, digits: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
    """A picture [16, 16] in 0..1 of a caption, of random digits [N, 8, 8] with labels [N]."""
    canvas = torch.zeros(CANVAS, CANVAS)
    wanted, relation, faint = parse(text)
    for digit, (row, column), pale in zip(wanted, PLACES[relation], faint, strict=True):
        choices = (labels == digit).nonzero().flatten()
        chosen = digits[choices[torch.randint(len(choices), (), generator=generator)]]
        canvas[row : row + SIDE, column : column + SIDE] = chosen * (FAINT if pale else 1.0)
    return canvas


class Verified:
    """How far each picture is what its caption says: the mean of P(first digit), P(second digit) and, for each of the
    two, whether it is as bright as it should be; 1 is all right.

    Args:
        judge: The reward whose network reads the digits.
        strict: 1 where everything is right, and 0 elsewhere, in place of the mean.
    """

    differentiable = True

    def __init__(self, judge: str = "classifier", strict: bool = False):
        self.judge = load_reward(judge, {"training_images": lambda: _digits()})
        self.strict = strict

    def __call__(self, *, images: Tensor, prompts: list[str], **_: object) -> Tensor:
        """Scores images [B, 3, 16, 16] in 0..1 -> [B]."""
        parsed = [parse(text) for text in prompts]
        scores = []
        for which in (0, 1):
            corners = [PLACES[relation][which] for _, relation, _ in parsed]
            crops = torch.stack(
                [image[:, r : r + SIDE, c : c + SIDE] for image, (r, c) in zip(images, corners, strict=True)]
            )
            bright = crops.flatten(1).topk(24, dim=1).values.mean(dim=1)  # 8 pixels of 3 channels
            log_probs = self.judge.mode_log_probs((crops / bright.view(-1, 1, 1, 1).clamp(min=0.05)).clamp(0, 1))
            digits = torch.tensor([numbers[which] for numbers, _, _ in parsed], device=images.device)
            pale = torch.tensor([faint[which] for _, _, faint in parsed], device=images.device)
            if self.strict:
                scores.append((log_probs.argmax(dim=1) == digits) & ((bright < BETWEEN) == pale))
            else:
                as_bright = ((bright - BETWEEN) * torch.where(pale, -20.0, 20.0)).sigmoid()
                scores += [log_probs.gather(1, digits.unsqueeze(1)).squeeze(1).exp(), as_bright]
        return torch.stack(scores).all(dim=0).float() if self.strict else torch.stack(scores).mean(dim=0)


class HeldOutVerified(Verified):
    """The share of pictures in which all is right, read by another network: to evaluate with, never to train on."""

    differentiable = False

    def __init__(self) -> None:
        super().__init__("held_out_classifier", strict=True)


def _digits():
    from marval_rl.data import load_cropped_images

    return load_cropped_images("digits")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/digit_pairs/data"))
    folder = parser.parse_args().output
    folder.mkdir(parents=True, exist_ok=True)
    data = load_image_dataset("digits", "train")
    digits = torch.stack([data[index]["images"][0] for index in range(len(data))])
    labels = torch.tensor([int(data[index]["class_labels"]) for index in range(len(data))])
    generator = torch.Generator().manual_seed(0)
    rows: dict[str, list] = {"image": [], "text": []}
    for text in captions(held_out=False) * PICTURES:
        buffer = io.BytesIO()
        pixels = (draw(text, digits, labels, generator) * 255).round().byte().numpy()
        Image.fromarray(pixels).save(buffer, "PNG")
        rows["image"].append({"bytes": buffer.getvalue(), "path": None})
        rows["text"].append(text)
    Dataset.from_dict(rows).to_parquet(folder / "train.parquet")
    for name, held_out in (("prompts", False), ("held_out", True)):
        (folder / f"{name}.txt").write_text("\n".join(captions(held_out)) + "\n")
    print(f"{len(rows['text'])} pictures of {len(captions(False))} captions, {len(captions(True))} held out: {folder}")


if __name__ == "__main__":
    main()
