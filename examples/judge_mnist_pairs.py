"""What is right in pictures of seen and of held-out captions: the table and the picture of docs/text.md.

    python examples/judge_mnist_pairs.py runs/mnist_pairs/distill runs/mnist_pairs/reward_backprop --picture pairs.png

Of each model all captions that were drawn are generated twice, and the held-out ones eight times, for each seed; the
noise is the same for all models. FD, recall and diversity are those of the seen captions, against pictures of held-out
digits: in the judge's features of both halves ("digits"), and in pixels. The model "real" is those pictures themselves.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from mnist_pairs import AttributeRight, captions
from torch import Tensor

from marval_rl import generate, load_model
from marval_rl.data import load_labelled_images
from marval_rl.evaluation import ImageEvaluator
from marval_rl.evaluation.features import Pixels
from marval_rl.evaluation.references import Reference, images_of_data
from marval_rl.models import codec_for
from marval_rl.models.generation import image_grid
from marval_rl.models.noise import IndexedNoise

DATA = Path("runs/mnist_pairs/data")
SEEN, HELD_OUT = (list(captions(held_out)) for held_out in (False, True))
REPEATS = {"seen": 2, "held out": 8}
MEASURED = {  # of the seen captions; key in the evaluation -> name here
    **{f"{key}/digits": f"{name}, digits" for key, name in (("frechet_distance", "FD"), ("recall", "recall"))},
    **{f"{key}/pixels": f"{name}, pixels" for key, name in (("frechet_distance", "FD"), ("recall", "recall"))},
    "diversity": "diversity",
}
REAL, COLUMNS = "real", 4
SHOWN = (  # the last two are held out
    *("a bold three left of a seven", "a five left of a slanted zero", "a thin two left of a four", "two eights"),
    *("a bold two left of a seven", "a four left of a slanted three"),
)
BATCH = 210
Figures = dict[str, float]


class Sampling(NamedTuple):
    """How a model generates."""

    steps: int
    guidance_scale: float


@torch.no_grad()
def pictures(folder: str, texts: Sequence[str], sampling: Sampling, seed: int) -> Tensor:
    """Images [N, 3, 28, 56] of captions, by a student or a guided teacher."""
    model = load_model(folder).eval()
    model.condition_on(list(dict.fromkeys(texts)))
    codec, place = codec_for(model.config), {text: number for number, text in enumerate(dict.fromkeys(texts))}
    settings: dict = {"num_unmasking_steps": sampling.steps}
    if not model.config.is_one_step:
        settings |= {"guidance_scale": sampling.guidance_scale, "num_diffusion_steps": 25}
    parts = []
    for start in range(0, len(texts), BATCH):
        labels = torch.tensor([place[text] for text in texts[start : start + BATCH]])
        noise = IndexedNoise(seed, torch.arange(start, start + len(labels)))
        parts.append(codec.decode(generate(model, labels, generator=noise, **settings).latents))
    return torch.cat(parts).expand(-1, 3, -1, -1)


def shares(judge: AttributeRight, images: Tensor, texts: Sequence[str]) -> dict[str, float]:
    """How many pictures have everything right, both digits, these in order, and the attribute where one is asked."""
    with torch.no_grad():
        checked = judge.checked(images, list(texts))
    found = {"all": (checked["order"] & checked["attribute"]).float().mean()}
    found |= {name: checked[name].float().mean() for name in ("digits", "order")}
    found["attribute"] = checked["attribute"][checked["asked"]].float().mean()
    return {name: float(value) for name, value in found.items()}


def measure(folder: str, judge: AttributeRight, evaluator: ImageEvaluator, sampling: Sampling, seed: int) -> Figures:
    """All figures of a model, or of real pictures for the folder "real"."""
    if folder == REAL:
        labels, images = evaluator.reference.images.class_labels, evaluator.reference.images.read(range(2 * len(SEEN)))
        seen = {"seen": shares(judge, images.float() / 255, [SEEN[label] for label in labels.tolist()])}
        return {f"{name}, seen": value for name, value in seen["seen"].items()}
    labels = torch.arange(len(SEEN)).repeat(REPEATS["seen"])
    images = pictures(folder, SEEN * REPEATS["seen"], sampling, seed)
    figures = evaluator.evaluate(images, labels)
    held_out = HELD_OUT * REPEATS["held out"]
    found = {"seen": shares(judge, images, SEEN * REPEATS["seen"])}
    found["held out"] = shares(judge, pictures(folder, held_out, sampling, seed), held_out)
    right = {f"{name}, {which}": value for which, values in found.items() for name, value in values.items()}
    return {**right, **{name: figures[key] for key, name in MEASURED.items()}}


def compare(models: Sequence[str], sampling: Sampling, seeds: Sequence[int], picture: Path | None = None) -> dict:
    """Prints and returns model -> figure -> its mean and, of several seeds, its deviation."""
    judge = AttributeRight()
    source = load_labelled_images(DATA / "test.parquet", caption_column="text")
    reference = Reference(images=images_of_data(source, (28, 56), 1, len(source)))
    evaluator = ImageEvaluator({"digits": judge, "pixels": Pixels()}, reference)
    table: dict[str, dict[str, list[float]]] = {}
    for model in models:
        draws = [measure(model, judge, evaluator, sampling, seed) for seed in seeds]
        table[model] = {name: [draw[name] for draw in draws] for name in draws[0]}
        print(model)
        for name, values in table[model].items():
            spread = f" +- {statistics.stdev(values):.3f}" if len(values) > 1 else ""
            print(f"    {name:24s}{statistics.mean(values):8.3f}{spread}", flush=True)
    if picture is not None:
        shown = [model for model in models if model != REAL]
        columns = [pictures(model, SHOWN * COLUMNS, sampling, seeds[0]).unflatten(0, (COLUMNS, -1)) for model in shown]
        rows = torch.cat(columns).transpose(0, 1).flatten(0, 1)  # a row per caption, each model's images side by side
        wide = COLUMNS * len(shown)
        image_grid(rows, torch.arange(len(SHOWN)).repeat_interleave(wide), wide).save(picture)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", help='folders of models or runs, or "real"')
    parser.add_argument("--steps", type=int, default=4, help="unmasking steps (4)")
    parser.add_argument(
        "--guidance_scale", type=float, default=3.0, help="of a teacher, which takes 25 diffusion steps"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[100, 101])
    parser.add_argument("--picture", type=Path, help="write a PNG of some captions, with the first seed")
    args = parser.parse_args()
    compare(args.models, Sampling(args.steps, args.guidance_scale), args.seeds, args.picture)


if __name__ == "__main__":
    main()
