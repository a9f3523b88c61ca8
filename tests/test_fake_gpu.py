"""Every path of models, trainers, rewards and measures on "cuda", by tensors that hold no values; see fake_gpu.py."""

from __future__ import annotations

from pathlib import Path

import open_clip
import pytest
import torch
from diffusers import AutoencoderKL
from fake_gpu import CUDA, fake_gpu, move, move_trainer, take_step
from marval_rl.rewards import hps
from marval_rl.rewards.aesthetic import Aesthetic
from marval_rl.rewards.classifier import Classifier
from marval_rl.rewards.classifier_networks import ConvolutionalNetwork
from marval_rl.rewards.clip import Clip
from marval_rl.rewards.hps import Hps
from marval_rl.rewards.image_classifier import ImageClassifier
from marval_rl.rewards.image_reward import ImageReward
from marval_rl.rewards.pick_score import PickScore
from safetensors.torch import save_file
from tiny_models import tiny_model, tiny_student
from tiny_rewards import (
    CLIP_CONFIG,
    image_reward_arguments,
    write_aesthetic,
    write_classifier,
    write_clip,
    write_hps,
    write_image_reward,
    write_pick_score,
)
from tiny_trainers import ANCHOR, MATCHED, backprop_trainer, distiller, grpo_trainer, pretrainer

from marval_rl.evaluation import ImageEvaluator
from marval_rl.evaluation.features import Pixels
from marval_rl.evaluation.image_set import ImagePlan, generate_batch
from marval_rl.models import PixelCodec, generate
from marval_rl.models.generation import SamplingSettings
from marval_rl.models.noise import IndexedNoise
from marval_rl.models.unmasking import gather_tokens, visible_positions
from marval_rl.models.vae import VAECodec


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("indexed", [False, True])
@pytest.mark.parametrize(("kind", "guidance"), [("teacher", 1.0), ("teacher", 2.0), ("student", 1.0)])
def test_sampling_does_not_wait_for_the_device_between_unmasking_steps(kind, guidance, indexed, bf16):
    model = tiny_model() if kind == "teacher" else tiny_student()
    with fake_gpu(bf16) as waits:
        move(model)
        labels = torch.zeros(3, dtype=torch.long, device=CUDA)
        noise = IndexedNoise(0, torch.arange(3, device=CUDA)) if indexed else torch.Generator()
        output = generate(model, labels, num_unmasking_steps=3, guidance_scale=guidance, generator=noise)
        assert output.latents.device == CUDA and output.latents.shape == (3, 1, 4, 4)
        assert waits.found == {"models.generation.check_class_labels"}


def test_a_given_order_is_checked_before_the_first_step():
    model = tiny_student()
    with fake_gpu() as waits:
        move(model)
        order = torch.zeros(2, 4, dtype=torch.long, device=CUDA)
        generate(model, None, batch_size=2, num_unmasking_steps=4, order=order)
        assert waits.found == {"models.unmasking.check_order"}


def test_control_a_wrong_device_a_wait_and_a_mask_are_found():
    with fake_gpu() as waits:
        tokens, order = torch.zeros(2, 4, 3, device=CUDA), torch.zeros(2, 4, dtype=torch.long)
        with pytest.raises(RuntimeError, match="device"):
            gather_tokens(tokens, visible_positions(order, 2))
        with pytest.raises(RuntimeError, match="nonzero"):
            tokens[tokens > 0]
        if torch.__version__ >= (2, 14):  # fake tensors of torch 2.11 do not see it
            with pytest.raises(RuntimeError, match="scalar type"):
                tokens @ tokens.mT.bfloat16()
        assert waits.found == set()
        tokens[0].cpu()
        assert waits.found == {"a test"}


ANCHORS = {"beta": 0.1, **ANCHOR, **MATCHED}
TRAINERS = {
    "pretrain": lambda folder: pretrainer(folder, tiny_model()),
    "distill": lambda folder: distiller(folder, tiny_model()),
    "grpo": lambda folder: grpo_trainer(folder, tiny_student()),
    "anchored grpo": lambda folder: grpo_trainer(folder, tiny_student(), **ANCHORS),
    "reward_backprop": lambda folder: backprop_trainer(folder, tiny_student()),
    "anchored reward_backprop": lambda folder: backprop_trainer(folder, tiny_student(), **ANCHORS),
}
# Where a step waits for the device on purpose; each such line says so.
WAITS = {"runtime.guard.NonFiniteGuard.judge"}
REWARD_WAITS = {
    "rewarding.calling.RewardCalls._read",
    "rewarding.calling._to_scores",
    "rewarding.reward_set.checked_images",
    "trainers.base.MARTrainer.names_of",
}
ROLLOUT_WAITS = {"trainers.grpo.MARGRPOTrainer._check_ratio", "trainers.grpo.MARGRPOTrainer.generate_rollouts"}
ANCHOR_WAITS = {"losses.distribution.rows_by_label", "trainers.distribution_matching.DistributionMatching.loss"}


