"""`marval-rl rewards score`: a folder of images and a file of prompts, scored by one reward."""

from __future__ import annotations

import argparse
import csv
import json
import math
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from marval_rl.cli.reward_arguments import PROMPTS_HELP, add_reward_arguments, parse_kwargs
from marval_rl.errors import RewardError, check_output

if TYPE_CHECKING:
    from torch import Tensor

    from marval_rl.evaluation.scored_images import Prompt
    from marval_rl.rewarding import RewardSet

BATCH_SIZE = 64  # images a call
SHOWN_ROWS = 40  # of the table; the file has all


def add_score_arguments(parser: argparse.ArgumentParser) -> None:
    add_reward_arguments(parser)
    parser.add_argument("--images", type=Path, required=True, metavar="DIR", help="folder of images, taken by name")
    parser.add_argument(
        "--prompts", type=Path, required=True, metavar="FILE", help=f"one line an image: {PROMPTS_HELP}"
    )
    parser.add_argument("--output", type=Path, metavar="FILE", help="also write the scores: a .csv or .json file")


def score(args: argparse.Namespace) -> None:
    """Scores every image and prints the table. Raises ValueError for bad input, RewardError for a bad reward."""
    if args.output is not None and args.output.suffix not in (".csv", ".json"):
        raise ValueError(f"--output {args.output}: the name must end in .csv or .json")
    if args.output is not None:
        check_output(args.output)
    kwargs = parse_kwargs(args.reward_kwargs)

    from marval_rl.evaluation.scored_images import list_images, read_prompts
    from marval_rl.rewarding import RewardSet
    from marval_rl.rewarding.loading import reward_name

    files, prompts = list_images(args.images), read_prompts(args.prompts)
    if len(files) != len(prompts):
        raise ValueError(f"{args.images} holds {len(files)} images, but {args.prompts} has {len(prompts)} lines")
    rewards = RewardSet([args.spec], reward_kwargs={reward_name(args.spec): kwargs})
    rows = []
    for start, images in _batches(files):
        part = slice(start, start + len(images))
        scores = _call(rewards, files[part], images, prompts[part])
        for file, prompt, score in zip(files[part], prompts[part], scores, strict=True):
            rows.append({"image": file.name, "prompt": prompt.prompt, "score": None if math.isnan(score) else score})
    _print_table(rows, rewards.names[0])
    if args.output is not None:
        _write(args.output, rows)
        print(f"scores: {args.output}")


def _batches(files: list[Path]) -> Iterator[tuple[int, Tensor]]:
    """Yields (index of the first file, images [B, 3, H, W]); a batch ends where the size of the images changes."""
    import torch
    from tqdm import tqdm

    from marval_rl.evaluation.scored_images import read_image

    device = "cuda" if torch.cuda.is_available() else "cpu"
    start, batch = 0, []
    for index, file in enumerate(tqdm(files, desc="scoring", unit="image", disable=None)):
        image = read_image(file)
        if batch and (len(batch) == BATCH_SIZE or image.shape != batch[0].shape):
            yield start, torch.stack(batch).to(device)
            start, batch = index, []
        batch.append(image)
    yield start, torch.stack(batch).to(device)


def _call(rewards: RewardSet, files: list[Path], images: Tensor, prompts: list[Prompt]) -> list[float]:
    """Scores one batch -> B scores, NaN where the reward leaves the image out."""
    import torch

    try:
        scores = rewards.score(
            images=images,
            prompts=[prompt.prompt for prompt in prompts],
            class_labels=torch.tensor([prompt.class_label for prompt in prompts], device=images.device),
            class_names=[prompt.class_name for prompt in prompts],
            columns={key: [prompt.columns[key] for prompt in prompts] for key in prompts[0].columns},
        )
    except RewardError as error:  # its sample numbers count within the batch
        raise RewardError(f"{error} (images {files[0].name} to {files[-1].name})") from error
    return scores.total.tolist()


def _print_table(rows: list[dict], name: str) -> None:
    width = max(len(row["image"]) for row in rows[:SHOWN_ROWS])
    for row in rows[:SHOWN_ROWS]:
        score = "left out" if row["score"] is None else f"{row['score']:.4f}"
        print(f"{row['image']:<{width}}  {score:>10}  {row['prompt']}")
    if len(rows) > SHOWN_ROWS:
        print(f"... and {len(rows) - SHOWN_ROWS} more")
    scores = [row["score"] for row in rows if row["score"] is not None]
    if scores:
        spread = f"mean {statistics.fmean(scores):.4f}, standard deviation {statistics.pstdev(scores):.4f}, "
        print(f"{name}: {spread}{len(scores)} scored, {len(rows) - len(scores)} left out")
    else:
        print(f"{name}: all {len(rows)} images were left out")


def _write(output: Path, rows: list[dict]) -> None:
    if output.suffix == ".json":
        output.write_text(json.dumps(rows, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        return
    with output.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, fieldnames=["image", "prompt", "score"])
        writer.writeheader()
        writer.writerows(rows)
