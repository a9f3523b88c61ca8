"""Seconds and peak memory of all four trainers in two processes, by stage; run by hand.

    python tests/distributed_memory.py [STAGE ...]

Each trainer is launched by itself, as what an earlier one has freed would hide what it takes. The models have 24
million parameters, so that what they take stands out from what Python and its libraries do. Prints a table for each
figure: seconds of the steps, and how far the resident memory of each process rose above what it was before its models
were made.
"""

from __future__ import annotations

import json
import sys
import tempfile
from functools import partial
from itertools import product
from pathlib import Path

import distributed_work
import tiny_models
from distributed_work import STAGES, TRAINERS
from forked_processes import start

WIDE = {
    "encoder_hidden_size": 384,
    "encoder_num_layers": 6,
    "encoder_num_heads": 6,
    "decoder_hidden_size": 384,
    "decoder_num_layers": 6,
    "decoder_num_heads": 6,
    "head_hidden_size": 384,
    "head_num_layers": 3,
}


def measure(stage: str, folder: Path, name: str) -> None:
    """What one of the processes does."""
    tiny_models.tiny_config = partial(tiny_models.tiny_config, **WIDE)
    tiny_models.DISTURBANCE = 0.02  # more of it explodes in a wide model, and a skipped step measures nothing
    distributed_work.run_all(stage, folder, [name], watched=False)


def main(stages: list[str]) -> None:
    reports = {}
    for stage, name in product(stages, TRAINERS):
        with tempfile.TemporaryDirectory() as folder:
            launched = start(Path(folder), 2, measure, stage, Path(folder), name)
            if launched.wait(timeout=3600) != [0, 0]:
                raise RuntimeError(launched.output())
            files = [Path(folder) / f"{name}_{rank}.json" for rank in (0, 1)]
            reports[stage, name] = [json.loads(file.read_text()) for file in files]
    for title, show in (
        ("seconds", lambda ranks: f"{max(report['seconds'] for report in ranks):.1f}"),
        ("peak memory, MiB a process", lambda ranks: " / ".join(f"{r['peak_bytes'] / 2**20:.0f}" for r in ranks)),
    ):
        print(f"\n| {title} | {' | '.join(TRAINERS)} |\n|---|{'---|' * len(TRAINERS)}")
        for stage in stages:
            print(f"| {stage} | {' | '.join(show(reports[stage, name]) for name in TRAINERS)} |")


if __name__ == "__main__":
    main(sys.argv[1:] or list(STAGES))
