"""`marval-rl rewards check`: is this plug-in a reward as docs/rewards.md has it, and how fast is it?"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from marval_rl.cli.reward_arguments import PROMPTS_HELP, add_reward_arguments, parse_kwargs
from marval_rl.errors import RewardError

if TYPE_CHECKING:
    from marval_rl.rewarding.contract_probe import Captions


def add_check_arguments(parser: argparse.ArgumentParser) -> None:
    add_reward_arguments(parser)
    parser.add_argument("--image_size", type=int, default=64, metavar="N", help="side of the images in pixels (64)")
    parser.add_argument(
        "--prompts",
        type=Path,
        metavar="FILE",
        help=f"what the images are said to show, line by line: {PROMPTS_HELP} (default: the ten digits' names)",
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
    from marval_rl.data.digits import DIGIT_NAMES
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
