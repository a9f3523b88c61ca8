"""What evaluations of a model and of a folder of images share: Inception's measures, and how results are told."""

from __future__ import annotations

import argparse
import platform
from importlib import metadata
from typing import Any

import torch

from marval_rl import __version__
from marval_rl.evaluation.fidelity import Gaussian, fidelity_measures, gaussian_of, too_few_images
from marval_rl.evaluation.inception import (
    PUBLISHED_SHA256,
    Inception,
    InceptionFeatures,
    check_weights_file,
    file_digest,
    require_torch_fidelity,
)
from marval_rl.evaluation.reference import Reference

INCEPTION_BATCH_SIZE = 50
VERSIONS = ("torch", "torch-fidelity", "diffusers", "transformers", "numpy", "pillow")


def inception_batch_size(args: argparse.Namespace) -> int:
    return INCEPTION_BATCH_SIZE if args.inception_batch_size is None else args.inception_batch_size


def check_fidelity_arguments(args: argparse.Namespace) -> None:
    """Raises ValueError or a MarvalError for what lacks, before anything is painted or read."""
    if args.inception_weights is None:
        if args.reference is not None:
            raise ValueError(
                f"--reference {args.reference} needs the weights of Inception: torch-fidelity's "
                "weights-inception-2015-12-05-6726825d.pth (--inception_weights FILE)"
            )
        return
    check_weights_file(args.inception_weights)
    require_torch_fidelity()


def count_notes(args: argparse.Namespace, reference: Reference | None, num_images: int) -> list[str]:
    """What small numbers of images do to the figures. Raises ValueError if they are too few for FID."""
    if args.inception_weights is None:
        return []
    images = None if reference is None else reference.images
    has_statistics = reference is not None and reference.gaussian is not None
    return too_few_images(num_images, None if images is None else len(images), has_statistics)


def fidelity_results(
    args: argparse.Namespace,
    features: InceptionFeatures | None,
    reference: Reference | None,
    device: torch.device,
) -> dict[str, Any]:
    """fid, inception_score, precision and recall, None where they cannot be had, and what they were measured with.

    features: of the images that are evaluated; None without Inception.
    """
    if features is None:
        return {"fid": None, "inception_score": None, "precision": None, "recall": None, "notes": []}
    notes = []
    digest = file_digest(args.inception_weights)
    if not digest.startswith(PUBLISHED_SHA256):
        notes.append("the Inception weights are not the published ones: the figures compare with no paper's")
    gaussian: Gaussian | None = None
    single = None
    if reference is None:
        notes.append("no reference: no FID, precision and recall")
    else:
        if reference.images is not None:
            inception = Inception(args.inception_weights, device, inception_batch_size(args))
            single = inception.of_many(reference.images).pool
        else:
            notes.append("the reference holds statistics and no images: no precision and recall")
        gaussian = reference.gaussian or gaussian_of(single)
    return {
        **fidelity_measures(features, gaussian, single, device),
        "notes": [*notes, *count_notes(args, reference, len(features))],
        "reference": None if args.reference is None else str(args.reference),
        "reference_images": None if single is None else len(single),
        "inception_sha256": digest,
    }


def environment(device: torch.device) -> dict[str, Any]:
    """What the figures were measured on and with."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return {
        "device": f"{device.type} ({name})",
        "threads": torch.get_num_threads(),
        "versions": {
            "marval-rl": __version__,
            "python": platform.python_version(),
            **{package: _version(package) for package in VERSIONS},
        },
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:  # torch-fidelity is an extra
        return None


def print_results(results: dict[str, Any]) -> None:
    """The figures as a table, then the notes."""
    rewards = {f"{name} (reward)": values["mean"] for name, values in results.get("rewards", {}).items()}
    score = results["inception_score"]
    figures = {
        "images": results["settings"]["num_images"],
        "FID": results["fid"],
        "Inception Score": None if score is None else score["mean"],
        "precision": results["precision"],
        "recall": results["recall"],
        **rewards,
        "seconds an image, batch 1": results.get("seconds_per_image"),
        "images a second": results.get("images_per_second"),
    }
    for name, value in figures.items():
        if value is not None:
            print(f"{name:36s} {value:10{'d' if isinstance(value, int) else '.4f'}}")
    for note in results["notes"]:
        print(f"note: {note}")
