"""GRPO on tiny students: whether it learns, and how rollouts are used."""

from __future__ import annotations

import asyncio
import threading
from statistics import mean
from typing import Any

import pytest
import torch
from datasets import Dataset
from tiny_models import tiny_student
from tiny_trainers import (
    ANCHOR,
    GRPO,
    assert_equal_states,
    constant,
    darkness,
    grey_student,
    grpo_trainer,
    logged,
    snapshot,
    tiny_images,
)
from torch import Tensor, nn

from marval_rl.data import class_rows
from marval_rl.errors import PolicyMismatchError
from marval_rl.models import MARModel
from marval_rl.models.checkpoints import load_model
from marval_rl.models.unmasking import unmasking_steps
from marval_rl.rewarding import RewardSet
from marval_rl.trainers import grpo as grpo_module
from marval_rl.trainers.anchors import Anchors
from marval_rl.trainers.grpo import MARGRPOConfig, MARGRPOTrainer


def test_before_the_first_update_every_ratio_is_one(tiny_runs, tmp_path, monkeypatch):
    ratios = []
    original = grpo_module.policy_loss

    def recording(log_prob: Tensor, old_log_prob: Tensor, *args: Any) -> Any:
        ratios.append((log_prob - old_log_prob).exp().detach())
        return original(log_prob, old_log_prob, *args)

    monkeypatch.setattr(grpo_module, "policy_loss", recording)
    student = load_model(tiny_runs.student, one_step=True)  # its teacher was trained with dropout
    config = MARGRPOConfig(
        str(tmp_path), **{**GRPO, "num_unmasking_steps": 8, "num_iterations": 2}, max_steps=2, learning_rate=1e-3
    )
    MARGRPOTrainer(student, RewardSet([darkness]), config, train_dataset=class_rows(10)).train()
    count = len(unmasking_steps(16, 8))
    assert [ratio.shape for ratio in ratios] == [(8, count)] * 2
    torch.testing.assert_close(ratios[0], torch.ones(8, count), atol=1e-5, rtol=0)
    assert (ratios[1] - 1).abs().max() > 1e-3  # the second pass over the same rollout


def test_grpo_raises_a_learnable_reward(tmp_path):
    settings = {"per_device_train_batch_size": 192, "num_generations": 16, "policy_std": 0.4, "max_steps": 12}
    trainer = grpo_trainer(tmp_path, grey_student(), **settings, learning_rate=3e-3)
    trainer.train()
    rewards = logged(trainer, "reward")
    assert len(rewards) == 12
    assert mean(rewards[-3:]) > mean(rewards[:3]) + 0.15
    assert logged(trainer, "rewards/darkness/mean") == pytest.approx(rewards)
    assert logged(trainer, "frac_reward_zero_std") == [0.0] * 12


def test_grpo_learns_nothing_from_a_constant_reward(tmp_path):
    trainer = grpo_trainer(tmp_path, tiny_student(1), constant, max_steps=3, learning_rate=1e-2)
    start = snapshot(trainer.mar)
    trainer.train()
    assert logged(trainer, "frac_reward_zero_std") == [1.0] * 3
    assert logged(trainer, "reward") == [0.5] * 3
    assert logged(trainer, "reward_std") == [0.0] * 3
    assert logged(trainer, "loss") == [0.0] * 3
    assert_equal_states(start, trainer.mar.state_dict())


def recorded_use(monkeypatch, trainer: MARGRPOTrainer) -> list[tuple[int, Tensor]]:
    """Trains; returns (optimizer step, numbers that identify the images it used) for each micro-batch."""
    used, generated = [], []
    original, reward_loss = trainer.generate_rollouts, trainer.reward_loss

    def generate(rows: list[dict[str, Any]]) -> None:
        original(rows)
        generated.append(trainer.state.global_step)

    def loss(student: MARModel, rollout: dict[str, Tensor]) -> Any:
        used.append((trainer.state.global_step, rollout["noise"].flatten(1)[:, 0].clone()))
        return reward_loss(student, rollout)

    monkeypatch.setattr(trainer, "generate_rollouts", generate)
    monkeypatch.setattr(trainer, "reward_loss", loss)
    trainer.train()
    trainer.generated_at = generated
    return used


def images_in(*uses: tuple[int, Tensor]) -> list[float]:
    return sorted(torch.cat([noise for _, noise in uses]).tolist())


