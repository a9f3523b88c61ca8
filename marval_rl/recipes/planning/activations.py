"""The activations of one micro-batch of each trainer, counted on fake tensors."""

from __future__ import annotations

from typing import Any

import torch
from peft import LoraConfig
from torch import Tensor

from marval_rl.losses.policy import action_log_prob, policy_loss
from marval_rl.models import MARConfig, MARModel
from marval_rl.models.mar import new_head
from marval_rl.models.sampling import student_mean
from marval_rl.models.unmasking import random_order, unmasking_steps
from marval_rl.recipes.planning.memory import adapted_on_meta, saved_bytes
from marval_rl.trainers.pretrain import pretraining_loss
from marval_rl.trainers.score_matching import Contexts, GSIMArguments, ScoreMatching
from marval_rl.trainers.student_networks import StudentNetworks


def pretrain_bytes(config: MARConfig, args: Any) -> int:
    """`pretraining_loss` with all tokens masked, the most there can be."""

    def run(model: MARModel) -> Any:
        tokens, labels, order = example_batch(config, args.per_device_train_batch_size)
        shape = (args.timestep_draws, *tokens.shape[:2])
        timesteps = torch.zeros(shape, dtype=torch.long)
        noise = torch.randn(*shape, config.token_channels)
        drop_mask = torch.zeros(len(tokens), dtype=torch.bool)
        return pretraining_loss(model, tokens, labels, order, config.num_tokens, timesteps, noise, drop_mask)

    return saved_bytes(lambda: [_trained(config, args)], run, config, args.precision != "float32")


def gsim_bytes(
    student: MARConfig,
    teacher: MARConfig,
    args: Any,
    gsim: GSIMArguments,
    batch_size: int,
    peft_config: LoraConfig | None = None,
) -> int:
    """The student's and the auxiliary network's loss with all tokens masked."""

    def networks() -> list[Any]:
        return [StudentNetworks(_trained(student, args, peft_config), new_head(student)), MARModel(teacher).eval()]

    def run(networks: StudentNetworks, teacher: MARModel) -> Any:
        matching = ScoreMatching(teacher, gsim)
        contexts = Contexts(*example_batch(student, batch_size), student.num_tokens)
        loss, _, sample = matching.student_loss(networks, contexts)
        return loss, matching.auxiliary_loss(networks, sample)

    return saved_bytes(networks, run, student, args.precision != "float32")


def grpo_bytes(config: MARConfig, args: Any, peft_config: LoraConfig | None = None) -> int:
    """The policy loss over all unmasking steps."""
    pairs = unmasking_steps(config.num_tokens, args.num_unmasking_steps)

    def run(student: MARModel) -> Any:
        tokens, labels, order = example_batch(config, args.per_device_train_batch_size)
        rollout = {"class_labels": labels, "order": order, "noise": torch.randn_like(tokens)}
        log_probs = []
        for masked, kept in pairs:
            mean = student_mean(student, rollout, tokens, masked, kept)
            log_probs.append(action_log_prob(torch.randn_like(mean), mean, args.policy_std))
        log_prob = torch.stack(log_probs, dim=1)
        return policy_loss(log_prob, torch.zeros_like(log_prob), torch.zeros(len(tokens)))

    return saved_bytes(lambda: [_trained(config, args, peft_config)], run, config, args.precision != "float32")


def reward_backprop_bytes(
    config: MARConfig, args: Any, peft_config: LoraConfig | None = None, batch_size: int | None = None
) -> int:
    """One unmasking step, the largest, as each is checkpointed; the decoder and the reward come on top."""

    def run(student: MARModel) -> Any:
        tokens, labels, order = example_batch(config, batch_size or args.per_device_train_batch_size)
        kept = unmasking_steps(config.num_tokens, args.num_unmasking_steps)[-1][1]
        return student.one_step(tokens, labels, order, config.num_tokens, kept, torch.randn_like(tokens))

    return saved_bytes(lambda: [_trained(config, args, peft_config)], run, config, args.precision != "float32")


def _trained(config: MARConfig, args: Any, peft_config: LoraConfig | None = None) -> MARModel:
    if peft_config is None:
        model = MARModel(config)
    else:
        model = adapted_on_meta(config, peft_config)
        state = {name: torch.empty(tensor.shape) for name, tensor in model.state_dict().items()}  # fake tensors
        model.load_state_dict(state, assign=True)
    model.train()
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable(args.gradient_checkpointing_kwargs or {"use_reentrant": False})
    return model


def example_batch(config: MARConfig, batch_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens [B, L, C], class labels [B] and an unmasking order [B, L]."""
    tokens = torch.randn(batch_size, config.num_tokens, config.token_channels)
    return tokens, torch.zeros(batch_size, dtype=torch.long), random_order(batch_size, config.num_tokens, "cpu", None)
