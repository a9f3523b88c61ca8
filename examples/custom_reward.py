"""A reward of your own, and what it did to the images: a minute on a CPU, after examples/python_api.py.

    python examples/custom_reward.py
    marval-rl rewards check examples/custom_reward.py:Boldness

The reward asks for strokes of a certain boldness. It is differentiable, so the student is trained through it; the KL
divergence (beta) keeps the images digits, and a classifier that is not trained on judges them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from marval_rl import RewardBackpropConfig, RewardBackpropTrainer, load_model
from marval_rl.data import class_rows
from marval_rl.models import MARModel, codec_for
from marval_rl.models.generation import SamplingSettings, generate_images, save_image_grid
from marval_rl.recipes.data_arguments import DataArguments

STUDENT, FOLDER = "runs/examples/student", "runs/examples/bold"
JUDGE = "eval_held_out_classifier/log_probability"


class Boldness:
    """How near the share of ink is to `target`: 0 at best, negative otherwise."""

    differentiable = True

    def __init__(self, target: float = 0.45):
        self.target = target

    def __call__(self, *, images: Tensor, **columns: object) -> Tensor:
        return -(images.mean(dim=(1, 2, 3)) - self.target).abs()


def ink_of(model: MARModel) -> tuple[float, Tensor, Tensor]:
    """The share of ink of 40 images, the images and their labels; the same noise for every model."""
    settings = SamplingSettings(num_unmasking_steps=4)
    images, labels = generate_images(
        model.cpu(), codec_for(model.config), 40, settings, seed=0, batch_size=40, device="cpu"
    )
    return float(images.mean()), images, labels


def main(max_steps: int = 60) -> tuple[float, float]:
    """Returns the share of ink before and after."""
    student = load_model(STUDENT)
    before, _, _ = ink_of(student)
    args = RewardBackpropConfig(
        FOLDER,
        max_steps=max_steps,
        num_unmasking_steps=4,
        per_device_train_batch_size=32,
        learning_rate=1e-4,
        beta=0.002,
        ema_decay=0.9,
        save_strategy="no",
        eval_steps=max_steps,
        eval_num_images=100,
    )
    # Held-out digits, features and judges: what `dataset: digits` means in a recipe.
    evaluator = DataArguments(dataset="digits", class_groups="parity").evaluator(student.config)
    trainer = RewardBackpropTrainer(
        student, [Boldness()], args, train_dataset=class_rows(student.config.num_classes), evaluator=evaluator
    )
    trainer.train()
    after, images, labels = ink_of(trainer.ema.module)
    save_image_grid(images, labels, f"{FOLDER}/bold.png", columns=20, min_height=32)
    scores = [line[JUDGE] for line in trainer.state.log_history if JUDGE in line]
    print(f"ink {before:.3f} -> {after:.3f}, held-out judge {scores[0]:.2f} -> {scores[-1]:.2f}: {FOLDER}/bold.png")
    return before, after


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