def test_num_iterations_uses_each_rollout_that_often(tmp_path, monkeypatch):
    trainer = grpo_trainer(tmp_path, tiny_student(1), max_steps=6, num_iterations=2, learning_rate=1e-3)
    used = recorded_use(monkeypatch, trainer)
    assert trainer.generated_at == [0, 2, 4]
    for first in (0, 2, 4):
        assert images_in(used[first]) == images_in(used[first + 1])
        assert len(set(images_in(used[first]))) == 8
    assert not set(images_in(used[0])) & set(images_in(used[2]))
    ratios = logged(trainer, "ratio")
    assert all(ratios[step] == pytest.approx(1, abs=1e-5) for step in (0, 2, 4))
    assert all(abs(ratios[step] - 1) > 1e-5 for step in (1, 3, 5))


def test_steps_per_generation_spreads_a_rollout_over_several_updates(tmp_path, monkeypatch):
    settings = {"per_device_train_batch_size": 4, "steps_per_generation": 2, "num_iterations": 2, "max_steps": 8}
    trainer = grpo_trainer(tmp_path, tiny_student(1), **settings, learning_rate=1e-3)
    used = recorded_use(monkeypatch, trainer)
    assert trainer.generated_at == [0, 4]
    for first in (0, 4):
        halves = [images_in(used[first + k]) for k in range(4)]
        assert halves[0] == halves[2] and halves[1] == halves[3]
        assert len(halves[0]) == 4 and not set(halves[0]) & set(halves[1])
    assert not set(images_in(used[0])) & set(images_in(used[4]))


def test_two_accumulated_micro_batches_are_one_batch_of_twice_the_size(tmp_path, monkeypatch):
    settings = {"max_steps": 1, "learning_rate": 1e-2, "optim": "sgd"}  # Adam would blow up differences of rounding
    whole = grpo_trainer(tmp_path / "whole", grey_student(), **settings, per_device_train_batch_size=16)
    halves = grpo_trainer(tmp_path / "halves", grey_student(), **settings, gradient_accumulation_steps=2)
    start = nn.utils.parameters_to_vector(whole.mar.parameters()).detach().clone()
    used, in_halves = recorded_use(monkeypatch, whole), recorded_use(monkeypatch, halves)
    assert len(used) == 1 and len(in_halves) == 2
    assert images_in(*used) == images_in(*in_halves)
    for name in ("loss", "grad_norm", "reward"):
        assert logged(whole, name) == pytest.approx(logged(halves, name), rel=1e-3, abs=1e-5)
    one, other = (nn.utils.parameters_to_vector(trainer.mar.parameters()) for trainer in (whole, halves))
    assert (one - other).norm() < 1e-3 * (one - start).norm()


def three_alike(images: Tensor, class_labels: Tensor, **_: Any) -> list[float]:
    """Says the same of all images of class 0, and tells those of the others apart."""
    return torch.where(class_labels == 0, 0.5, darkness(images)).tolist()


def test_a_group_without_a_preference_keeps_its_divergence(tmp_path, monkeypatch):
    """As in TRL: it is left out of the policy loss, and held near the reference model all the same."""
    seen = []
    original = Anchors.add

    def recording(self: Anchors, loss: Tensor, networks: Any, rollout: dict[str, Tensor], kl: Tensor, *args: Any):
        total, metrics = original(self, loss, networks, rollout, kl, *args)
        seen.append((loss.detach(), total.detach(), kl.detach(), rollout["weights"]))
        return total, metrics

    monkeypatch.setattr(Anchors, "add", recording)
    settings = {"max_steps": 2, "num_iterations": 2, "learning_rate": 1e-2, "beta": 0.3}
    trainer = grpo_trainer(tmp_path, tiny_student(1), three_alike, **settings, per_device_train_batch_size=12)
    trainer.train()
    loss, total, kl, weights = seen[1]  # after one update
    dropped = weights == 0
    assert dropped.sum() == 4 and (weights[~dropped] == 1.5).all()
    assert (kl[dropped] > 0).all()
    torch.testing.assert_close(total - loss, 0.3 * kl.mean())
    assert logged(trainer, "kl")[1] == pytest.approx(kl.mean().item())


