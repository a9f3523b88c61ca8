"""Write one self-contained HTML page about one or several runs, overlaid."""

from __future__ import annotations

import argparse
from pathlib import Path

from marval_rl.errors import check_output


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folder (the output_dir of a recipe)")
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FILE",
        help="the page to write; by default report.html in the run folder, or here for several runs",
    )


def run(args: argparse.Namespace, extra: list[str]) -> None:
    """Writes the page and prints where it lies. Raises ValueError for a folder that is no run."""
    from marval_rl.reporting import write_report

    if args.output is not None:
        check_output(args.output)
    default = (args.runs[0] if len(args.runs) == 1 else Path()) / "report.html"
    print(f"report: {write_report(args.runs, args.output or default)}")
