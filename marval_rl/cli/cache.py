"""`marval-rl cache`: encode the images of a recipe by its VAE, once, so that training need not."""

# No `from __future__ import annotations`: the recipe parser reads the field types.

import argparse
import math
import shutil
import sys
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch

from marval_rl.cli.arguments import add_recipe_argument, quiet_libraries
from marval_rl.cli.launch import Launch
from marval_rl.cli.processes import run_processes
from marval_rl.data.class_names import describe_classes
from marval_rl.data.moments.changes import Changes, drop_changed_shards, find_changes
from marval_rl.data.moments.manifest import (
    MANIFEST,
    begin,
    check_settings,
    missing_shards,
    number_of_shards,
    verify,
    write_manifest,
)
from marval_rl.data.moments.shards import DTYPES
from marval_rl.data.moments.writer import CacheJob, CacheProgress, build_cache
from marval_rl.errors import DataError, MarvalError, RecipeError
from marval_rl.launched import Place, find_place, is_started_here
from marval_rl.models.checkpoints import load_config
from marval_rl.models.latents import Autoencoder
from marval_rl.models.maskgen.codec import TATiTokCodec, load_tokenizer
from marval_rl.models.maskgen.config import MaskGenConfig
from marval_rl.models.maskgen.tatitok import TATiTokConfig
from marval_rl.models.vae import VAECodec
from marval_rl.paths import looks_like_hub_id
from marval_rl.recipes.data_arguments import DataArguments
from marval_rl.recipes.network_arguments import TeacherArguments
from marval_rl.recipes.planning.dry_run import offline
from marval_rl.recipes.reading import build_configs, read_settings
from marval_rl.runtime.settings import setting
from marval_rl.text import dump_yaml
from marval_rl.trainers.distill import DistillConfig

SECONDS_BETWEEN_LINES = 10  # of progress
SHOWN_SKIPPED = 20


@dataclass
class CacheArguments:
    """How the cache is made."""

    cache_dtype: str = setting("float32", "Type of the moments.", DTYPES)
    shard_size: int = setting(1024, "Images per file.")
    cache_batch_size: int = setting(32, "Images the VAE encodes at once.")
    num_processes: int = setting(1, "Processes on this machine; leave it out under torchrun.")

    def __post_init__(self):
        for name in ("shard_size", "cache_batch_size", "num_processes"):
            if vars(self)[name] < 1:
                raise ValueError(f"{name} must be at least 1, not {vars(self)[name]}")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = f"{parser.prog} RECIPE [--dry_run] [--verify] [--num_processes N] [--key value ...]"
    add_recipe_argument(parser)
    parser.add_argument("--dry_run", action="store_true", help="print what would be encoded, and encode nothing")
    parser.add_argument("--verify", action="store_true", help="hash all shards again; the next run rebuilds bad ones")


def run(args: argparse.Namespace, extra: list[str]) -> None:
    """Encode what is not encoded yet."""
    quiet_libraries()
    given = read_settings(args.recipe, extra, (DataArguments, TeacherArguments, DistillConfig, CacheArguments))
    # The training arguments are checked but not built: they would look for the other processes.
    kinds = (DataArguments, TeacherArguments, CacheArguments)
    names = {f.name for kind in kinds for f in fields(kind)}
    data, source, cache = build_configs({key: value for key, value in given.items() if key in names}, kinds)
    if data.cache_dir is None:
        raise RecipeError("cache_dir is not set: name the folder of the cache (--cache_dir ...)")
    if args.verify:
        verify_cache(Path(data.cache_dir))
        return
    if args.dry_run:
        print_plan(data, source, cache)
        return
    place = find_place()
    if place is not None and cache.num_processes not in (1, place.world_size):
        raise RecipeError(
            f"num_processes is {cache.num_processes}, but the environment says WORLD_SIZE={place.world_size}: leave "
            "--num_processes out under torchrun, or unset WORLD_SIZE"
        )
    job = prepare(data, source, cache)
    if place is None or (place.rank == 0 and not is_started_here()):
        print(describe_classes(len(job.source), job.source.class_names), flush=True)
    if place is None and cache.num_processes > 1:
        encode_in_processes(job, ["cache", args.recipe, *extra], cache.num_processes)
        return
    place = place or Place()
    manifest = build_cache(
        job,
        batch_size=cache.cache_batch_size,
        num_workers=given.get("dataloader_num_workers", 0),
        device=choose_device(place, use_cpu=given.get("use_cpu", False)),
        rank=place.rank,
        world_size=place.world_size,
        progress=Reporter(place),
        report_changes=report_changes,
    )
    if is_started_here():
        return  # the process that started this one says how all of them ended
    if manifest is None:
        print("this process is done; the last one writes the manifest (if it died, run the same command again)")
    else:
        print_summary(job.folder, manifest)


