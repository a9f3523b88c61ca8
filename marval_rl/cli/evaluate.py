"""`marval-rl evaluate`: quality, diversity, rewards and speed of a model, or quality of a folder of images."""

from __future__ import annotations

import argparse
import dataclasses
import json
from datetime import timedelta
from pathlib import Path
from typing import Any, get_type_hints

import torch
from accelerate import PartialState

from marval_rl.cli.arguments import add_sampling_arguments, load_for_sampling, quiet_libraries, sampling_settings
from marval_rl.cli.launch import add_launch_arguments
from marval_rl.data.class_names import check_number, label_classes, read_class_names
from marval_rl.data.moments.fingerprint import hash_weights
from marval_rl.data.prompts import load_prompts
from marval_rl.environment import environment
from marval_rl.errors import DataError, check_output
from marval_rl.evaluation.evaluator import ImageEvaluator, mean_and_std
from marval_rl.evaluation.features import Inception
from marval_rl.evaluation.image_run import ImageRun
from marval_rl.evaluation.image_set import ImagePlan
from marval_rl.evaluation.references import images_of_files, list_images
from marval_rl.evaluation.speed import generation_speed
from marval_rl.launched import check_company, launched_processes
from marval_rl.models import MARConfig, MaskedConfig
from marval_rl.models.checkpoints import load_config
from marval_rl.paths import path_or_id
from marval_rl.recipes.data_arguments import DataArguments
from marval_rl.recipes.reading import build_configs, read_settings
from marval_rl.recipes.values import read_list
from marval_rl.rewarding import RewardSet
from marval_rl.rewarding.arguments import parse_kwargs
from marval_rl.trainers.arguments import only_cpu_here