def test_the_divergence_from_the_reference_is_logged_and_held_down(tmp_path):
    settings = {"max_steps": 8, "learning_rate": 3e-3, "num_iterations": 2}
    free = grpo_trainer(tmp_path / "free", tiny_student(1), **settings, beta=1e-6)
    held = grpo_trainer(tmp_path / "held", tiny_student(1), **settings, beta=1.0)
    start = snapshot(held.anchors.reference)
    for trainer in (free, held):
        trainer.train()
        kl = logged(trainer, "kl")
        assert len(kl) == 8 and kl[0] == pytest.approx(0, abs=1e-6) and all(value > 0 for value in kl[1:])
    assert logged(held, "kl")[-1] < 0.5 * logged(free, "kl")[-1]
    assert_equal_states(start, held.anchors.reference.state_dict())
    assert grpo_trainer(tmp_path / "none", tiny_student(1), max_steps=1, beta=0.0).anchors.reference is None


def test_rewards_are_asked_about_finished_images_with_their_prompts_and_columns(tmp_path):
    asked = []

    def reward(images: Tensor, prompts: list[str], class_names: list[str], class_labels: Tensor, hint: list[str], **_):
        asked.append((images, prompts, class_names, class_labels.tolist(), hint))
        return [0.0] * len(images)

    student = tiny_student(1, class_names=["cat", "dog", "eel"])
    config = MARGRPOConfig(str(tmp_path), **GRPO, max_steps=1, prompt_template="a {name}!")
    rows = [{"class_labels": 2, "hint": "long"}, {"class_labels": 0, "hint": "furry"}]
    MARGRPOTrainer(student, RewardSet([reward]), config, train_dataset=rows).train()
    images, prompts, names, labels, hints = asked[0]
    assert images.shape == (8, 3, 4, 4) and images.min() >= 0 and images.max() <= 1
    assert sorted(labels) == [0] * 4 + [2] * 4
    expected = {0: ("a cat!", "cat", "furry"), 2: ("a eel!", "eel", "long")}
    assert list(zip(prompts, names, hints, strict=True)) == [expected[label] for label in labels]


def test_an_asynchronous_reward_scores_one_micro_batch_while_the_next_is_generated(tmp_path, monkeypatch):
    begun, overlapped = threading.Event(), []

    async def patient_darkness(*, images: Tensor, **columns: Any) -> Tensor:
        begun.set()
        await asyncio.sleep(0)
        return darkness(images=images, **columns)

    original = MARGRPOTrainer.roll_out

    def waiting(self: MARGRPOTrainer, *args: Any) -> dict[str, Tensor]:
        if self.state.global_step == 0:
            overlapped.append(bool(overlapped) and begun.wait(timeout=10))
        return original(self, *args)

    settings = {"steps_per_generation": 3, "max_steps": 4, "learning_rate": 1e-3}
    plain = grpo_trainer(tmp_path / "plain", tiny_student(), darkness, **settings)
    plain.train()
    monkeypatch.setattr(MARGRPOTrainer, "roll_out", waiting)
    asynchronous = grpo_trainer(tmp_path / "asynchronous", tiny_student(), patient_darkness, **settings)
    asynchronous.train()
    assert overlapped == [False, True, True]
    assert_equal_states(asynchronous.mar.state_dict(), plain.mar.state_dict())


@pytest.mark.parametrize("share_order", [False, True])
@pytest.mark.parametrize("share_noise", [False, True])
def test_a_group_may_share_its_order_and_its_noise(tmp_path, share_order, share_noise):
    trainer = grpo_trainer(tmp_path, tiny_student(1), max_steps=1, share_order=share_order, share_noise=share_noise)
    trainer.train()
    rollout = trainer.buffer
    assert len(rollout["order"].unique(dim=0)) == 2 if share_order else len(rollout["order"].unique(dim=0)) > 2
    assert len(rollout["noise"].unique(dim=0)) == (2 if share_noise else 8)
    assert len(rollout["tokens"].unique(dim=0)) == 8  # each image explores by itself
    if share_noise:  # the images of one noise are those of one class: 2 groups of 4
        for noise in rollout["noise"].unique(dim=0):
            members = rollout["class_labels"][(rollout["noise"] == noise).all(dim=(1, 2))]
            assert len(members) == 4 and len(members.unique()) == 1


def test_advantages_belong_to_the_images_that_earned_them(tmp_path):
    trainer = grpo_trainer(tmp_path, tiny_student(1), max_steps=1, scale_rewards="none", share_noise=True)
    trainer.train()
    rollout = trainer.buffer
    rewards = darkness(trainer.decode_tokens(rollout["tokens"], rollout["class_labels"]))
    for noise in rollout["noise"].unique(dim=0):  # a group
        members = (rollout["noise"] == noise).all(dim=(1, 2))
        expected = rewards[members] - rewards[members].mean()
        torch.testing.assert_close(rollout["advantages"][members], expected, rtol=1e-4, atol=1e-6)


