"""`marval-rl sample`: generate images with a model."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from marval_rl.cli.arguments import add_sampling_arguments, load_for_sampling, sampling_settings
from marval_rl.errors import check_output
from marval_rl.models.generation import generate_images, save_image_grid


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_sampling_arguments(parser)
    parser.add_argument("--classes", metavar="A,B", help="class labels or names, comma-separated (default: all)")
    parser.add_argument("--per_class", type=int, default=8, metavar="N", help="images of each class (default: 8)")
    parser.add_argument("--output", type=Path, default=Path("samples.png"), metavar="FILE", help="PNG grid to write")


def run(args: argparse.Namespace, extra: list[str]) -> None:
    """Writes a grid, one row per class. Raises ValueError for a class the model does not know."""
    if args.per_class < 1:
        raise ValueError(f"--per_class must be at least 1, not {args.per_class}")
    check_output(args.output)
    model, codec, device = load_for_sampling(args)
    labels = parse_classes(args.classes, model.config.class_names, model.config.num_classes)
    images, class_labels = generate_images(
        model,
        codec,
        len(labels) * args.per_class,
        sampling_settings(args),
        seed=args.seed,
        batch_size=args.batch_size,
        device=device,
        class_labels=torch.tensor(labels).repeat_interleave(args.per_class),
        progress=args.progress,
    )
    save_image_grid(images, class_labels, args.output, args.per_class, min_height=64)
    print(f"{len(images)} images: {args.output}")


def parse_classes(text: str | None, names: list[str] | None, num_classes: int) -> list[int]:
    """Labels from "0,3,seven"; None gives all classes."""
    if text is None:
        return list(range(num_classes))
    labels = []
    for word in (word.strip() for word in text.split(",")):
        if names is not None and word in names:
            labels.append(names.index(word))
        elif word.isdigit() and int(word) < num_classes:
            labels.append(int(word))
        else:
            known = f"0..{num_classes - 1}" + (f" or {', '.join(names[:12])}" if names else "")
            raise ValueError(f"--classes: the model has no class {word!r}; it knows {known}")
    return labels
