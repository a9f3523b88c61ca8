"""Teacher, student and RL from Python, on scikit-learn's digits: about two minutes on a CPU.

    python examples/python_api.py

Writes runs/examples/teacher, student and rl, each a run folder: `marval-rl report runs/examples/rl`. The models are
small and trained shortly; recipes/digits has the settings that make good ones.
"""

from __future__ import annotations

from marval_rl import (
    DistillConfig,
    DistillTrainer,
    MARConfig,
    MARGRPOConfig,
    MARGRPOTrainer,
    MARModel,
    PretrainConfig,
    PretrainTrainer,
)
from marval_rl.data import class_rows, load_image_dataset

FOLDER = "runs/examples"
SHARED = {
    "overwrite_output_dir": True,
    "save_strategy": "no",
    "eval_num_images": 100,
    "per_device_train_batch_size": 48,
}


def main(max_steps: int = 400) -> None:
    """max_steps: of the teacher; the student gets as many, and RL a tenth."""
    digits = load_image_dataset("digits", "train", "parity")  # classes "even digit" and "odd digit"

    config = MARConfig(
        image_size=8,
        image_channels=1,
        latent_stride=1,  # the latents are the pixels themselves: no VAE
        latent_channels=1,
        patch_size=2,  # 16 tokens of 2 x 2 pixels
        num_classes=2,
        class_names=digits.class_names,
        encoder_hidden_size=64,
        encoder_num_layers=2,
        encoder_num_heads=4,
        decoder_hidden_size=64,
        decoder_num_layers=2,
        decoder_num_heads=4,
        buffer_size=4,
        head_hidden_size=64,
        head_num_layers=2,
        clip_sample_range=1.0,
        attention_dropout=0.0,
        projection_dropout=0.0,
    )
    settings = {**SHARED, "max_steps": max_steps, "eval_steps": max_steps}
    masking = {"mask_ratio_min": 0.05, "mask_ratio_std": 0.5}

    args = PretrainConfig(
        f"{FOLDER}/teacher", learning_rate=2e-3, ema_decay=0.99, eval_diffusion_steps=10, **settings, **masking
    )
    pretrainer = PretrainTrainer(MARModel(config), args, train_dataset=digits)
    pretrainer.train()

    args = DistillConfig(
        f"{FOLDER}/student", ema_decay=0.98, auxiliary_warmup_steps=max_steps // 10, **settings, **masking
    )
    distiller = DistillTrainer(pretrainer.ema.module, args, train_dataset=digits)
    distiller.train()

    args = MARGRPOConfig(
        f"{FOLDER}/rl",
        num_generations=12,
        num_unmasking_steps=4,
        share_order=True,  # only exploration tells the images of a group apart
        share_noise=True,
        policy_std=0.05,
        beta=0.01,  # holds the student near where it began
        learning_rate=2e-5,
        **{**settings, "max_steps": max(1, max_steps // 10), "eval_steps": max(1, max_steps // 10)},
    )
    # Small files, as a reward: of no use, but anyone can check it by eye. Docs: rewards.md has the others.
    MARGRPOTrainer(f"{FOLDER}/student", "jpeg", args, train_dataset=class_rows(2)).train()
    print(f"{FOLDER}/rl/final holds the model, {FOLDER}/rl/samples what it generates")


if __name__ == "__main__":
    main()