def prepare(data: DataArguments, source: TeacherArguments, cache: CacheArguments) -> CacheJob:
    """What the recipe says, with the VAE and the image size of the teacher where it does not say them."""
    vae, image_size = data.vae, data.crop_size
    if source.teacher is not None and (vae is None or image_size is None):
        teacher = load_config(source.teacher)
        vae, image_size = vae or teacher.vae, image_size or teacher.image_size
    if vae is None:
        raise RecipeError("vae is not set, and no teacher names one: give a VAE folder or hub id (--vae ...)")
    if isinstance(image_size, list):
        raise RecipeError(f"image_size {image_size} is not square, but the images of a cache are: give one number")
    if image_size is None:
        raise RecipeError("image_size is not set: say how many pixels to crop images to (--image_size 256)")
    assert data.cache_dir is not None
    storage = (Path(data.cache_dir), vae, cache.cache_dtype, cache.shard_size, data.flips)
    return CacheJob(data.load_images(), load_codec(vae), image_size, *storage)


def load_codec(name: str) -> Autoencoder:
    """A VAE, or TA-TiTok where the configuration says that it is one."""
    kind = None
    if looks_like_hub_id(name) or Path(name).exists():
        with suppress(OSError):
            kind = TATiTokConfig.get_config_dict(name)[0].get("model_type")
    if kind == TATiTokConfig.model_type:
        return TATiTokCodec(load_tokenizer(name), MaskGenConfig().latent_scale)
    return VAECodec.from_pretrained(name)


def encode_in_processes(job: CacheJob, arguments: list[str], num_processes: int) -> None:
    """Encode in several processes, after errors that would occur in each of them were looked for once."""
    settings = job.settings()
    begin(job.folder, settings)
    report_changes(drop_changed_shards(job.folder, settings, job.source))
    if missing_shards(job.folder, settings):
        if not torch.cuda.is_available():
            print(f"{num_processes} processes on the CPU (there is no GPU here)", flush=True)
        try:
            run_processes(Launch(num_processes), arguments, grace=math.inf)
        except MarvalError as error:
            raise DataError(f"{error}; finished shards are kept: run the same command again to resume") from error
    manifest = write_manifest(job.folder, settings, job.source.modes)
    if manifest is None:
        raise DataError(f"{job.folder} is unfinished although all processes ended well: run the same command again")
    print_summary(job.folder, manifest)


def report_changes(changes: Changes) -> None:
    if changes.names:
        print(f"{changes}: {len(changes.shards)} shards are encoded again", flush=True)


def choose_device(place: Place, use_cpu: bool) -> torch.device:
    """The GPU of this process, if there is one."""
    if use_cpu or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", place.local_rank % torch.cuda.device_count())


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


def print_plan(data: DataArguments, source: TeacherArguments, cache: CacheArguments) -> None:
    """`--dry_run`: settings, images, shards, disk space, and what is missing."""
    print(dump_yaml({**asdict(data), **asdict(source), **asdict(cache)}).rstrip() + "\n")
    try:
        with offline():
            job = prepare(data, source, cache)
        settings = job.settings()
        check_settings(job.folder, settings)
    except MarvalError as error:
        print(f"missing: {error}")
        return
    total = number_of_shards(settings)
    done = total - len(missing_shards(job.folder, settings))
    changes = find_changes(job.folder, settings, job.source, range(total))
    done -= len(changes.shards)
    numbers = (1 + data.flips) * torch.Size(settings["moments_shape"]).numel()
    needed = len(job.source) * numbers * DTYPES[cache.cache_dtype].itemsize
    there = next(folder for folder in (job.folder, *job.folder.resolve().parents) if folder.is_dir())
    print(describe_classes(len(job.source), job.source.class_names))
    print(f"shards: {total} of {cache.shard_size} images, {done} of them done")
    print(f"disk: {needed / 2**30:.2f} GiB in all, {shutil.disk_usage(there).free / 2**30:.2f} GiB free")
    report_changes(changes)
    print("nothing was encoded (--dry_run)")


def verify_cache(folder: Path) -> None:
    """`--verify`. Raises DataError that lists the bad shards."""
    bad = verify(folder)
    if bad:
        raise DataError(f"{len(bad)} bad shards in {folder}: {'; '.join(bad)}. `marval-rl cache` rebuilds them")
    print(f"{folder}: all shards are as they were written")
