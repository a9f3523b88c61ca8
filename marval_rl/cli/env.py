"""Print versions and hardware as a Markdown table, to paste into a bug report."""

from __future__ import annotations

import argparse

from marval_rl.environment import environment


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """This command takes none."""


def run(args: argparse.Namespace, extra: list[str]) -> None:
    """Prints the table; a package that is missing or broken is a row of it, not an error."""
    print("| what | value |\n|---|---|")
    for name, value in environment().items():
        print(f"| {name} | {value} |")
