"""The model card that a finished run leaves in `final/`: figures, images, data, recipe, and how to load the model."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Sequence
from enum import Enum
from pathlib import Path
from typing import Any, TypeGuard

from huggingface_hub import ModelCardData
from transformers import TrainingArguments

from marval_rl import __version__
from marval_rl.environment import environment
from marval_rl.models import MaskedConfig
from marval_rl.paths import looks_like_hub_id
from marval_rl.runtime.settings import default_of
from marval_rl.text import dump_yaml

KINDS = {  # method -> tags, and what was done
    "mar": ([], "A masked autoregressive diffusion model, trained by a trainer of its author's own"),
    "pretrain": (["pretraining"], "A masked autoregressive diffusion model ({family}), pretrained"),
    "distill": (["distillation", "one-step"], "A one-step student, distilled from a {family} teacher by GSIM"),
    "grpo": (["grpo", "reinforcement-learning", "one-step"], "A one-step {family} student, trained by GRPO"),
    "reward_backprop": (
        ["reward-backpropagation", "reinforcement-learning", "one-step"],
        "A one-step {family} student, trained by back-propagation of rewards",
    ),
}
MAR = "MAR ([arXiv 2406.11838](https://arxiv.org/abs/2406.11838))"
MASKGEN = "MaskGen ([arXiv 2501.07730](https://arxiv.org/abs/2501.07730))"
MARVAL = "MARVAL ([arXiv 2511.15190](https://arxiv.org/abs/2511.15190))"
_DERIVED = ("hub_token", "run_name", "logging_dir")  # secrets, and what transformers fills in
SOURCES = ("model", "teacher")  # settings that name the model that a run began with
CARD = """---
{metadata}
---

# {name}

{what} with marval_rl {version}: images of {size} pixels, {classes}. The methods:
{papers}.

## Use

{use}

## Data

{data}

## Figures

{figures}

{samples}
## Recipe

```yaml
{recipe}
```

## Versions

{versions}
"""

USE = """```python
import torch
from marval_rl import MARModel, generate
from marval_rl.models import codec_for

model = MARModel.from_pretrained("{path}").eval()
latents = generate(model, torch.tensor([0, {last}]), num_unmasking_steps={steps}).latents
images = codec_for(model.config).decode(latents)  # [2, {channels}, {shape}] in 0..1
```

or `marval-rl sample {path} --steps {steps}`.{vae}"""
USE_OF_TEXT = """```python
import torch
from marval_rl import generate, load_model
from marval_rl.models import codec_for

model = load_model("{path}")
model.condition_on(["{prompt}"])  # by the text tower {tower}
labels = torch.tensor([0, 0])  # indices of prompts
latents = generate(model, labels, num_unmasking_steps={steps}).latents
images = codec_for(model.config).decode(latents, model.decoder_text(labels))  # [2, {channels}, {shape}]
```

