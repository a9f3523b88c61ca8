"""Reward: CLIP score, how well the image agrees with its prompt, by any model of open_clip."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from marval_rl.errors import CheckpointError, RewardError, first_line, nearest

from .network_reward import CosineReward
from .preprocessing import FILTERS, Preprocessing
from .sharing import shared_network, weights_identity
from .weights import check_finite, loading

SCHEMAS = ("local-dir:", "hf-hub:")  # of open_clip: a folder or repository with the configuration and the weights


class Clip(CosineReward):
    """scale x cosine between CLIP's embeddings of the image and the prompt (CLIPScore, arXiv 2104.08718).

    Args:
        model: A name of open_clip ("ViT-B-32"), "local-dir:FOLDER" (open_clip_config.json and weights), or
            "hf-hub:org/name". OpenAI's weights need the names that end in -quickgelu.
        pretrained: For a name: a tag of open_clip ("openai", "laion2b_s34b_b79k"), which is downloaded, or a file.
        prompt_template: Such as "a photo of a {name}", filled with each class_names and used in place of the prompts;
            None uses the prompts.
        scale: 100 makes the customary CLIP score, 1 the cosine itself. CLIPScore also cuts at 0, where the gradient
            would vanish; images and prompts that belong together are far above.
        dtype, micro_batch_size, compile: As in `NetworkReward`.

    Raises:
        RewardError: Without open_clip.
        ValueError: For invalid arguments.
        CheckpointError: For weights that cannot be loaded.

    Warns if the weights are known to want the other GELU than the model's name says.
    """

    def __init__(
        self,
        model: str = "ViT-B-32",
        pretrained: str | None = None,
        prompt_template: str | None = None,
        scale: float = 100.0,
        dtype: str = "float32",
        micro_batch_size: int | None = None,
        compile: bool = False,
    ) -> None:
        if prompt_template is not None and "{name}" not in prompt_template:
            raise ValueError(
                f"prompt_template {prompt_template!r} does not contain {{name}}, the place of the class's name"
            )
        self.prompt_template = prompt_template
        network, self.tokenizer, preprocessing = load_clip(model, pretrained, dtype)
        super().__init__(network, preprocessing, scale, dtype, micro_batch_size, compile)

    def __call__(self, *, images: Tensor, prompts: list[str], class_names: list[str], **columns: object) -> Tensor:
        """Score images [B, 3, H, W] in 0..1 against prompts (length B), or the template's -> float32 [B]."""
        if self.prompt_template is not None:
            prompts = [self.prompt_template.replace("{name}", name) for name in class_names]
        return super().__call__(images=images, prompts=prompts)

    def compiled_part(self) -> nn.Module:
        return self.network.visual

    def embed_images(self, pixels: Tensor) -> Tensor:
        return self.network.encode_image(pixels)

    def embed_prompt(self, prompt: str, device: torch.device) -> Tensor:
        tokens = self.tokenizer([prompt])
        length = tokens.shape[1]
        if not tokens.equal(self.tokenizer([prompt], length + 1)[:, :length]):  # with room for one more it ends later
            self.note_cut(prompt, length)
        return self.network.encode_text(tokens.to(device))


def load_clip(model: str, pretrained: str | None, dtype: str) -> tuple[nn.Module, Any, Preprocessing]:
    """open_clip's network, shared with whoever asks for it in this dtype, its tokenizer, and its preprocessing.

    Arguments and errors as `Clip`'s. The network is on the CPU.
    """
    open_clip = _import_open_clip()
    _check_source(open_clip, model, pretrained)
    schema = next(filter(model.startswith, SCHEMAS), "")
    weights = weights_identity(model.removeprefix(schema)) if pretrained is None else weights_identity(pretrained)
    source = ("open_clip", schema or model, weights, dtype)
    hint = " (a file must be safetensors or a state_dict of tensors; for OpenAI's .pt files use the tag openai)"
    with loading(f"the CLIP model {model!r} with the weights {pretrained!r}", hint):
        network = shared_network(source, lambda: _load_network(open_clip, model, pretrained))
        tokenizer = open_clip.get_tokenizer(model)
    return network, tokenizer, _preprocessing(model, network.visual.preprocess_cfg)


def _import_open_clip() -> ModuleType:
    try:
        import open_clip
    except ImportError as error:
        raise RewardError(
            f"rewards by CLIP need open_clip_torch, which cannot be imported ({first_line(error)}); "
            "install it: pip install 'marval-rl[rewards]'"
        ) from error
    return open_clip


