"""Our advantages and policy loss against those of trl.GRPOTrainer, on a tiny language model that it really trains."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import GRPOConfig, GRPOTrainer

from marval_rl.losses.advantages import group_advantages
from marval_rl.losses.policy import policy_loss

WORDS = ["[PAD]", "[EOS]", *"abcdefghijklmn"]
LENGTH = 5  # tokens a completion: the actions of an episode
GROUP = 4


def spread(completions: list[str], **_: Any) -> list[float]:
    """Differs from completion to completion, and says the same of the same one."""
    return [float(sum(map(ord, text)) % 17) for text in completions]


class Recording(GRPOTrainer):
    """Keeps what goes into TRL's advantages and loss, and what comes out."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.rewards: list[torch.Tensor] = []
        self.advantages: list[torch.Tensor] = []
        self.losses: list[dict[str, torch.Tensor]] = []
        self._found: torch.Tensor | None = None

    def _calculate_rewards(self, *args: Any) -> torch.Tensor:
        rewards = super()._calculate_rewards(*args)
        self.rewards.append(rewards.squeeze(1))
        return rewards

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        outputs = super()._generate_and_score_completions(inputs)
        self.advantages.append(outputs["advantages"])
        return outputs

    def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> Any:
        found = super()._get_per_token_logps_and_entropies(*args, **kwargs)
        self._found = found[0].detach()
        return found

    def _compute_loss(self, model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        loss = super()._compute_loss(model, inputs)
        assert inputs["completion_mask"].all()  # equally many actions, as unmasking steps are
        old = inputs.get("old_per_token_logps")
        found = {"log_prob": self._found, "old_log_prob": self._found if old is None else old}
        self.losses.append({**found, "advantages": inputs["advantages"], "loss": loss.detach()})
        return loss


def trained_by_trl(folder: Path, **settings: Any) -> Recording:
    vocabulary = {word: index for index, word in enumerate(WORDS)}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="[PAD]"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", eos_token="[EOS]", padding_side="left"
    )
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    special = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(WORDS), max_position_embeddings=32, **sizes, **special))
    args = GRPOConfig(
        str(folder),
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        learning_rate=3e-2,
        max_grad_norm=10.0,
        per_device_train_batch_size=8,
        num_generations=GROUP,
        num_iterations=2,
        max_steps=2,
        max_completion_length=LENGTH,
        generation_kwargs={"min_new_tokens": LENGTH},
        beta=0.0,
        **settings,
    )
    rows = Dataset.from_dict({"prompt": ["a b", "c d", "e f", "g h"]})
    trainer = Recording(model, spread, args=args, train_dataset=rows, processing_class=tokenizer)
    trainer.train()
    return trainer


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ({"loss_type": "grpo"}, {}),
        ({"loss_type": "grpo", "epsilon_high": 0.4}, {"epsilon_high": 0.4}),
        # TRL's dr_grpo divides by the longest length, which here is every length.
        ({"loss_type": "dr_grpo"}, {}),
        # TRL's epsilon_high is the largest weight itself in cispo, ours the distance from 1 as everywhere.
        ({"loss_type": "cispo", "epsilon_high": 1.1}, {"loss_type": "cispo", "epsilon_high": 0.1}),
    ],
    ids=lambda settings: "-".join(str(value) for value in settings.values()),
)
def test_the_loss_is_trls(tmp_path, theirs, ours):
    trainer = trained_by_trl(tmp_path, **theirs)
    assert len(trainer.losses) == 2
    first, second = trainer.losses
    assert torch.equal(first["log_prob"], first["old_log_prob"])
    assert (second["log_prob"] - second["old_log_prob"]).abs().max() > 0.1  # far enough for the clip to matter
    for seen in trainer.losses:
        loss, _ = policy_loss(seen["log_prob"], seen["old_log_prob"], seen["advantages"], **ours)
        torch.testing.assert_close(loss, seen["loss"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("scale_rewards", ["group", "batch", "none"])
def test_the_advantages_are_trls(tmp_path, scale_rewards):
    trainer = trained_by_trl(tmp_path, scale_rewards=scale_rewards)
    (rewards,), (theirs,) = trainer.rewards, trainer.advantages
    ours, metrics = group_advantages(rewards, GROUP, scale_rewards)
    assert metrics["frac_reward_zero_std"] == 0 and theirs.abs().max() > 0.1
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
