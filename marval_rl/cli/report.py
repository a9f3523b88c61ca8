"""Write one self-contained HTML page about one or several runs, overlaid; or its figures and tables for papers."""

from __future__ import annotations

import argparse
from pathlib import Path

from marval_rl.errors import check_output

FORMATS = ("html", "png", "pdf", "csv", "md")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folder (the output_dir of a recipe)")
    parser.add_argument(
        "--format", choices=FORMATS, default="html", help="png and pdf: a file per chart, in a folder (default: html)"
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="PATH",
        help="what to write; by default report.html, .csv, .md or the folder figures/, in the run or here for several",
    )
    parser.add_argument("--watch", action="store_true", help="serve the page on this machine, and refresh it")
    parser.add_argument("--port", type=int, default=8321, help="of --watch; 0 takes a free one (default: 8321)")


def run(args: argparse.Namespace, extra: list[str]) -> None:
    """Writes the report and prints where it is. Raises ValueError for a folder that is not a run."""
    from marval_rl.reporting import export, write_report

    if args.watch:
        return watch(args)
    folder = args.runs[0] if len(args.runs) == 1 else Path()
    if args.format in export.DRAW:
        files = export.write_figures(args.runs, args.output or folder / "figures", args.format)
        print(f"figures: {len(files)} in {args.output or folder / 'figures'}")
        return
    if args.output is not None:
        check_output(args.output)
    write = {"html": write_report, "csv": export.write_csv, "md": export.write_markdown}[args.format]
    print(f"report: {write(args.runs, args.output or folder / f'report.{args.format}')}")


def watch(args: argparse.Namespace) -> None:
    from marval_rl.reporting.watch import HOST, make_server

    if args.format != "html" or args.output is not None:
        raise ValueError("--watch writes no file: leave out --format and --output, or leave out --watch")
    with make_server(args.runs, args.port) as server:
        print(f"http://{HOST}:{server.server_port}/ shows the report; Ctrl-C ends", flush=True)
        server.serve_forever()
