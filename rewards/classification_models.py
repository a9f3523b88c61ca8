"""Image classifiers of transformers and timm: the network, its own preprocessing, and the names of its classes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from PIL.Image import Resampling
from torch import Tensor, nn
from transformers import AutoImageProcessor, AutoModelForImageClassification

from marval_rl.errors import CheckpointError, RewardError, first_line, nearest

from .preprocessing import FILTERS, Preprocessing
from .sharing import shared_network, weights_identity
from .weights import check_exists_if_local, load_pretrained, load_strictly, loading, read_tensors

TIMM = "timm:"

FILTERS_BY_NUMBER = {Resampling.BILINEAR: "bilinear", Resampling.BICUBIC: "bicubic"}

# The processors of transformers that resize, perhaps crop, and normalise, and do nothing else.
PLAIN_PROCESSORS = (
    "BeitImageProcessor",
    "BitImageProcessor",
    "CLIPImageProcessor",
    "DeiTImageProcessor",
    "SiglipImageProcessor",
    "ViTImageProcessor",
)
CONVNEXT_WITHOUT_CROP = 384  # ConvNextImageProcessor squashes from this size on


@dataclass
class ClassificationModel:
    """A classifier of N classes.

    Args:
        network: On the CPU, shared with whoever asks for it.
        logits: (network, pixels [B, 3, S, S]) -> [B, N].
        class_names: N names, or None where the model has none.
    """

    network: nn.Module
    preprocessing: Preprocessing
    logits: Callable[[nn.Module, Tensor], Tensor]
    num_classes: int
    class_names: list[str] | None


def load_classification_model(model: str, weights: str | None, dtype: str) -> ClassificationModel:
    """A classifier by the name of its folder or hub id, or `timm:NAME` and a file of weights.

    Raises:
        ValueError: For invalid arguments or a preprocessing that is not handled.
        CheckpointError: For weights that cannot be loaded.
        RewardError: Without timm.
    """
    if model.startswith(TIMM):
        return _load_timm(model.removeprefix(TIMM), weights, dtype)
    if weights is not None:
        raise ValueError(f"{model!r} has weights of its own; leave weights ({weights!r}) out, or write timm:NAME")
    check_exists_if_local("the classifier", model)
    preprocessing = _transformers_preprocessing(model)
    network = shared_network(
        ("transformers.AutoModelForImageClassification", weights_identity(model), dtype),
        lambda: load_pretrained(AutoModelForImageClassification, model, "image classifier", trust_remote_code=False),
    )
    names = network.config.id2label
    return ClassificationModel(
        network=network,
        preprocessing=preprocessing,
        logits=lambda network, pixels: network(pixel_values=pixels).logits,
        num_classes=network.config.num_labels,
        class_names=[names[number] for number in range(network.config.num_labels)],
    )


def _transformers_preprocessing(model: str) -> Preprocessing:
    with loading(f"the image processor of {model}"):
        processor = AutoImageProcessor.from_pretrained(model, trust_remote_code=False)
    kind = type(processor).__name__.removesuffix("Pil")  # the same processor with another library for pixels
    if kind == "TimmWrapperImageProcessor":
        return _timm_preprocessing(processor.data_config, model)
    settings = processor.to_dict()
    if kind == "ConvNextImageProcessor":
        geometry = _convnext_geometry(settings)
    elif kind in PLAIN_PROCESSORS:
        geometry = _plain_geometry(settings, model)
    else:
        raise ValueError(f"the classifier {model} prepares images by {kind}, which is not handled")
    steps = {name: settings[name] for name in ("do_resize", "do_rescale", "do_normalize")}
    if not all(steps.values()) or round(1 / settings["rescale_factor"]) != 255:
        raise ValueError(f"the classifier {model} prepares images in a way that is not handled: {steps}")
    return Preprocessing(
        mean=tuple(settings["image_mean"]),
        std=tuple(settings["image_std"]),
        filter=_filter(FILTERS_BY_NUMBER.get(settings["resample"], str(settings["resample"])), model),
        crop_start=int,
        **geometry,
    )


def _plain_geometry(settings: dict[str, Any], model: str) -> dict[str, Any]:
    size = settings["size"]
    keep_ratio = size.keys() == {"shortest_edge"}
    resized = size["shortest_edge"] if keep_ratio else _square(size, model)
    cropped = _square(settings["crop_size"], model) if settings.get("do_center_crop") else resized
    if cropped > resized or (keep_ratio and not settings.get("do_center_crop")):
        raise ValueError(f"the classifier {model} takes images of another shape than a square, which is not handled")
    return {"size": cropped, "resized": resized, "keep_ratio": keep_ratio}


def _convnext_geometry(settings: dict[str, Any]) -> dict[str, Any]:
    size = settings["size"]["shortest_edge"]
    if size >= CONVNEXT_WITHOUT_CROP:
        return {"size": size, "resized": size, "keep_ratio": False}
    return {"size": size, "resized": int(size / settings["crop_pct"]), "keep_ratio": True}


def _square(size: dict[str, int], model: str) -> int:
    if size.keys() != {"height", "width"} or size["height"] != size["width"]:
        raise ValueError(f"the classifier {model} takes images of {size} pixels; only squares are handled")
    return size["height"]


def _filter(name: str, model: str) -> str:
    if name not in FILTERS:
        raise ValueError(f"the classifier {model} resizes by {name}; only {' and '.join(FILTERS)} are handled")
    return name


def _load_timm(name: str, weights: str | None, dtype: str) -> ClassificationModel:
    timm = _import_timm()
    if not timm.is_model(name):
        raise ValueError(f"timm has no model {name!r}{nearest(name.partition('.')[0], timm.list_models())}")
    if weights is None:
        raise ValueError(
            f"timm:{name} needs weights, the path of a file; timm's own, on the hub, are written timm/{name}"
        )
    if not Path(weights).is_file():
        raise CheckpointError(f"the weights {weights!r} of timm:{name} do not exist")
    network = shared_network(
        ("timm", name, weights_identity(weights), dtype), lambda: _load_timm_network(timm, name, Path(weights))
    )
    return ClassificationModel(
        network=network,
        preprocessing=_timm_preprocessing(
            timm.data.resolve_data_config(pretrained_cfg=network.pretrained_cfg), f"timm:{name}"
        ),
        logits=lambda network, pixels: network(pixels),
        num_classes=network.num_classes,
        class_names=None,
    )


def _import_timm() -> ModuleType:
    try:
        import timm
    except ImportError as error:
        raise RewardError(
            f"classifiers of timm need timm, which cannot be imported ({first_line(error)}); "
            "install it: pip install 'marval-rl[rewards]'"
        ) from error
    return timm


def _load_timm_network(timm: ModuleType, name: str, weights: Path) -> nn.Module:
    tensors = read_tensors(weights)
    with torch.random.fork_rng(devices=[]):  # weights are drawn before they are loaded
        network = timm.create_model(name)
        classifiers = network.pretrained_cfg["classifier"]  # the name of the last layer, or of several
        head = f"{classifiers if isinstance(classifiers, str) else classifiers[0]}.weight"
        if head not in tensors:
            raise CheckpointError(f"{weights} is not a classifier {name}: {head} is missing")
        if len(tensors[head]) != network.num_classes:
            network.reset_classifier(len(tensors[head]))
    load_strictly(network, tensors, weights)
    return network


def _timm_preprocessing(settings: dict[str, Any], model: str) -> Preprocessing:
    _, height, width = settings["input_size"]
    if settings["crop_mode"] not in ("center", "squash"):
        raise ValueError(f"the classifier {model} crops images in a way that is not handled: {settings['crop_mode']!r}")
    size = _square({"height": height, "width": width}, model)
    return Preprocessing(
        size=size,
        resized=int(size / settings["crop_pct"]),
        mean=tuple(settings["mean"]),
        std=tuple(settings["std"]),
        filter=_filter(settings["interpolation"], model),
        keep_ratio=settings["crop_mode"] == "center",
    )