def _check_source(open_clip: ModuleType, model: str, pretrained: str | None) -> None:
    """Refuses what open_clip would replace by random weights or misread; warns of the wrong GELU."""
    if model.startswith(SCHEMAS):
        if pretrained is not None:
            raise ValueError(f"{model!r} has weights of its own; leave pretrained ({pretrained!r}) out")
        folder = Path(model.removeprefix("local-dir:"))
        if model.startswith("local-dir:") and not (folder / "open_clip_config.json").is_file():
            raise CheckpointError(f"{model!r}: there is no {folder / 'open_clip_config.json'}; give a folder with one")
        return
    if model not in open_clip.list_models():
        hint = nearest(model, open_clip.list_models())
        raise ValueError(f"unknown CLIP model {model!r}{hint} (a folder is written local-dir:FOLDER)")
    tags = open_clip.list_pretrained_tags_by_model(model)
    if pretrained is None:
        raise ValueError(f"the CLIP model {model!r} needs pretrained: a file, or one of {', '.join(tags)}")
    if not (open_clip.is_pretrained_cfg(model, pretrained) or Path(pretrained).is_file()):
        raise CheckpointError(f"pretrained {pretrained!r} is neither a file nor a tag of {model} ({', '.join(tags)})")
    _warn_of_gelu(open_clip, model, pretrained)


def _warn_of_gelu(open_clip: ModuleType, model: str, pretrained: str) -> None:
    wanted = _wants_quick_gelu(open_clip, model, pretrained)
    if wanted is None or wanted == open_clip.get_model_config(model).get("quick_gelu", False):
        return
    fix = f"{model}-quickgelu" if wanted else model.removesuffix("-quickgelu")
    if fix != model:  # a name without the suffix is trusted if its configuration says QuickGELU
        warnings.warn(
            f"the weights {pretrained!r} were trained {'with' if wanted else 'without'} QuickGELU, unlike the model "
            f"{model!r}: scores will be off; write model: {fix}",
            stacklevel=5,
        )


def _wants_quick_gelu(open_clip: ModuleType, model: str, pretrained: str) -> bool | None:
    """Whether the weights were trained with QuickGELU; None for a file of unknown origin."""
    if open_clip.is_pretrained_cfg(model, pretrained):
        return open_clip.get_pretrained_cfg(model, pretrained).get("quick_gelu", False)
    file, architecture = Path(pretrained), model.removesuffix("-quickgelu")
    for tag in open_clip.list_pretrained_tags_by_model(architecture):
        settings = open_clip.get_pretrained_cfg(architecture, tag)
        download = settings["url"].rpartition("/")[2]
        hub_folder = "models--" + settings["hf_hub"].strip("/").replace("/", "--")
        if file.name == download or hub_folder in file.parts:
            return settings.get("quick_gelu", False)
    return True if "quickgelu" in file.name.lower() or "openai" in file.name.lower() else None


def _load_network(open_clip: ModuleType, model: str, pretrained: str | None) -> nn.Module:
    """open_clip's model with its weights, float32 on the CPU."""
    # Weights are drawn before they are loaded; and what open_clip logs of a failure is in the error it raises.
    with torch.random.fork_rng(devices=[]), _silent_log():
        network = open_clip.create_model(model, pretrained, require_pretrained=True, weights_only=True)
    check_finite(network, pretrained or model)
    return network


@contextmanager
def _silent_log() -> Iterator[None]:
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        yield
    finally:
        logging.disable(before)


def _preprocessing(model: str, settings: dict[str, Any]) -> Preprocessing:
    size = settings["size"] if isinstance(settings["size"], int) else settings["size"][0]
    if settings["size"] not in (size, (size, size), [size, size]):
        raise ValueError(
            f"the CLIP model {model!r} takes images of {settings['size']} pixels; only squares are handled"
        )
    if settings["resize_mode"] not in ("shortest", "squash") or settings["interpolation"] not in FILTERS:
        raise ValueError(
            f"the CLIP model {model!r} resizes images in a way that is not handled: {settings['resize_mode']}, "
            f"{settings['interpolation']}"
        )
    return Preprocessing(
        size=size,
        mean=tuple(settings["mean"]),
        std=tuple(settings["std"]),
        filter=settings["interpolation"],
        keep_ratio=settings["resize_mode"] == "shortest",
    )
