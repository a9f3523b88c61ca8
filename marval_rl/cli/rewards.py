"""List the rewards that are installed, score images with one, check one against the contract, or serve one by HTTP."""

from __future__ import annotations

import argparse
import csv
import json
import math
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from marval_rl.errors import RewardError, check_output
from marval_rl.rewarding.arguments import PROMPTS_HELP, add_reward_arguments, parse_kwargs
from marval_rl.rewarding.serving.server import add_serve_arguments, serve

if TYPE_CHECKING:
    from torch import Tensor

    from marval_rl.evaluation.scored_images import Prompt
    from marval_rl.rewarding import RewardSet
    from marval_rl.rewarding.contract_probe import Captions

BATCH_SIZE = 64  # images per call of the reward
SHOWN_ROWS = 40  # of the table; the file has all


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", required=True, metavar="list|score|check|serve")
    actions.add_parser("list", description="List the registered rewards.", help="list the registered rewards")
    score = actions.add_parser("score", description="Score images with a reward.", help="score images with a reward")
    _add_score_arguments(score)
    check = actions.add_parser(
        "check",
        description="Try a reward on made-up images, say which rules of docs/rewards.md it keeps, and time it.",
        help="try a reward against the contract",
    )
    _add_check_arguments(check)
    add_serve_arguments(actions.add_parser("serve", description="Serve a reward by HTTP.", help="serve one by HTTP"))


def run(args: argparse.Namespace, extra: list[str]) -> None:
    {"list": list_all, "score": score, "check": check, "serve": serve}[args.action](args)


def list_all(args: argparse.Namespace) -> None:
    """Prints the table of registered rewards."""
    from marval_rl.rewarding import list_rewards

    rows = [("name", "target", "what it measures"), *list_rewards()]
    widths = [max(len(row[column]) for row in rows) for column in range(2)]
    for name, target, description in rows:
        print(f"{name:<{widths[0]}}  {target:<{widths[1]}}  {description}")


# ---- check ----


def _add_check_arguments(parser: argparse.ArgumentParser) -> None:
    add_reward_arguments(parser)
    parser.add_argument("--image_size", type=int, default=64, metavar="N", help="side of the images in pixels (64)")
    parser.add_argument(
        "--prompts",
        type=Path,
        metavar="FILE",
        help=f"what the images show, line by line: {PROMPTS_HELP}; for a reward that needs the prompts, class names or "
        "columns of your data (default: the ten digits' names)",
    )


def check(args: argparse.Namespace) -> None:
    """Prints a table of the checks. Raises RewardError if one fails, ValueError for bad input or a reward that cannot
    be loaded."""
    if args.image_size < 1:
        raise ValueError(f"--image_size must be at least 1, not {args.image_size}")
    kwargs = parse_kwargs(args.reward_kwargs)

    import torch

    from marval_rl.rewarding import RewardSet
    from marval_rl.rewarding.contract import check_contract
    from marval_rl.rewarding.contract_probe import FAILS
    from marval_rl.rewarding.loading import reward_name

    captions = _captions(args.prompts)
    rewards = RewardSet([args.spec], reward_kwargs={reward_name(args.spec): kwargs})
    device = "cuda" if torch.cuda.is_available() else "cpu"
    findings = []
    for finding in check_contract(rewards, captions, args.image_size, device):
        print(f"{finding.check:<16}  {finding.status:<7}  {finding.detail}", flush=True)
        findings.append(finding)
    failed = [finding.check for finding in findings if finding.status == FAILS]
    if failed:
        of_all = f"{len(failed)} of {len(findings)} checks"
        raise RewardError(f"reward {rewards.names[0]!r} fails {of_all}: {', '.join(failed)}")


def _captions(file: Path | None) -> Captions:
    from marval_rl.data.bundled import DIGIT_NAMES
    from marval_rl.evaluation.scored_images import read_prompts
    from marval_rl.rewarding.contract_probe import Captions

    if file is None:
        return Captions(DIGIT_NAMES, range(len(DIGIT_NAMES)), DIGIT_NAMES, {})
    rows = read_prompts(file)
    if not rows:
        raise ValueError(f"--prompts {file} is empty; give at least one line")
    return Captions(
        prompts=[row.prompt for row in rows],
        class_labels=[row.class_label for row in rows],
        class_names=[row.class_name for row in rows],
        columns={key: [row.columns[key] for row in rows] for key in rows[0].columns},
    )


# ---- score ----


def _add_score_arguments(parser: argparse.ArgumentParser) -> None:
    add_reward_arguments(parser)
    parser.add_argument("--images", type=Path, required=True, metavar="DIR", help="folder of images, taken by name")
    parser.add_argument(
        "--prompts", type=Path, required=True, metavar="FILE", help=f"one line per image: {PROMPTS_HELP}"
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
    start = 0
    batch: list[torch.Tensor] = []
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