or `marval-rl sample {path} --steps {steps} --prompt "{prompt}"`.{vae}"""


def write_model_card(
    output_dir: Path,
    method: str,
    settings: dict[str, Any],
    config: MaskedConfig,
    history: list[dict[str, Any]],
    num_rows: int,
    title: str | None = None,
    extra_tags: Sequence[str] = (),
) -> None:
    """Writes README.md to the folder `final` of a run, with its first and last sample grid beside it.

    Args:
        output_dir: The run folder.
        method: One of KINDS.
        settings: The resolved recipe, or the arguments of a trainer that was made in Python.
        config: Of the model.
        history: What was logged: `TrainerState.log_history`.
        num_rows: The length of the training data.
        title: The heading; None takes the run folder's name.
        extra_tags: Tags of the hub beside those of the method.
    """
    folder, (tags, what) = output_dir / "final", KINDS[method]
    family = "MaskGen" if config.takes_prompts else "MAR"
    base = next((name for key in SOURCES if (name := settings.get(key))), None)
    dataset = settings.get("dataset")
    metadata = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-to-image" if config.takes_prompts else "unconditional-image-generation",
        tags=["marval_rl", family.lower(), *tags, *extra_tags],
        base_model=base if _is_hub_id(base) else None,
        datasets=[dataset] if _is_hub_id(dataset) else None,
    )
    kind_of, several = ("prompt", "prompts") if config.takes_prompts else ("class", "classes")
    classes = f"{config.num_classes} {several}"
    if config.class_names is not None:
        classes += f" ({', '.join(config.class_names[:12])}{', ...' if config.num_classes > 12 else ''})"
    grids = sorted((output_dir / "samples").glob("step_*.png"))
    shown = {"before": grids[0], "after": grids[-1]} if len(grids) > 1 else {"after": grids[0]} if grids else {}
    for when, grid in shown.items():
        shutil.copyfile(grid, folder / f"samples_{when}.png")
    pictures = "\n\n".join(f"![samples, {when}](samples_{when}.png)" for when in shown)
    (folder / "README.md").write_text(
        CARD.format(
            metadata=metadata.to_yaml(),
            name=title or output_dir.resolve().name,
            what=what.format(family=family),
            papers=", ".join([*([MASKGEN] if config.takes_prompts else []), MAR, MARVAL]),
            version=__version__,
            size=" x ".join(map(str, config.image_shape[1:])),
            classes=classes,
            use=_use(folder, settings, config),
            data=f"Data set: `{dataset}`." if dataset else f"{num_rows:,} training rows, given in Python.",
            figures=_figures(history),
            samples=f"## Samples\n\nThe same seeds, one row per {kind_of}.\n\n{pictures}\n" if shown else "",
            recipe=dump_yaml(_without_secrets(settings)).strip(),
            versions=", ".join(f"{key} {value}" for key, value in environment().items()),
        ),
        encoding="utf-8",
    )


def changed_arguments(args: TrainingArguments) -> dict[str, Any]:
    """The arguments of a trainer that differ from their defaults, as far as YAML has words for them."""
    values = {f.name: (getattr(args, f.name), default_of(f)) for f in dataclasses.fields(args) if f.init}
    changed = {name: value for name, (value, default) in values.items() if value != default and name not in _DERIVED}
    plain = {name: value.value if isinstance(value, Enum) else value for name, value in changed.items()}
    return {name: value for name, value in plain.items() if isinstance(value, bool | int | float | str | list | dict)}


def _use(folder: Path, settings: dict[str, Any], config: MaskedConfig) -> str:
    """How to generate images, in Python and on the command line."""
    shared = {
        "path": folder,
        "steps": settings.get("eval_unmasking_steps") or settings.get("num_unmasking_steps") or 16,
        "channels": config.image_channels,
        "shape": ", ".join(map(str, config.image_shape[1:])),
        "vae": f" The latents need the VAE `{config.vae}`." if config.vae else "",
    }
    if not config.takes_prompts:
        return USE.format(last=config.num_classes - 1, **shared)
    tower = config.text_tower if config.vocabulary is None else "of words"
    return USE_OF_TEXT.format(prompt=config.class_names[0], tower=tower, **shared)


def _figures(history: list[dict[str, Any]]) -> str:
    """A table of the first and the last evaluation."""
    evaluations = [line for line in history if any(name.startswith("eval_") for name in line)]
    if not evaluations:
        return "No evaluation was made in this run."
    first, last = evaluations[0], evaluations[-1]
    rows = ["| figure | before | after |", "|---|---|---|"]
    for name, value in last.items():
        repeats = (
            value == last.get(name.split("/")[0], None) and "/" in name
        )  # kid/classifier is kid, if it is the first
        if name.startswith("eval_") and not name.startswith("eval_image/") and isinstance(value, float) and not repeats:
            before = first.get(name)
            start = f"{before:.4g}" if isinstance(before, float) and first is not last else ""
            rows.append(f"| {name.removeprefix('eval_')} | {start} | {value:.4g} |")
    return "\n".join(rows) + "\n\nOf generated images with the averaged weights, in training, at fixed seeds."


def _without_secrets(value: Any) -> Any:
    """Without the token of a remote reward: a card is made to be shared."""
    if not isinstance(value, dict):
        return value
    return {key: "..." if key == "token" else _without_secrets(item) for key, item in value.items()}


def _is_hub_id(name: Any) -> TypeGuard[str]:
    return isinstance(name, str) and looks_like_hub_id(name) and not Path(name).exists()
