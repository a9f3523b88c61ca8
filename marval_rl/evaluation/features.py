"""Feature extractors, by name: the spaces in which generated and real images are compared."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from marval_rl.errors import CheckpointError, MarvalError, first_line
from marval_rl.models.official.reading import read_checkpoint
from marval_rl.paths import expand_path
from marval_rl.rewarding import load_reward
from marval_rl.rewarding.loading import Offers, reward_name

BATCH_SIZE = 50  # images at once
POOL, LOGITS = "2048", "logits_unbiased"  # torch-fidelity's names of two layers of Inception
PUBLISHED_SHA256 = "6726825d"  # how the checksum of the published weights of Inception begins, as their file name says
PIXELS_SIZE = 16
KINDS = "inception[:FILE], clip:MODEL[:PRETRAINED], hf:NAME, timm:NAME, pixels[:SIZE]"


@runtime_checkable
class FeatureExtractor(Protocol):
    """What compares images."""

    def features(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] in 0..1 -> features [B, F], on the images' device."""


def load_extractors(
    specs: Sequence[str | FeatureExtractor], offers: Offers | None = None
) -> dict[str, FeatureExtractor]:
    """Feature extractors by the name that they have in metrics; see `load_extractor`.

    Raises:
        ValueError: For an unknown one, or two of one name.
    """
    named: dict[str, FeatureExtractor] = {}
    for spec in specs:
        name = extractor_name(spec)
        if name in named:
            raise ValueError(f"eval_features names {name} twice: {', '.join(map(str, specs))}")
        named[name] = load_extractor(spec, offers) if isinstance(spec, str) else spec
    return named


def extractor_name(spec: str | FeatureExtractor) -> str:
    """ "inception" for "inception:weights.pth", "dinov2-base" for "hf:facebook/dinov2-base"."""
    if not isinstance(spec, str):
        name = getattr(spec, "name", None)  # optional, as a reward's
        return name if isinstance(name, str) else type(spec).__name__
    kind, _, argument = spec.partition(":")
    if kind in ("hf", "timm"):
        return Path(argument).name.rpartition(":")[2]
    return kind if kind in ("inception", "clip", "pixels") else reward_name(spec)


def load_extractor(spec: str, offers: Offers | None = None) -> FeatureExtractor:
    """The feature extractor of this name.

        inception[:FILE]          torch-fidelity's Inception, the space of FID; FILE holds its published weights
        clip:MODEL[:PRETRAINED]   the image embedding of open_clip's MODEL, such as clip:ViT-B-32:openai or
                                  clip:local-dir:FOLDER
        hf:NAME                   a vision model of transformers, such as hf:facebook/dinov2-base: a folder or a hub id
        timm:NAME                 a model of timm, without its classifier
        pixels[:SIZE]             the image itself, averaged to at most SIZE x SIZE pixels (default 16)
        anything else             a reward with a method `features`: a registered name such as classifier, FILE.py:NAME
                                  or package.module:NAME; offers are those of `load_reward`

    Raises:
        ValueError: For what is none of these.
        CheckpointError: For weights that are missing or damaged.
        MarvalError: For a library that is not installed.
    """
    kind, _, argument = spec.partition(":")
    if kind == "inception":
        return Inception(expand_path(argument) if argument else None)
    if kind == "pixels":
        return Pixels(argument)
    if kind == "hf":
        return TransformersFeatures(argument)
    if kind == "timm":
        return TimmFeatures(argument)
    if kind == "clip" and argument:
        schema = next((s for s in ("local-dir:", "hf-hub:") if argument.startswith(s)), None)
        model, _, pretrained = (argument, "", "") if schema else argument.partition(":")
        return load_reward("clip", model=model, **({"pretrained": pretrained} if pretrained else {}))
    extractor = load_reward(spec, offers)
    if not isinstance(extractor, FeatureExtractor):
        raise ValueError(f"eval_features: the reward {spec!r} has no method `features`; there are {KINDS}")
    return extractor


@torch.no_grad()
def features_of(extractor: FeatureExtractor, images: Tensor) -> Tensor:
    """Features of images [N, 3, H, W] in 0..1, a batch at a time: float32 [N, F] on the CPU.

    Raises:
        ValueError: If the extractor returns another shape.
    """
    parts = [extractor.features(part).detach().float().cpu() for part in images.split(BATCH_SIZE)]
    for part, batch in zip(parts, images.split(BATCH_SIZE), strict=True):
        if part.ndim != 2 or len(part) != len(batch):
            raise ValueError(f"features of {len(batch)} images must have the shape [N, F], not {list(part.shape)}")
    return torch.cat(parts)


class Pixels:
    """The image itself, averaged to at most `size` x `size` pixels: needs no weights, and knows nothing of content."""

    def __init__(self, size: str = ""):
        if size and not (size.isdigit() and int(size) > 0):
            raise ValueError(f"eval_features pixels:{size}: give a number of pixels, such as pixels:{PIXELS_SIZE}")
        self.size = int(size) if size else PIXELS_SIZE

    def features(self, images: Tensor) -> Tensor:
        return shrink(images, self.size).flatten(1)


