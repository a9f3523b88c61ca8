"""The metrics of short runs of each trainer, as they were when they were stored: a change of the algorithms shows.

`python tests/test_trajectories.py` stores them again, after an intended change; name it in the commit.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import tiny_model
from tiny_trainers import ANCHOR, backprop_trainer, darkness, distiller, grey_student, grpo_trainer, pretrainer
from torch import Tensor

from marval_rl.trainers.base import MARTrainer

STORED = Path(__file__).with_name("trajectories.json")
NOT_STORED = {"epoch", "step"}
SETTINGS = {"max_steps": 8, "learning_rate": 1e-3, "seed": 3}
TWO_MICRO_BATCHES = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}


def contrast(images: Tensor, **_: Any) -> Tensor:
    """The deviation of an image's pixels; it leaves out the images of which every pixel is bright."""
    values = 5 * images.flatten(1).std(dim=1)
    return torch.where(images.flatten(1).amin(dim=1) > 0.5, torch.nan, values)


def pretrain(folder: Path) -> MARTrainer:
    return pretrainer(folder, tiny_model(0), **SETTINGS, **TWO_MICRO_BATCHES)


def distill(folder: Path) -> MARTrainer:
    return distiller(folder, tiny_model(0), **SETTINGS, timestep_draws=2)


def grpo(folder: Path, reward: Any = darkness, **settings: Any) -> MARTrainer:
    return grpo_trainer(folder, grey_student(), reward, **{**SETTINGS, "num_unmasking_steps": 3, **settings})


def backprop(folder: Path, **settings: Any) -> MARTrainer:
    return backprop_trainer(folder, grey_student(), **{**SETTINGS, "num_unmasking_steps": 3, **settings})


RUNS: dict[str, Callable[[Path], MARTrainer]] = {
    "pretrain": pretrain,
    "distill": distill,
    "grpo": lambda folder: grpo(folder, beta=0.01, num_iterations=2, steps_per_generation=2, **TWO_MICRO_BATCHES),
    "grpo_anchored": lambda folder: grpo(folder, beta=0.01, share_noise=True, share_order=True, **ANCHOR),
    "grpo_gdpo": lambda folder: grpo(folder, [darkness, contrast], multi_objective_aggregation="normalize_then_sum"),
    "grpo_cispo": lambda folder: grpo(folder, loss_type="cispo", epsilon_high=0.1, num_iterations=4),
    "grpo_mean": lambda folder: grpo(folder, log_prob_reduction="mean", scale_rewards="batch", num_iterations=2),
    "reward_backprop": lambda folder: backprop(folder, beta=0.01, **TWO_MICRO_BATCHES),
    "reward_backprop_anchored": lambda folder: backprop(folder, beta=0.01, **ANCHOR),
    "reward_backprop_refl": lambda folder: backprop(folder, backprop_steps="random"),
    "reward_backprop_draft": lambda folder: backprop(folder, backprop_steps="last", num_backprop_steps=2),
}


def trajectory(name: str, folder: Path) -> dict[str, list[float | None]]:
    """What a run logs: metric -> its value in each step, None where it has none."""
    trainer = RUNS[name](folder)
    trainer.train()
    lines = [line for line in trainer.state.log_history if "loss" in line]
    names = {key: None for line in lines for key in line if key not in NOT_STORED}  # in their order
    return {key: [line.get(key) for line in lines] for key in names}


@pytest.mark.parametrize("name", RUNS)
def test_a_run_logs_what_was_stored(tmp_path, name):
    stored, found = json.loads(STORED.read_text())[name], trajectory(name, tmp_path)
    assert found.keys() == stored.keys() and len(found["loss"]) == SETTINGS["max_steps"]
    for metric, values in found.items():
        assert [value is None for value in values] == [value is None for value in stored[metric]], metric
        numbers, expected = ([v for v in listed if v is not None] for listed in (values, stored[metric]))
        # Other processors round otherwise, and Adam makes a step of each rounding error.
        assert numbers == pytest.approx(expected, rel=1e-4, abs=1e-6), metric


def store() -> None:
    """Writes a line a metric."""
    with tempfile.TemporaryDirectory() as folder:
        runs = {name: trajectory(name, Path(folder) / name) for name in RUNS}
    blocks = [
        f'"{name}": {{\n' + ",\n".join(f' "{key}": {json.dumps(values)}' for key, values in metrics.items()) + "\n}"
        for name, metrics in runs.items()
    ]
    STORED.write_text("{\n" + ",\n".join(blocks) + "\n}\n")


if __name__ == "__main__":
    store()