@pytest.mark.parametrize("name", TRAINERS)
def test_a_step_of_each_trainer_in_bf16_waits_where_it_says(name, tmp_path):
    trainer = TRAINERS[name](tmp_path)
    with fake_gpu(bf16=True) as waits:
        move_trainer(trainer)
        for step in (0, 1, 3):  # the warm-up, a step of the auxiliary network alone, one that moves the student
            take_step(trainer, step)
        expected = WAITS | (REWARD_WAITS if "grpo" in name or "reward" in name else set())
        expected |= ROLLOUT_WAITS if "grpo" in name else set()
        expected |= ANCHOR_WAITS if "anchored" in name else set()
        assert waits.found == expected


def classifier(folder: Path) -> Classifier:
    network = ConvolutionalNetwork(1, 8, 10)
    save_file(network.state_dict(), folder / "classifier.safetensors")
    return Classifier(training_images="digits", checkpoint=folder / "classifier.safetensors")


REWARDS = {
    "aesthetic": lambda folder: Aesthetic(write_aesthetic(folder), f"local-dir:{write_clip(folder)}"),
    "classifier": classifier,
    "clip": lambda folder: Clip(f"local-dir:{write_clip(folder)}", dtype="bfloat16", micro_batch_size=2),
    "hps": lambda folder: Hps(write_hps(folder)),
    "image_classifier": lambda folder: ImageClassifier(str(write_classifier(folder))),
    "image_reward": lambda folder: ImageReward(**image_reward_arguments(write_image_reward(folder))),
    "pick_score": lambda folder: PickScore(str(write_pick_score(folder)), str(folder)),
}


@pytest.mark.parametrize("name", REWARDS)
def test_differentiable_rewards(name, tmp_path, monkeypatch):
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, hps.MODEL, CLIP_CONFIG)
    reward = REWARDS[name](tmp_path)
    with fake_gpu(bf16=True) as waits:
        images = torch.rand(3, 3, 40, 40, device=CUDA, requires_grad=True)
        labels = torch.ones(3, dtype=torch.long, device=CUDA)
        scores = reward(images=images, prompts=["a one"] * 3, class_labels=labels, class_names=["one"] * 3)
        assert scores.device == CUDA and scores.dtype == torch.float32 and scores.requires_grad
        # The labels, to look up which of the model's classes are meant.
        assert waits.found == ({"image_classifier.ImageClassifier.__call__"} if name == "image_classifier" else set())


def test_an_evaluation_copies_to_the_host_only_what_it_measured(tmp_path):
    judge, spaces = classifier(tmp_path), {"pixels": Pixels(), "clip": Clip(f"local-dir:{write_clip(tmp_path)}")}
    evaluator = ImageEvaluator(spaces, class_of_mode=torch.arange(10), judges={"judge": judge})
    model, plan, settings = tiny_student(), ImagePlan(3, 3, batch_size=3), SamplingSettings(num_unmasking_steps=2)
    with fake_gpu() as waits:
        pixels = generate_batch(move(model), PixelCodec(), plan, 0, settings, seed=0)
        assert pixels.device == CUDA
        rows = evaluator.measure(pixels, plan.labels(0))
        assert {values.device.type for values in rows.values()} == {"cpu"}
        measured = {f"evaluation.evaluator.{name}" for name in ("_image_rows", "_judge_rows")}
        measured |= {"evaluation.features.features_of", "models.generation.check_class_labels"}
        assert waits.found == measured


def test_a_vae_encodes_and_decodes_with_a_gradient():
    channels = {"block_out_channels": (8, 8), "norm_num_groups": 4, "latent_channels": 4}
    codec = VAECodec(
        AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, **channels
        )
    )
    with fake_gpu(bf16=True) as waits:
        move(codec.autoencoder)
        latents = codec.encode(torch.rand(2, 3, 16, 16, device=CUDA)).requires_grad_()
        images = codec.decode(latents)
        assert images.shape == (2, 3, 16, 16) and images.dtype == torch.float32 and images.requires_grad
        assert waits.found == set()
