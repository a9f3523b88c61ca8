"""Prompts as conditions: the text features of a list of prompts, which a model looks up by index."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Self

import torch
from torch import Tensor

MAX_BYTES_ON_DEVICE = 2**31  # of larger tables only the rows of a batch leave the main memory


@dataclass(eq=False)
class PromptFeatures:
    """The text features of N prompts and of the empty one, which is the last row of each table.

    Generator and decoder read different layers of the text tower; see `TextTower`. Not part of a model's weights: a
    rollout keeps the indices of its prompts only. Copies of a model share them.

    Attributes:
        prompts: The N prompts.
        tokens: [N + 1, T, W], features of each position for the generator (the last but one layer).
        pooled: [N + 1, W], of the whole prompt.
        decoder: [N + 1, T, W], features of each position for the tokenizer's decoder; None where it reads no text.
        scores: [N] aesthetic scores; None for the model's default.
    """

    prompts: list[str]
    tokens: Tensor
    pooled: Tensor
    decoder: Tensor | None = None
    scores: Tensor | None = None
    _placed: dict[tuple[str, torch.device], Tensor] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        tables = {"tokens": self.tokens, "pooled": self.pooled}
        if self.decoder is not None:
            tables["decoder"] = self.decoder
        for name, table in tables.items():
            if len(table) != len(self.prompts) + 1:
                raise ValueError(
                    f"{name} holds {len(table)} rows for {len(self.prompts)} prompts: one each is needed, and a last "
                    "one for the empty prompt"
                )
        if self.tokens.ndim != 3 or self.pooled.ndim != 2 or self.tokens.shape[-1] != self.pooled.shape[-1]:
            raise ValueError(
                f"tokens must be [N + 1, T, W] and pooled [N + 1, W], not {list(self.tokens.shape)} and "
                f"{list(self.pooled.shape)}"
            )
        if self.scores is not None and self.scores.shape != (len(self.prompts),):
            raise ValueError(f"scores must be [{len(self.prompts)}], not {list(self.scores.shape)}")

    def __len__(self) -> int:
        return len(self.prompts)

    def __deepcopy__(self, memo: object) -> Self:
        return self

    def rows(self, name: str, index: Tensor | None, batch_size: int, device: torch.device) -> Tensor:
        """Rows of a table on `device`, in its own precision: [B, ...].

        Args:
            name: "tokens", "pooled" or "decoder".
            index: int64 [B], N for the empty prompt; None for the empty prompt only.
            batch_size: B, where index is None.
            device: Where the rows are needed.
        """
        table = self._on(name, device)
        if index is None:
            return table[-1:].to(device).expand(batch_size, *table.shape[1:])
        return table[index.to(table.device)].to(device)

    def scores_of(self, index: Tensor | None, batch_size: int, default: float, device: torch.device) -> Tensor:
        """Aesthetic scores, float32 [B]."""
        if self.scores is None or index is None:
            return torch.full((batch_size,), default, device=device)
        return self._on("scores", device)[index.to(device)].float()

    def _on(self, name: str, device: torch.device) -> Tensor:
        table: Tensor = getattr(self, name)
        if table.device == device or table.nbytes > MAX_BYTES_ON_DEVICE:
            return table
        if (name, device) not in self._placed:
            self._placed[name, device] = table.to(device)
        return self._placed[name, device]


def blank_prompts(num_prompts: int, length: int, width: int) -> PromptFeatures:
    """Features that say nothing, for plans of memory."""
    rows = num_prompts + 1
    tokens = torch.zeros(rows, length, width)
    return PromptFeatures([f"prompt {i}" for i in range(num_prompts)], tokens, torch.zeros(rows, width), tokens)
