"""GRPO (DeepSeekMath, arXiv 2402.03300) on the unmasking steps of a one-step student, with the names of TRL's trainer.

What differs from TRL's, and why:

- An action is the tokens that an unmasking step reveals: continuous, so the policy is a Gaussian around the student's
  prediction, and `policy_std` stands where the temperature does. Its log-probability is exact and its KL divergence in
  closed form (`losses/policy.py`).
- An episode has K actions, whatever the image: no padding, no masks. TRL's loss_type "dr_grpo" would be "grpo".
- Old log-probabilities are always those of the rollout. It is sampled by the same weights in the portions that training
  takes, so before the first update every ratio is 1, which is checked; there is no second engine to correct for.
- The images of a group may share unmasking order and noise: then only what the policy explored tells them apart.
- Rewards that are `async def`, those of a server among them, score one micro-batch while the next is generated.
- Groups whose rewards are all alike are left out of the policy loss's mean, not of the KL's.
- With the GSIM anchor one step of a cycle of `auxiliary_updates` is a policy update; the others move no student.

How rows become groups, and groups become micro-batches; here 2 processes, per_device_train_batch_size 3,
steps_per_generation 2, num_generations 4, so a generation batch of N = 12 images:

    rows, the same in all processes       row 0            row 1            row 2
    images, a group for each row          0  1  2  3       4  5  6  7       8  9 10 11
    one permutation, split:
                        micro-batch 0     micro-batch 1
        process 0       7  2 11           5  8  1          each generates and scores its own six images
        process 1       0  9  4           10 3  6
    rewards are gathered and put back into the order of the groups; each process keeps the advantages of its own

So a group may span processes and micro-batches, and the number of processes changes nothing. A generation batch serves
steps_per_generation x num_iterations micro-batches.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from marval_rl.errors import PolicyMismatchError
from marval_rl.losses.advantages import aggregate_advantages, group_weights
from marval_rl.losses.policy import action_log_prob, policy_loss
from marval_rl.models import MaskedModel
from marval_rl.models.generation import save_image_grid
from marval_rl.models.noise import IndexedNoise
from marval_rl.models.sampling import draw_rollout_noise, student_mean, unmask
from marval_rl.models.unmasking import gather_tokens, revealed_positions, unmasking_steps
from marval_rl.randomness import derive_generator, kept_random_state
from marval_rl.runtime.distributed import failing_together, gather_rows, gathered_weights
from marval_rl.runtime.profiling import REWARD, ROLLOUT, phase
from marval_rl.trainers.grpo_config import MARGRPOConfig
from marval_rl.trainers.reward_trainer import RewardTrainer

SUM_CLIP_RANGE = 0.2  # of the ratio of an action whose log-probability is a sum
RATIO_TOLERANCE = 1e-5  # how far ratios may be from 1 before the first update


class MARGRPOTrainer(RewardTrainer):
    """Trains a student by GRPO; arguments as `RewardTrainer`'s.

    Letters in shapes: N images of a generation batch, P processes, B images of a micro-batch, K unmasking steps that
    reveal anything, L tokens per image, M tokens revealed in a step, C channels per token.

    Raises:
        PolicyMismatchError: From `train`, if the log-probabilities of a rollout are not found again before an update.
    """

    method = "grpo"

    args: MARGRPOConfig

    def __init__(self, model: MaskedModel | str, reward_funcs: Any, args: MARGRPOConfig, **kwargs: Any):
        super().__init__(model, reward_funcs, args, **kwargs)
        if self.rewards is None:
            raise ValueError(
                "reward_funcs is empty, but grpo compares rewards: only reward_backprop trains on distribution_weight "
                "alone"
            )
        config = self.mar.config
        self.pairs = unmasking_steps(config.num_tokens, args.num_unmasking_steps)  # K of (masked before, after)
        action_size = 1.0
        if args.log_prob_reduction == "mean":
            action_size = config.num_tokens * config.token_channels / len(self.pairs)
        self.epsilon_low = SUM_CLIP_RANGE / action_size if args.epsilon is None else args.epsilon
        self.epsilon_high = self.epsilon_low if args.epsilon_high is None else args.epsilon_high

    def needs_buffer(self, step: int) -> bool:
        return super().needs_buffer(step) or not self.args.starts_rollout(step, micro_batch=0)

    def prepare_inputs(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        """This micro-batch's B images of the generation batch, which is generated first where one begins."""
        args, step = self.args, self.state.global_step
        if args.starts_rollout(step, self.micro_batch):
            self.generate_rollouts(rows)
        part = args.policy_micro_batch(step, self.micro_batch) % args.micro_batches
        mine = slice(part * args.per_device_train_batch_size, (part + 1) * args.per_device_train_batch_size)
        names = ("class_labels", "order", "noise", "tokens", "log_prob", "advantages", "weights")
        return {name: self.buffer[name][mine] for name in names}

    def generate_rollouts(self, rows: list[dict[str, Any]]) -> None:
        """Generate, score and compare the images of one generation batch; this process's N / P go to the buffer."""
        args, size = self.args, self.args.per_device_train_batch_size
        generator = derive_generator(args.device, args.seed, "rollout", self.state.global_step)
        shuffled = torch.randperm(args.generation_batch_size, device=args.device, generator=generator)  # [N]
        by_process = shuffled.view(-1, args.world_size, size).transpose(0, 1)
        dealt = by_process.reshape(args.world_size, -1)  # [P, N / P], micro-batch by micro-batch
        mine = dealt[args.process_index]  # [N / P]
        noise = draw_rollout_noise(
            len(rows), args.num_generations, self.mar.config, generator, args.share_order, args.share_noise
        )
        # Reading which images are ours waits for the device.
        labels, columns = self.labels_and_columns([rows[image // args.num_generations] for image in mine.tolist()])

        rollout, own_scores = self.generate_and_score(
            labels, columns, {name: values[mine] for name, values in noise.items()}
        )
        scores = torch.empty(args.generation_batch_size, own_scores.shape[1], device=args.device)
        scores[dealt.flatten()] = gather_rows(own_scores)  # [N, R], groups in a row
        self.record_scores(scores, args.num_generations)
        assert self.rewards is not None  # the constructor refuses it
        advantages, metrics = aggregate_advantages(
            scores,
            self.rewards.weights,
            args.num_generations,
            args.scale_rewards,
            args.multi_objective_aggregation,
        )
        self.record(metrics)
        weights = group_weights(advantages, args.num_generations)  # [N]
        self.buffer |= {**rollout, "advantages": advantages[mine], "weights": weights[mine]}

    def generate_and_score(
        self, labels: Tensor, columns: dict[str, list[Any]], noise: dict[str, Tensor]
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Rollouts of this process's images, micro-batch by micro-batch; asynchronous rewards judge one while the next
        is generated.

        Args:
            labels: [N / P].
            columns: Lists of that length.
            noise: Of `draw_rollout_noise`, for these images.

        Returns:
            What `roll_out` returns, for all of them, and their scores [N / P, R] by the R rewards.
        """
        args = self.args
        assert self.rewards is not None  # the constructor refuses it
        parts = []
        self.mar.eval()
        with kept_random_state(args.device), self.rewards.in_parts() as scoring:
            with gathered_weights(self.mar):
                for start in range(0, len(labels), args.per_device_train_batch_size):
                    part = slice(start, start + args.per_device_train_batch_size)
                    inputs = {
                        "class_labels": labels[part],
                        "order": noise["order"][part],
                        "noise": noise["noise"][part],
                    }
                    # In the precision and the portions of training, so that the same kernels find the same
                    # log-probabilities.
                    with phase(ROLLOUT), self.accelerator.autocast():
                        rollout = self.roll_out(self.mar, inputs, noise["exploration"][part], args.num_unmasking_steps)
                    parts.append(rollout)
                    images = self.decode_tokens(rollout["tokens"], labels[part])
                    part_columns = {name: values[part] for name, values in columns.items()}
                    with phase(REWARD):
                        scoring.add(*self.reward_arguments(images, labels[part], part_columns))
            with phase(REWARD), failing_together(args.device):
                scores = scoring.result().by_reward()
        self.mar.train()
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}, scores

    @torch.no_grad()
    def roll_out(
        self, model: MaskedModel, inputs: dict[str, Tensor], exploration: Tensor, num_unmasking_steps: int
    ) -> dict[str, Tensor]:
        """Sample a_k ~ N(mu(z_k, s_k), policy_std^2) in every unmasking step.

        The state s_k follows from the final tokens, the order and k: a rollout needs no other memory.

        Args:
            model: The student, or its average.
            inputs: class_labels [B], order [B, L] and noise z [B, L, C].
            exploration: xi [B, L, C].
            num_unmasking_steps: K.

        Returns:
            The inputs, with tokens [B, L, C] and log_prob [B, K].
        """
        args, log_probs = self.args, []
        steps = unmask(
            partial(student_mean, model, inputs),
            inputs["order"],
            model.config.token_channels,
            num_unmasking_steps,
            exploration=exploration,
            policy_std=args.policy_std,
        )
        for step in steps:
            log_probs.append(action_log_prob(step.revealed, step.mean, args.policy_std, args.log_prob_reduction))
        return {**inputs, "tokens": step.tokens, "log_prob": torch.stack(log_probs, dim=1)}

    def reward_loss(
        self, student: MaskedModel, rollout: dict[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor], Tensor | None]:
        args, tokens, order = self.args, rollout["tokens"], rollout["order"]
        if not args.moves_model(self.state.global_step):
            return torch.zeros((), device=args.device), rollout, None
        predict = partial(student_mean, student, rollout, tokens)
        if args.gradient_checkpointing:  # also of whole steps: what is kept does not grow with their number
            predict = partial(checkpoint, predict, use_reentrant=False)
        log_probs, divergences = [], []
        for index, (num_masked, num_kept) in enumerate(self.pairs):
            mean = predict(num_masked, num_kept)  # [B, M, C]
            action = gather_tokens(tokens, revealed_positions(order, num_masked, num_kept))  # [B, M, C]
            log_probs.append(action_log_prob(action, mean, args.policy_std, args.log_prob_reduction))  # [B]
            self.guard.blame(f"the log-probability of unmasking step {index + 1}", log_probs[-1])
            if args.beta > 0:
                kl = self.anchors.kl(mean, student, rollout, tokens, num_masked, num_kept, args.log_prob_reduction)
                divergences.append(kl)  # [B]
        log_prob, old_log_prob = torch.stack(log_probs, dim=1), rollout["log_prob"]  # [B, K]
        self._check_ratio(log_prob, old_log_prob)
        loss, metrics = policy_loss(
            log_prob,
            old_log_prob,
            rollout["advantages"],
            self.epsilon_low,
            self.epsilon_high,
            args.loss_type,
            rollout["weights"],
        )
        self.record(metrics)
        return loss, rollout, torch.stack(divergences, dim=1) if divergences else None

    @torch.no_grad()
    def write_samples(self, images: Tensor, class_labels: Tensor) -> None:
        """Also the images of the grid as a rollout would generate them: same order and noise, with exploration."""
        super().write_samples(images, class_labels)
        args, config, device = self.args, self.mar.config, self.args.device
        indices, size = self.eval_plan.shown(args.sample_grid_columns), args.eval_batch_size
        parts = []
        for index, labels in zip(indices.split(size), class_labels.split(size), strict=True):
            source, rows = IndexedNoise(args.eval_seed, index.to(device)), len(index) * config.num_tokens
            order = source.order(len(index), config.num_tokens)
            noise, exploration = (
                source.normal(rows, config.token_channels).view(len(index), config.num_tokens, -1) for _ in range(2)
            )
            inputs = {"class_labels": labels.to(device), "order": order, "noise": noise}
            steps = self.sampling_settings().num_unmasking_steps
            rollout = self.roll_out(self.ema.module.eval(), inputs, exploration, steps)
            parts.append(self.decode_tokens(rollout["tokens"], inputs["class_labels"]).cpu())
        explored = torch.cat(parts).expand(-1, 3, -1, -1)
        save_image_grid(explored, class_labels, self.sample_file("exploration_"), args.sample_grid_columns)

    def _check_ratio(self, log_prob: Tensor, old_log_prob: Tensor) -> None:
        """Before the first update on a rollout each ratio must be 1, or the gradient is not that of the policy."""
        args = self.args
        if not args.starts_rollout(self.state.global_step, self.micro_batch):
            return
        with failing_together(args.device, PolicyMismatchError):
            worst = (log_prob - old_log_prob).detach().abs().max()
            if not ~(worst > RATIO_TOLERANCE):  # waits for the device; NaN is the guard's to report
                raise PolicyMismatchError(
                    f"before the first update on a rollout a log-probability differs by {worst:.3g} from the rollout's "
                    f"(at most {RATIO_TOLERANCE:g} is allowed), so ratios would not be 1: the student must generate "
                    "the same in evaluation and training mode. Set its dropout, and LoRA's, to 0; in reduced precision "
                    "raise policy_std or train in float32"
                )
