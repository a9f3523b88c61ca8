"""Which rows of the data a process reads in which micro-step: a function of (seed, epoch, process) alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch.utils.data import DataLoader, Sampler, default_collate

from marval_rl.randomness import derive_seed

REUSE = {"reuse": True}  # stands in for a batch in micro-steps that continue with what an earlier one read


@runtime_checkable
class EpochAware(Protocol):
    """A data set whose augmentations depend on the epoch."""

    def set_epoch(self, epoch: int) -> None:
        """Called before each pass over the data."""


class EpochBatches(Sampler[list[int]]):
    """Batches of row indices for one process, in an order drawn from (seed, epoch); incomplete batches are dropped.

    Args:
        dataset: What is read; told of each epoch if it is `EpochAware`.
        batch_size: Rows per batch.
        seed: Of the order.
        rank, world_size: This process, and how many there are; their batches do not overlap.
        pattern: Repeats over the micro-steps: True reads a batch, False yields an empty one (see `REUSE`). An epoch is
            a whole number of patterns.

    Raises:
        ValueError: If the data cannot fill one pattern.
    """

    def __init__(self, dataset: Any, batch_size: int, seed: int, rank: int, world_size: int, pattern: Sequence[bool]):
        self.dataset = dataset
        self.batch_size = batch_size
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.pattern = list(pattern)
        self.rounds = rounds_in(len(dataset), batch_size * world_size, self.pattern)
        if self.rounds == 0:
            raise ValueError(
                f"train_dataset has {len(dataset)} rows, but {batch_size * world_size * sum(self.pattern)} are needed: "
                f"{batch_size} a batch x {world_size} processes x {sum(self.pattern)} batches read before one is reused"
                "; give more rows (with classes as prompts: prompts_per_class), or set a smaller "
                "per_device_train_batch_size or gradient_accumulation_steps"
            )
        self.set_epoch(0)

    def __len__(self) -> int:
        return self.rounds * len(self.pattern)

    def set_epoch(self, epoch: int) -> None:
        """Choose the order, and tell the data set."""
        self.epoch = epoch
        if isinstance(self.dataset, EpochAware):
            self.dataset.set_epoch(epoch)

    def __iter__(self) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed(derive_seed(self.seed, "order", self.epoch))
        order = torch.randperm(len(self.dataset), generator=generator)
        batches = order[: len(order) // self.batch_size * self.batch_size].view(-1, self.batch_size)
        mine = iter(batches[self.rank :: self.world_size])
        for _ in range(self.rounds):
            for reads in self.pattern:
                yield next(mine).tolist() if reads else []


def rounds_in(num_rows: int, rows_per_batch: int, pattern: Sequence[bool]) -> int:
    """How often an epoch of `num_rows` goes through the pattern; rows_per_batch over all processes."""
    return num_rows // rows_per_batch // sum(pattern)


def epoch_loader(
    batches: EpochBatches, collate: Callable[[list[Any]], Any] = default_collate, num_workers: int = 0, **options: Any
) -> DataLoader:
    """A loader of these batches; `REUSE` where one is empty. Workers live for one epoch, so that they know which."""
    return DataLoader(
        batches.dataset,
        batch_sampler=batches,
        collate_fn=_CollateOrReuse(collate),
        num_workers=num_workers,
        **options,
    )


class _CollateOrReuse:
    """A class, not a closure: workers that are spawned receive it by pickle."""

    def __init__(self, collate: Callable[[list[Any]], Any]):
        self.collate = collate

    def __call__(self, rows: list[Any]) -> Any:
        return self.collate(rows) if rows else REUSE
