"""List the rewards that are installed, score images with one, try one against the contract, or serve one by HTTP."""

from __future__ import annotations

import argparse

from marval_rl.cli import rewards_check, rewards_score, rewards_serve


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", required=True, metavar="list|score|check|serve")
    actions.add_parser("list", description="List the registered rewards.", help="list the registered rewards")
    score = actions.add_parser("score", description="Score images with a reward.", help="score images with a reward")
    rewards_score.add_score_arguments(score)
    check = actions.add_parser(
        "check",
        description="Try a reward on made-up images, say which rules of docs/rewards.md it keeps, and time it.",
        help="try a reward against the contract",
    )
    rewards_check.add_check_arguments(check)
    serve = actions.add_parser("serve", description="Serve a reward by HTTP.", help="serve a reward by HTTP")
    rewards_serve.add_serve_arguments(serve)


def run(args: argparse.Namespace, extra: list[str]) -> None:
    if args.action == "list":
        _list()
    elif args.action == "score":
        rewards_score.score(args)
    elif args.action == "check":
        rewards_check.check(args)
    else:
        rewards_serve.serve(args)


def _list() -> None:
    from marval_rl.rewarding import list_rewards

    rows = [("name", "target", "what it measures"), *list_rewards()]
    widths = [max(len(row[column]) for row in rows) for column in range(2)]
    for name, target, description in rows:
        print(f"{name:<{widths[0]}}  {target:<{widths[1]}}  {description}")
