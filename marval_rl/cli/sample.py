"""`marval-rl sample`: generate images with a model, or with two on the same noise: a grid, a folder or an animation."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from marval_rl.cli.arguments import add_sampling_arguments, load_for_sampling, sampling_settings
from marval_rl.data.prompts import load_prompts
from marval_rl.errors import check_folder, check_output, nearest
from marval_rl.evaluation.image_set import to_pixels
from marval_rl.models.generation import MAX_GRID_ROWS, generate_images, image_grid, unmasking_frames
from marval_rl.paths import path_or_id

ANIMATED = (".gif", ".webp")
MAX_NAME = 120  # characters of a folder named after a prompt
ANIMATION_MS, LAST_FRAME_MS = 3000, 2000  # of the unmasking, and of the finished images


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_sampling_arguments(parser)
    parser.add_argument("--classes", metavar="A,B", help="class labels or names, comma-separated (default: all)")
    parser.add_argument("--prompt", action="append", metavar="TEXT", help="a model of text: a prompt; may be repeated")
    parser.add_argument(
        "--prompts", type=path_or_id, metavar="FILE", help="a model of text: prompts, as the setting of a recipe"
    )
    parser.add_argument(
        "--per_class", type=int, default=8, metavar="N", help="images of each class or prompt (default: 8)"
    )
    parser.add_argument(
        "--compare", type=path_or_id, metavar="MODEL2", help="a second model beside it, with the same noise and orders"
    )
    parser.add_argument("--plain", action="store_true", help="no names beside the rows")
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("samples.png"),
        metavar="FILE",
        help="a picture (.png, .jpg), an animation of the unmasking (.gif, .webp), or a folder of class folders "
        "(default: samples.png)",
    )


def run(args: argparse.Namespace, extra: list[str]) -> None:
    """Raises ValueError for a class that the model does not know, and for an output that cannot be written."""
    if args.per_class < 1:
        raise ValueError(f"--per_class must be at least 1, not {args.per_class}")
    kind = args.output.suffix.lower()
    if kind == "" and args.compare is not None:
        raise ValueError(f"--compare needs a picture or an animation, and --output {args.output} is a folder")
    if kind == "":
        check_folder(args.output, "--output")
    else:
        check_output(args.output)
    if kind not in ("", *ANIMATED, *Image.registered_extensions()):
        raise ValueError(f"--output {args.output}: pictures are .png, .jpg, ..., animations {' and '.join(ANIMATED)}")
    models = [args.model] if args.compare is None else [args.model, args.compare]
    made = {}
    for name in models:
        args.model = name
        made[name if name not in made else f"{name} (again)"] = generate_frames(args, kind in ANIMATED)
    frames, labels, names = zip(*made.values(), strict=True)
    if any(other != names[0] for other in names[1:]):
        raise ValueError(f"--compare: {models[0]} and {models[1]} know different classes")
    if kind == "":
        write_folder(frames[0][-1], labels[0], names[0], args.output)
    else:
        grids = []
        for step in range(max(map(len, frames))):
            shown = [of[min(step, len(of) - 1)] / 255 for of in frames]
            pictures = [image_grid(images, labels[0], args.per_class, min_height=64) for images in shown]
            rows = [] if args.plain else [names[0][label] for label in labels[0].unique().tolist()]
            grids.append(labelled(dict(zip(made, pictures, strict=True)), rows))
        save(grids, args.output)
    print(f"{sum(len(of[-1]) for of in frames)} images: {args.output}")


def generate_frames(args: argparse.Namespace, animated: bool) -> tuple[Tensor, Tensor, list[str]]:
    """Images uint8 [steps, N, C, H, W], one step unless animated; their labels [N]; the name of each label."""
    model, codec, device = load_for_sampling(args, given_prompts(args))
    settings, config = sampling_settings(args), model.config
    if args.compare is not None and config.is_one_step:  # a teacher beside it may be guided
        settings = replace(settings, guidance_scale=1.0, num_diffusion_steps=None)
    chosen = parse_classes(args.classes, config.class_names, config.num_classes)
    labels = torch.tensor(chosen).repeat_interleave(args.per_class)
    shared = {"seed": args.seed, "batch_size": args.batch_size, "device": device, "progress": args.progress}
    if animated:
        frames = unmasking_frames(model, codec, labels, settings, **shared)
    else:
        images, _ = generate_images(model, codec, len(labels), settings, class_labels=labels, **shared)
        frames = to_pixels(images).cpu()[None]
    return frames, labels, config.class_names or [f"class {label}" for label in range(config.num_classes)]


def given_prompts(args: argparse.Namespace) -> list[str]:
    """The prompts of the command line, each once. Raises DataError for a file that cannot be read."""
    read = load_prompts(args.prompts)["prompt"] if args.prompts is not None else []
    return list(dict.fromkeys([*(args.prompt or []), *read]))


def parse_classes(text: str | None, names: list[str] | None, num_classes: int) -> list[int]:
    """Labels from "0,3,seven"; None gives all classes. Names are known in upper and lower case, and by a beginning that
    only one of them has."""
    if text is None:
        return list(range(num_classes))
    names = names or []
    folded = [name.casefold() for name in names]
    labels = []
    for word in (word.strip() for word in text.split(",")):
        begun = [label for label, name in enumerate(folded) if word and name.startswith(word.casefold())]
        if word.casefold() in folded:
            labels.append(folded.index(word.casefold()))
        elif word.isdigit() and int(word) < num_classes:
            labels.append(int(word))
        elif len(begun) == 1:
            labels.append(begun[0])
        else:
            hint = f"; did you mean {' or '.join(names[label] for label in begun[:3])}?" if begun else ""
            known = f"0..{num_classes - 1}" + (f" or {', '.join(names[:12])}" if names else "")
            raise ValueError(
                f"--classes: the model has no class {word!r}{hint or nearest(word, names)}; it knows {known}"
            )
    return labels


def labelled(grids: dict[str, Image.Image], rows: list[str]) -> Image.Image:
    """Grids side by side: the name of its class beside each row, and above each grid its title if there are several."""
    rows = rows if len(rows) <= MAX_GRID_ROWS else []
    first, gap = next(iter(grids.values())), 12
    height, size = max(grid.height for grid in grids.values()), 15
    pen = ImageDraw.Draw(first)
    left = max((round(pen.textlength(name, font_size=size)) + 2 * gap for name in rows), default=0)
    top = 2 * size if len(grids) > 1 else 0
    width = left + sum(grid.width for grid in grids.values()) + gap * (len(grids) - 1)
    picture = Image.new("RGB", (width, height + top), "white")
    pen = ImageDraw.Draw(picture)
    for index, name in enumerate(rows):
        middle = top + (index + 0.5) * height / len(rows)
        pen.text((left - gap, middle), name, fill="black", font_size=size, anchor="rm")
    x = left
    for title, grid in grids.items():
        while top and pen.textlength(title, font_size=size) > max(grid.width, 100) and "/" in title:
            title = title.split("/", 1)[1]  # the end of a path tells models apart
        if top:
            pen.text((x, top / 2), title, fill="black", font_size=size, anchor="lm")
        picture.paste(grid, (x, top))
        x += grid.width + gap
    return picture


def save(frames: list[Image.Image], file: Path) -> None:
    """One picture, or an animation of several."""
    if len(frames) == 1:
        frames[0].save(file)
        return
    times = [max(20, round(ANIMATION_MS / len(frames)))] * (len(frames) - 1) + [LAST_FRAME_MS]
    frames[0].save(file, save_all=True, append_images=frames[1:], duration=times, loop=0)


def write_folder(images: Tensor, labels: Tensor, names: list[str], folder: Path) -> None:
    """uint8 [N, 3, H, W] as PNG files in a folder per class, as a data set has them."""
    for label in labels.unique().tolist():
        target = folder / names[label].replace("/", "_")[:MAX_NAME]
        target.mkdir(parents=True, exist_ok=True)
        for index, image in enumerate(images[labels == label]):
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(target / f"{index:04d}.png")
