"""`marval-rl evaluate` of a model that paints no digits: an image set, its fidelity, its rewards, and the speed."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import PartialState

from marval_rl.cli.arguments import load_for_sampling, sampling_settings
from marval_rl.cli.evaluate import default_output, write_results
from marval_rl.data.class_names import check_number, label_classes, read_class_names
from marval_rl.errors import DataError, check_output
from marval_rl.evaluation.evaluate_fidelity import (
    check_fidelity_arguments,
    count_notes,
    environment,
    fidelity_results,
    inception_batch_size,
    print_results,
)
from marval_rl.evaluation.image_run import ImageRun
from marval_rl.evaluation.image_set import ImagePlan, weights_digest
from marval_rl.evaluation.measures import MeasureSettings, features_of, reward_statistics
from marval_rl.evaluation.processes import run_processes
from marval_rl.evaluation.reference import open_reference
from marval_rl.evaluation.speed import painting_speed
from marval_rl.launched import check_company, launched_processes
from marval_rl.models import MARConfig
from marval_rl.rewarding.arguments import parse_kwargs
from marval_rl.trainers.arguments import only_cpu_here

PROMPT_TEMPLATE = "a high-quality and harmonious picture of {name}"
SLOWEST_SHARE = timedelta(days=7)  # that a process waits for the others: not NCCL's ten minutes


@dataclass(frozen=True)
class World:
    """This process among those that torchrun or `accelerate launch` started; alone without them."""

    rank: int = 0
    size: int = 1

    def wait(self) -> None:
        """Until all processes are here."""
        if self.size > 1:
            PartialState().wait_for_everyone()

    def leave(self) -> None:
        """After all work that is shared."""
        self.wait()
        if self.size > 1:
            PartialState().destroy_process_group()


def join_world(args: argparse.Namespace) -> World:
    """Meets the processes that a launcher started; gives each its GPU, unless --device names one."""
    num_processes = launched_processes()
    if num_processes == 1:
        return World()
    state = PartialState(cpu=args.device == "cpu" or only_cpu_here(num_processes), timeout=SLOWEST_SHARE)
    check_company(state.num_processes)
    args.device = args.device or str(state.device)
    return World(state.process_index, state.num_processes)


def evaluate_images(args: argparse.Namespace) -> None:
    """Paints and measures, or goes on with it; then writes evaluation.json and prints it as a table.

    Raises ValueError or a MarvalError for what is missing or does not fit, before anything is painted.
    """
    num_processes = 1 if args.num_processes is None else args.num_processes
    check_fidelity_arguments(args)
    world = join_world(args)
    if num_processes < 1 or (num_processes > 1 and world.size > 1):
        raise ValueError(
            f"--num_processes {num_processes}: give at least 1, and leave it out under torchrun or accelerate launch"
        )
    model, codec, device = load_for_sampling(args)
    image_run = make_run(args, model.config)
    reference = None
    if world.rank == 0:
        if device.type == "cpu" and max(num_processes, world.size) > 1:
            print(f"{max(num_processes, world.size)} processes on the CPU")
        reference = None if args.reference is None else open_reference(args.reference)
        count_notes(args, reference, args.num_images)  # raises if they are too few, before any is generated
        check_output(output_file(args))
        image_run.claim({"model": args.model, "vae": model.config.vae, "weights_sha256": weights_digest(model)})
    world.wait()
    if num_processes == 1:
        image_run.do_share(model, codec, world.rank, world.size, progress=args.progress and world.rank == 0)
    else:
        run_processes(paint_share, num_processes, args)
    world.leave()
    if world.rank != 0:
        return

    measured = image_run.collect()
    features = None if args.inception_weights is None else features_of(measured)
    speed = painting_speed(model.eval(), codec, image_run.sampling, min(args.batch_size, args.num_images))
    results = {
        **fidelity_results(args, features, reference, device),
        "rewards": reward_statistics(measured),
        **speed,
        "settings": {
            **vars(image_run.sampling),
            "autocast_dtype": args.dtype,
            "num_images": args.num_images,
            "batch_size": args.batch_size,
            "vae": model.config.vae,
            "prompt_template": image_run.measures.prompt_template if args.rewards else None,
            "processes": max(num_processes, world.size),
        },
        "seed": args.seed,
        "model": args.model,
        **environment(device),
    }
    print_results(results)
    write_results(results, output_file(args))
    image_run.finish()


def paint_share(rank: int, num_processes: int, args: argparse.Namespace) -> None:
    """One of several processes on one machine, on a GPU of its own where there are enough."""
    if args.device in (None, "cuda") and torch.cuda.is_available():
        args.device = f"cuda:{rank % torch.cuda.device_count()}"
    model, codec, _ = load_for_sampling(args)
    make_run(args, model.config).do_share(model, codec, rank, num_processes, progress=args.progress and rank == 0)


def make_run(args: argparse.Namespace, config: MARConfig) -> ImageRun:
    """The image set that the command line asks for."""
    measures = MeasureSettings(
        inception_weights=args.inception_weights,
        inception_batch_size=inception_batch_size(args),
        rewards=args.rewards or [],
        reward_kwargs=parse_reward_kwargs(args.reward_kwargs),
        prompt_template=PROMPT_TEMPLATE if args.prompt_template is None else args.prompt_template,
        class_names=class_names(args, config),
    )
    return ImageRun(
        folder=args.images_dir or output_file(args).with_suffix(".partial"),
        keeps_images=args.images_dir is not None,
        plan=ImagePlan(args.num_images, config.num_classes, args.batch_size),
        sampling=sampling_settings(args),
        seed=args.seed,
        measures=measures,
    )


def output_file(args: argparse.Namespace) -> Path:
    return args.output or default_output(Path(args.model))


def class_names(args: argparse.Namespace, config: MARConfig) -> list[str] | None:
    """Those of --class_names, else the model's."""
    if args.class_names is None:
        return config.class_names
    names = read_class_names(args.class_names)
    check_number(names, config.num_classes, args.model)
    if config.class_names is not None:
        labels, _ = label_classes(config.class_names, args.class_names, args.model, are_numbered=True)
        if labels != list(range(len(names))):
            raise DataError(f"--class_names has the names of {args.model} in another order: leave it out")
    return names


def parse_reward_kwargs(text: str | None) -> dict[str, dict]:
    """From YAML or JSON. Raises ValueError."""
    kwargs = parse_kwargs(text or "{}")
    if not all(isinstance(value, dict) for value in kwargs.values()):
        raise ValueError(f'--reward_kwargs must look like {{"reward": {{"argument": value}}}}, not {text}')
    return kwargs