def shrink(images: Tensor, size: int) -> Tensor:
    """Averages images [B, C, H, W] to at most size x size pixels."""
    return images if max(images.shape[-2:]) <= size else F.interpolate(images, size=(size, size), mode="area")


class _NetworkFeatures:
    """A frozen network in eval mode that follows the images to their device."""

    def __init__(self, network: nn.Module):
        self.network = network.eval().requires_grad_(False)

    def on(self, device: torch.device) -> nn.Module:
        self.network = self.network.to(device)
        return self.network


class TransformersFeatures(_NetworkFeatures):
    """The pooled output of a vision model of transformers, or else the mean of its last layer."""

    def __init__(self, name: str):
        from transformers import AutoImageProcessor, AutoModel

        try:
            network = AutoModel.from_pretrained(name, use_safetensors=True, dtype=torch.float32)
            self.processor = AutoImageProcessor.from_pretrained(name)
        except (OSError, ValueError, RuntimeError, KeyError, ImportError) as error:
            raise CheckpointError(f"cannot load the feature extractor hf:{name}: {first_line(error)}") from error
        super().__init__(network)

    def features(self, images: Tensor) -> Tensor:
        pixels = self.processor(list(images), do_rescale=False, return_tensors="pt", device=images.device)
        output = self.on(images.device)(pixel_values=pixels["pixel_values"].to(images.device))
        pooled = output.get("pooler_output")
        return output.last_hidden_state.flatten(2).mean(-1) if pooled is None else pooled.flatten(1)


class TimmFeatures(_NetworkFeatures):
    """The pooled features of a model of timm, resized and normalized as it was trained."""

    def __init__(self, name: str):
        try:
            import timm
        except ImportError as error:
            raise MarvalError("eval_features timm:... needs timm: pip install 'marval-rl[rewards]'") from error
        try:
            network = timm.create_model(name, pretrained=True, num_classes=0)
        except (OSError, ValueError, RuntimeError, KeyError) as error:
            raise CheckpointError(f"cannot load the feature extractor timm:{name}: {first_line(error)}") from error
        super().__init__(network)
        config = timm.data.resolve_model_data_config(network)
        self.size = config["input_size"][-2:]
        self.mean, self.std = (torch.tensor(config[key]).view(1, -1, 1, 1) for key in ("mean", "std"))

    def features(self, images: Tensor) -> Tensor:
        resized = F.interpolate(images, size=self.size, mode="bicubic", antialias=True, align_corners=False)
        pixels = (resized.clamp(0, 1) - self.mean.to(images.device)) / self.std.to(images.device)
        return self.on(images.device)(pixels)


class Inception(_NetworkFeatures):
    """torch-fidelity's Inception network: the space of FID, and the classes of the Inception Score.

    Args:
        weights: torch-fidelity's file; None for where torch-fidelity itself keeps it.

    Raises:
        CheckpointError: If the file is missing, damaged, unsafe or holds other weights.
        MarvalError: If torch-fidelity is not installed.
    """

    def __init__(self, weights: str | Path | None = None):
        try:
            from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3, FeatureExtractorInceptionV3
        except ImportError as error:
            raise MarvalError("Inception's features need torch-fidelity: pip install 'marval-rl[evaluate]'") from error
        name = URL_INCEPTION_V3.rpartition("/")[2]
        weights = Path(torch.hub.get_dir()) / "checkpoints" / name if weights is None else Path(weights)
        if not weights.is_file():
            raise CheckpointError(
                f"no Inception weights at {weights}: torch-fidelity publishes them as {name} (pytorch-fid has the same "
                f"file as pt_inception-2015-12-05-6726825d.pth); get {URL_INCEPTION_V3}, and write inception:FILE"
            )
        state = read_checkpoint(weights)
        # torch-fidelity would unpickle whatever is in the file, so it is handed what was read safely.
        buffer = io.BytesIO()
        torch.save(state, buffer)
        buffer.seek(0)
        try:
            network = FeatureExtractorInceptionV3(
                "inception-v3-compat", [POOL, LOGITS], feature_extractor_weights_path=buffer
            )
        except RuntimeError as error:  # load_state_dict's
            raise CheckpointError(
                f"{weights} holds no weights of torch-fidelity's Inception: {first_line(error)}"
            ) from error
        super().__init__(network)
        with weights.open("rb") as opened:
            self.is_published = hashlib.file_digest(opened, "sha256").hexdigest().startswith(PUBLISHED_SHA256)

    def features(self, images: Tensor) -> Tensor:
        return self.features_and_logits(images)[0]

    @torch.no_grad()
    def features_and_logits(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Images [B, 3, H, W] in 0..1 -> features [B, 2048], logits [B, 1008]."""
        pool, logits = self.on(images.device)((images * 255).round().to(torch.uint8))
        return pool, logits


@torch.no_grad()
def fingerprint(function: Callable[[Tensor], Tensor], size: Sequence[int]) -> str:
    """Identifies a network by its features of four fixed images; other weights give another value.

    size: Height and width of the images.
    """
    images = torch.rand(4, 3, *size, generator=torch.Generator().manual_seed(0))
    return hashlib.sha256(function(images).float().cpu().numpy().tobytes()).hexdigest()
