"""What is measured of each generated image, kept batch by batch so that an interrupted evaluation goes on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from marval_rl.evaluation.inception import Inception, InceptionFeatures, file_digest
from marval_rl.rewarding import RewardSet

POOL, LOGITS, REWARD = "pool", "logits", "reward/"


@dataclass(frozen=True)
class MeasureSettings:
    """What to measure; light enough to be handed to other processes.

    Attributes:
        inception_weights: torch-fidelity's file, or None to leave Inception out.
        inception_batch_size: Images at once.
        rewards: Specs as `load_reward` takes them; each image's prompt is the template with its class's name.
        reward_kwargs: Reward name -> keyword arguments of its class.
    """

    inception_weights: Path | None = None
    inception_batch_size: int = 50
    rewards: Sequence[str] = ()
    reward_kwargs: dict[str, dict[str, Any]] = field(default_factory=dict)
    prompt_template: str = "{name}"
    class_names: Sequence[str] | None = None

    def __post_init__(self) -> None:
        if self.inception_batch_size < 1:
            raise ValueError(f"the batch size of Inception must be at least 1, not {self.inception_batch_size}")
        if self.rewards and "{name}" not in self.prompt_template:
            raise ValueError(f'prompt_template "{self.prompt_template}" lacks {{name}}, the place of the class\'s name')
        if self.rewards and self.class_names is None:
            raise ValueError(
                "rewards need prompts, but the model's config.json has no class_names: add them there, one a class"
            )

    @property
    def is_empty(self) -> bool:
        return self.inception_weights is None and not self.rewards

    def describe(self) -> dict[str, Any]:
        """What decides the measures' values, as JSON can hold it; files by their content."""
        digest = None if self.inception_weights is None else file_digest(self.inception_weights)
        return {
            "inception_sha256": digest,
            "rewards": list(self.rewards),
            "reward_kwargs": self.reward_kwargs,
            "prompt_template": self.prompt_template if self.rewards else None,
        }


class ImageMeasures:
    """Inception and the rewards, loaded."""

    def __init__(self, settings: MeasureSettings, device: torch.device | str):
        self.settings = settings
        self.device = torch.device(device)
        self.inception, self.rewards = None, None
        if settings.inception_weights is not None:
            self.inception = Inception(settings.inception_weights, device, settings.inception_batch_size)
        if settings.rewards:
            self.rewards = RewardSet(settings.rewards, reward_kwargs=settings.reward_kwargs)

    def measure(self, pixels: Tensor, class_labels: Tensor) -> dict[str, Tensor]:
        """Of images uint8 [B, 3, H, W] of the classes int64 [B]: tensors of B rows, float32 on the CPU."""
        measured: dict[str, Tensor] = {}
        if self.inception is not None:
            features = self.inception(pixels)
            measured |= {POOL: features.pool, LOGITS: features.logits}
        if self.rewards is not None:
            names = [self.settings.class_names[label] for label in class_labels.tolist()]
            scores = self.rewards.score(
                pixels.to(self.device).float() / 255,
                [self.settings.prompt_template.format(name=name) for name in names],
                class_labels.to(self.device),
                names,
            )
            measured |= {REWARD + name: values.cpu() for name, values in scores.components.items()}
        return measured


def part_file(folder: Path, batch: int) -> Path:
    return folder / f"{batch:06d}.safetensors"


def write_part(folder: Path, batch: int, measured: dict[str, Tensor]) -> None:
    """Keeps what was measured of a batch; a file is there whole or not at all."""
    file = part_file(folder, batch)
    half = file.with_suffix(".tmp")
    save_file({name: values.contiguous() for name, values in measured.items()}, half)
    half.replace(file)


def read_part(folder: Path, batch: int) -> dict[str, Tensor] | None:
    """What `write_part` wrote; None if the file is missing or damaged."""
    try:
        return load_file(part_file(folder, batch))
    except (FileNotFoundError, SafetensorError):
        return None


def features_of(measured: dict[str, Tensor]) -> InceptionFeatures:
    """Inception's part of the measures of all images."""
    return InceptionFeatures(measured[POOL], measured[LOGITS])


def reward_statistics(measured: dict[str, Tensor]) -> dict[str, dict[str, float | int | None]]:
    """For each reward the mean and standard deviation over the images that it scored, and how many it left out."""
    results = {}
    for name, scores in measured.items():
        if name.startswith(REWARD):
            scored = scores[~scores.isnan()].double()
            results[name.removeprefix(REWARD)] = {
                "mean": float(scored.mean()) if len(scored) else None,
                "std": float(scored.std()) if len(scored) > 1 else None,
                "left_out": len(scores) - len(scored),
            }
    return results