def test_a_student_that_generates_differently_in_training_is_refused(tmp_path):
    student = tiny_student(1, projection_dropout=0.3)
    with pytest.raises(PolicyMismatchError, match=r"differs by .* so ratios would not be 1.*dropout"):
        grpo_trainer(tmp_path, student, max_steps=1).train()


def test_a_mean_log_prob_has_its_own_default_clip_range(tmp_path):
    summed = grpo_trainer(tmp_path, tiny_student(1), num_unmasking_steps=4)
    mean = grpo_trainer(tmp_path, tiny_student(1), num_unmasking_steps=4, log_prob_reduction="mean")
    given = grpo_trainer(tmp_path, tiny_student(1), num_unmasking_steps=4, epsilon=0.1, epsilon_high=0.3)
    assert (summed.epsilon_low, summed.epsilon_high) == (0.2, 0.2)
    assert mean.epsilon_low == pytest.approx(0.2 / 4)  # 4 tokens of 4 channels in 4 steps
    assert (given.epsilon_low, given.epsilon_high) == (0.1, 0.3)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "train_dataset has no rows"),
        ([{"prompt": "a cat", "artist": "Klee"}] * 8, "no column class_labels, only prompt, artist: each row names"),
        (Dataset.from_list([{"class_labels": 0, "prompts": "a"}] * 8), "has a column prompts, .* rename the column"),
        ([{"class_labels": 0, "completions": "a"}] * 8, "has a column completions, "),
        ([{"class_labels": 0}] * 7 + [{"class_labels": 13}], r"class label 13 is outside 0\.\.2, the classes"),
        (Dataset.from_list([{"class_labels": 0}] * 7 + [{"class_labels": -1}]), r"class label -1 is outside 0\.\.2"),
        ([{"class_labels": "cat"}] * 8, r"class_labels must be whole numbers in 0\.\.2, not 'cat'"),
        (
            [{"class_labels": 0}] * 7 + [{"class_labels": None}],
            r"class_labels must be whole numbers in 0\.\.2, not None",
        ),
        ([{"class_labels": 0}], "train_dataset has 1 rows, but 2 are needed"),
    ],
)
def test_rows_that_cannot_be_rolled_out_are_refused_when_the_trainer_is_made(tmp_path, rows, message):
    config = MARGRPOConfig(str(tmp_path), **GRPO)
    with pytest.raises(ValueError, match=message):
        MARGRPOTrainer(tiny_student(1), darkness, config, train_dataset=rows)


def test_a_frozen_student_is_refused_with_the_remedy(tmp_path):
    """A trainer's average is frozen: handed on, it would end in an error of autograd."""
    with pytest.raises(ValueError, match=r"the model is frozen, .* give the path of its run folder"):
        grpo_trainer(tmp_path, tiny_student(1).requires_grad_(False))


def test_rows_may_hold_images_and_labels_as_tensors(tmp_path):
    config = MARGRPOConfig(str(tmp_path), **GRPO, max_steps=1)
    MARGRPOTrainer(tiny_student(1), darkness, config, train_dataset=tiny_images()).train()


@pytest.mark.parametrize(
    ("batch", "message"), [(0, "takes 0 rows"), (50, "takes 25 rows .* has 24: set it to 1 to 48")]
)
def test_an_anchor_needs_as_many_rows_as_it_takes_at_once(tmp_path, batch, message):
    with pytest.raises(ValueError, match=f"gsim_batch_size {batch} {message}"):
        grpo_trainer(tmp_path, tiny_student(1), **ANCHOR | {"gsim_batch_size": batch})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loss_type": "dr_grpo"}, 'would be "grpo".*scale_rewards to "none"'),
        ({"loss_type": "ppo"}, 'loss_type must be one of grpo, cispo, not "ppo"'),
        ({"scale_rewards": "std"}, 'scale_rewards must be one of group, batch, none, not "std"'),
        ({"log_prob_reduction": "none"}, 'log_prob_reduction must be one of sum, mean, not "none"'),
        ({"policy_std": 0.0}, "policy_std must be positive, not 0.0"),
        ({"gsim_weight": -1.0}, "gsim_weight must not be negative, but is -1.0"),
        (
            {"num_generations": 3},
            "8 images does not divide into groups of num_generations = 3 .* 8 x steps_per_generation 1 x 1 processes",
        ),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        grpo_trainer(tmp_path, tiny_student(1), **settings)