PROMPT_TEMPLATE = "a high-quality and harmonious picture of {name}"
SLOWEST_SHARE = timedelta(days=7)  # that a process waits for the others: not NCCL's ten minutes
FOLDER_BATCH = 50
FEW_FOR_FID = 2048  # as many as Inception has features
GENERATION = ("images_dir", "rewards", "reward_kwargs", "prompt_template", "class_names", "redraws")
DATA_SETTINGS = (
    *("dataset", "class_groups", "eval_dataset", "eval_holdout", "image_column", "label_column"),
    *("eval_features", "eval_reference", "eval_reference_images", "judges", "caption_column", "eval_prompts"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_sampling_arguments(parser, model_is_optional=True)
    parser.add_argument("--num_images", type=int, default=1000, help="images to generate (default: 1000)")
    parser.add_argument("--redraws", type=int, help="sets of images, seeds from --seed on; gives mean and std")
    parser.add_argument("--output", type=Path, metavar="FILE", help="default: evaluation.json beside the model")
    parser.add_argument("--images", type=Path, metavar="DIR", help="evaluate a folder of images instead of a MODEL")
    parser.add_argument(
        "--images_dir", type=Path, metavar="DIR", help="keep the images there, as PNG (default: do not)"
    )
    data = parser.add_argument_group(
        "what images are compared with, as in a recipe (default: as the recipe.yaml of the run says)"
    )
    hints = get_type_hints(DataArguments)
    data.add_argument("--recipe", type=Path, metavar="FILE", help="another recipe than the run's")
    for f in dataclasses.fields(DataArguments):
        if f.name in DATA_SETTINGS:
            count = "+" if hints[f.name] == list[str] | None else None  # the recipe parser changes f.type
            data.add_argument(f"--{f.name}", nargs=count, metavar="VALUE", help=f.metadata["help"].replace("%", "%%"))
    parser.add_argument("--rewards", nargs="+", metavar="NAME", help="rewards to score with")
    parser.add_argument("--reward_kwargs", metavar="YAML", help="reward name -> what its class is made with")
    parser.add_argument("--prompt_template", help="prompt of a class {name}, for the rewards")
    parser.add_argument(
        "--class_names",
        type=path_or_id,
        metavar="FILE",
        help='"imagenet" or a file of one name per line (default: the model\'s)',
    )
    add_launch_arguments(parser)  # taken by `marval_rl.cli.main`; here for --help


def run(args: argparse.Namespace, extra: list[str]) -> None:
    """Evaluates a model or a folder of images, writes evaluation.json, and prints it as a table.

    Raises ValueError or a MarvalError for what is missing or does not fit, before anything is generated.
    """
    quiet_libraries()
    if args.rewards is not None:
        args.rewards = read_list("--rewards", args.rewards, list[str])
    data = read_data(args)
    if args.images is not None:
        evaluate_folder(args, data)
    elif args.model is None:
        raise ValueError("give a MODEL to evaluate, before the options, or a folder of images (--images DIR)")
    else:
        evaluate_model(args, data)


def read_data(args: argparse.Namespace) -> DataArguments:
    """The settings of the data and of evaluation: those of the recipe, and those of the command line."""
    recipe = args.recipe
    if recipe is None and args.model is not None:
        folders = (Path(args.model), Path(args.model).parent)
        recipe = next((folder / "recipe.yaml" for folder in folders if (folder / "recipe.yaml").is_file()), None)
    given = [(name, vars(args)[name]) for name in DATA_SETTINGS if vars(args)[name] is not None]
    overrides = [
        word for name, value in given for word in (f"--{name}", *(value if isinstance(value, list) else [value]))
    ]
    settings = read_settings(recipe, overrides, (DataArguments,), only_known=True)
    return build_configs(settings, (DataArguments,))[0]


# ---- A folder of images ----


def evaluate_folder(args: argparse.Namespace, data: DataArguments) -> None:
    """Measures the images of a folder."""
    if launched_processes() > 1:
        raise ValueError("a folder of images is evaluated by one process: leave out --num_processes, or the launcher")
    if args.model is not None:
        raise ValueError(f"give either the model {args.model} or the images {args.images}, not both")
    if given := [name for name in GENERATION if vars(args)[name] is not None]:
        raise ValueError(f"--{given[0]} has no effect here, because a folder of images is evaluated: leave it out")
    output = args.output or Path("evaluation.json")
    check_output(output)
    images = images_of_files(list_images(args.images))
    print(f"{len(images)} images in {args.images}", flush=True)
    size = images.read([0]).shape[-2:]
    shape = MARConfig(image_size=list(size), image_channels=3, latent_stride=1, latent_channels=3, patch_size=1)
    evaluator = data.evaluator(shape)
    evaluator.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    notes = notes_on(evaluator, len(images))
    batches = [range(start, min(start + FOLDER_BATCH, len(images))) for start in range(0, len(images), FOLDER_BATCH)]
    parts = [evaluator.measure(images.read(batch).to(evaluator.device)) for batch in batches]
    figures = evaluator.figures({name: torch.cat([part[name] for part in parts]) for name in parts[0]})
    settings = {"num_images": len(images), **described(data)}
    results: dict[str, Any] = {**figures, "notes": notes, "images": str(args.images), "settings": settings}
    write_results({**results, "device": str(evaluator.device), "environment": environment()}, output)


# ---- A model ----


def join_processes(args: argparse.Namespace) -> PartialState:
    """Meets the processes that a launcher started, if one did; gives each its GPU, unless --device names one."""
    num_processes = launched_processes()
    state = PartialState(cpu=args.device == "cpu" or only_cpu_here(num_processes), timeout=SLOWEST_SHARE)
    check_company(state.num_processes)
    if num_processes > 1:
        args.device = args.device or str(state.device)
    return state


def evaluate_model(args: argparse.Namespace, data: DataArguments) -> None:
    """Generates and measures, or continues an evaluation that was interrupted."""
    state = join_processes(args)
    rank, num_processes = state.process_index, state.num_processes
    if args.redraws is not None and args.redraws < 1:
        raise ValueError(f"--redraws must be at least 1, not {args.redraws}")
    check_output(output_file(args))
    prompts, asked = evaluated_prompts(args, data)
    model, codec, device = load_for_sampling(args, prompts)
    evaluator = make_evaluator(args, data, model.config, device)
    runs = make_runs(args, data, asked or range(model.config.num_classes))
    notes = notes_on(evaluator, args.num_images)
    if rank == 0:
        if device.type == "cpu" and num_processes > 1:
            print(f"{num_processes} processes on the CPU")
        identity = {"model": args.model, "vae": model.config.vae, "weights_sha256": hash_weights(model)}
        for image_run in runs:
            image_run.claim(identity)
    state.wait_for_everyone()
    for image_run in runs:
        image_run.do_share(model, codec, evaluator, rank, num_processes, args.progress and rank == 0)
    state.wait_for_everyone()
    state.destroy_process_group()
    if rank != 0:
        return

    rows = [image_run.collect() for image_run in runs]
    figures, deviations = mean_and_std([evaluator.figures(drawn) for drawn in rows])
    speed = generation_speed(model.eval(), codec, runs[0].sampling, min(args.batch_size, args.num_images))
    settings = {
        **vars(runs[0].sampling),
        "autocast_dtype": args.dtype,
        "compile": args.compile,
        "num_images": args.num_images,
        "redraws": len(runs),
        "batch_size": args.batch_size,
        "vae": model.config.vae,
        "prompt_template": prompt_template(args) if args.rewards else None,
        "processes": num_processes,
        **described(data),
    }
    results: dict[str, Any] = {**figures, **speed, "std": deviations, "notes": notes, "settings": settings}
    results |= {"seed": args.seed, "model": args.model, "device": str(device), "environment": environment()}
    names = class_names(args, model.config) or [f"class {label}" for label in range(model.config.num_classes)]
    drawn = {name: torch.cat([one[name] for one in rows]) for name in rows[0]}
    results["per_class"] = evaluator.per_class(drawn, names)
    if evaluator.rewards is not None:
        results["left_out"] = {
            name: sum(int(drawn[f"reward/{name}"].isnan().sum()) for drawn in rows) for name in evaluator.rewards.names
        }
    write_results(results, output_file(args))
    for image_run in runs:
        image_run.finish()


def evaluated_prompts(args: argparse.Namespace, data: DataArguments) -> tuple[list[str] | None, range | None]:
    """The prompts that a model of text is given, and which of them it is evaluated on (None for all).

    Those are eval_prompts, else the captions of the data's images, which come first in either case: their labels are
    those of the images that are compared with.
    """
    assert args.model is not None
    takes_prompts = load_config(args.model).takes_prompts
    captions = list(data.load_images().class_names) if takes_prompts and data.dataset is not None else []
    if data.eval_prompts is None:
        return captions or None, None
    asked = list(dict.fromkeys(load_prompts(data.eval_prompts)["prompt"]))
    if set(asked) & set(captions):
        return asked, None
    return captions + asked, range(len(captions), len(captions) + len(asked))


def prompt_template(args: argparse.Namespace) -> str:
    """--prompt_template, else MARVAL's for classes; a prompt stands for itself."""
    default = "{name}" if load_config(args.model).takes_prompts else PROMPT_TEMPLATE
    return args.prompt_template or default


def make_evaluator(
    args: argparse.Namespace, data: DataArguments, config: MaskedConfig, device: torch.device
) -> ImageEvaluator:
    """What measures the images that the command line asks for."""
    template, names = prompt_template(args), class_names(args, config)
    kwargs = parse_reward_kwargs(args.reward_kwargs)
    if args.rewards and "{name}" not in template:
        raise ValueError(f'prompt_template "{template}" does not contain {{name}}, the place of the class\'s name')
    if args.rewards and names is None:
        raise ValueError(
            "rewards need prompts, but the model's config.json has no class_names: add them there, one per class"
        )
    evaluator = data.evaluator(config)
    evaluator.device = device
    if args.rewards and names is not None:
        rewards = RewardSet(args.rewards, None, kwargs, data.offers(lambda: config))
        evaluator.add_rewards(rewards, lambda classes: [template.replace("{name}", name) for name in classes], names)
    return evaluator


def make_runs(args: argparse.Namespace, data: DataArguments, asked: range) -> list[ImageRun]:
    """The sets of images of these classes that the command line asks for, one per redraw."""
    folder = args.images_dir or output_file(args).with_suffix(".partial")
    measured = {
        "rewards": args.rewards or [],
        "reward_kwargs": parse_reward_kwargs(args.reward_kwargs),
        "prompt_template": prompt_template(args) if args.rewards else None,
        **described(data),
    }
    plan, redraws = ImagePlan(args.num_images, len(asked), args.batch_size, asked.start), args.redraws or 1
    return [
        ImageRun(
            folder=folder if redraws == 1 else folder / f"draw_{draw}",
            keeps_images=args.images_dir is not None,
            plan=plan,
            sampling=sampling_settings(args),
            seed=args.seed + draw,
            measured=measured,
        )
        for draw in range(redraws)
    ]


def class_names(args: argparse.Namespace, config: MaskedConfig) -> list[str] | None:
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


# ---- Results ----


def described(data: DataArguments) -> dict[str, Any]:
    """The settings of the data and of evaluation that are set."""
    return {
        f.name: value for f in dataclasses.fields(data) if (value := getattr(data, f.name)) not in (None, f.default)
    }


def notes_on(evaluator: ImageEvaluator, count: int) -> list[str]:
    """Limitations of the figures, known before any image is generated."""
    notes = []
    reference = evaluator.reference
    for name, extractor in evaluator.extractors.items():
        if isinstance(extractor, Inception) and not extractor.is_published:
            notes.append(f"{name} has other weights than the published ones: its figures compare with no paper's")
    if reference.images is None and reference.gaussian is None:
        notes.append("no real images: no Frechet distance, KID, precision, recall, diversity and coverage")
    elif reference.images is None:
        notes.append("the reference holds statistics and no images: the Frechet distance alone compares with it")
    elif min(count, len(reference.images)) < FEW_FOR_FID and any(
        isinstance(extractor, Inception) for extractor in evaluator.extractors.values()
    ):
        notes.append(
            f"FID of {count} against {len(reference.images)} images: below {FEW_FOR_FID} the covariance is singular "
            "and FID is biased upwards; compare it only with figures of equally many images, or read kid"
        )
    return notes


def output_file(args: argparse.Namespace) -> Path:
    """--output, else evaluation.json in the run folder, or in the model's own; here for a model from the hub."""
    if args.output is not None:
        return args.output
    model = Path(args.model)
    folder = model.parent if model.name == "final" or model.is_file() else model
    return (folder if folder.is_dir() else Path()) / "evaluation.json"


def write_results(results: dict[str, Any], output: Path) -> None:
    """Prints the figures as a table, and writes them as JSON."""
    deviations = results.get("std", {})
    for name, value in results.items():
        if isinstance(value, float):
            spread = f" +- {deviations[name]:.4f}" if name in deviations else ""
            print(f"{name:36s} {value:10.4f}{spread}")
    for note in results["notes"]:
        print(f"note: {note}")
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(results, indent=2, allow_nan=False) + "\n")
    print(f"evaluation: {output}")
