"""What `marval-rl cache` prints: how far each process is, each skipped image, and what the cache holds in the end."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

from marval_rl.data.moments.manifest import MANIFEST
from marval_rl.data.moments.writer import CacheProgress
from marval_rl.launched import Place

SECONDS_BETWEEN_LINES = 10
SHOWN_SKIPPED = 20


class Reporter:
    """Prints how far a process is, now and then, and each skipped image at once."""

    def __init__(self, place: Place):
        self.prefix = f"process {place.rank} of {place.world_size}: " if place.world_size > 1 else ""
        self.printed = time.monotonic()

    def __call__(self, progress: CacheProgress) -> None:
        for image in progress.skipped:
            print(f"{self.prefix}skipped {image['name']}: {image['reason']}", file=sys.stderr, flush=True)
        if time.monotonic() - self.printed < SECONDS_BETWEEN_LINES:
            return
        self.printed = time.monotonic()
        print(
            f"{self.prefix}{progress.shards_done} of {progress.shards_total} shards, "
            f"{progress.images_per_second:.1f} images/s, {progress.num_skipped} skipped",
            flush=True,
        )


def print_summary(folder: Path, manifest: dict[str, Any]) -> None:
    """What a finished cache holds, and what was skipped."""
    skipped = manifest["skipped"]
    print(
        f"done: {folder} holds {manifest['images']} images of {len(manifest['class_names'])} classes in "
        f"{len(manifest['shards'])} shards ({manifest['bytes'] / 2**30:.2f} GiB); {len(skipped)} corrupt ones skipped"
    )
    for image in skipped[:SHOWN_SKIPPED]:
        print(f"  {image['name']}: {image['reason']}")
    if len(skipped) > SHOWN_SKIPPED:
        print(f"  and {len(skipped) - SHOWN_SKIPPED} more, all in {folder / MANIFEST}")
