"""The order in which processes read the data."""

from __future__ import annotations

from itertools import chain

import pytest
import torch
from torch.utils.data import Dataset

from marval_rl.trainers.batches import REUSE, EpochBatches, epoch_loader
from marval_rl.trainers.grpo import MARGRPOConfig


def batches_of(count: int, batch_size: int = 3, rank: int = 0, world_size: int = 1, pattern=(True,)) -> EpochBatches:
    return EpochBatches(list(range(count)), batch_size, 7, rank, world_size, pattern)


def flat(batches: EpochBatches) -> list[int]:
    return list(chain.from_iterable(batches))


def test_an_epoch_reads_every_row_once_and_drops_what_fills_no_batch():
    rows = flat(batches_of(14))
    assert len(rows) == len(set(rows)) == 12
    assert set(rows) < set(range(14))


def test_the_order_is_a_function_of_seed_and_epoch():
    batches = batches_of(30)
    first = list(batches)
    assert list(batches) == first == list(batches_of(30))
    batches.set_epoch(1)
    assert list(batches) != first
    assert list(EpochBatches(list(range(30)), 3, 8, 0, 1, [True])) != first


def test_processes_share_the_rows_without_overlap():
    parts = [flat(batches_of(30, rank=rank, world_size=2)) for rank in range(2)]
    assert len(parts[0]) == len(parts[1]) == 15
    assert sorted(parts[0] + parts[1]) == list(range(30))
    alone = list(batches_of(30))
    assert [alone[0], alone[1]] == [next(iter(batches_of(30, rank=rank, world_size=2))) for rank in range(2)]


def test_a_pattern_reads_a_batch_and_reuses_it_and_an_epoch_holds_whole_patterns():
    batches = batches_of(15, pattern=[True, True, False, False])  # 5 batches: two patterns of two
    read = list(batches)
    assert len(batches) == len(read) == 8
    assert [bool(batch) for batch in read] == [True, True, False, False] * 2
    assert [batch for batch in read if batch] == list(batches_of(15))[:4]


def test_the_loader_hands_out_a_sign_where_a_batch_is_reused():
    loader = epoch_loader(batches_of(6, pattern=[True, False]), torch.tensor)
    first, second, *_ = loader
    assert first.shape == (3,)
    assert second == REUSE


def test_a_data_set_receives_the_epoch():
    class Flips(Dataset):
        def __len__(self) -> int:
            return 6

        def set_epoch(self, epoch: int) -> None:
            epochs.append(epoch)

    epochs = []
    EpochBatches(Flips(), 3, 0, 0, 1, [True]).set_epoch(4)
    assert epochs == [0, 4]


def test_too_few_rows_are_refused_with_the_arithmetic():
    with pytest.raises(ValueError, match="has 11 rows, but 12 are needed: 3 a batch x 2 processes x 2 batches"):
        batches_of(11, world_size=2, pattern=[True, True, False])


@pytest.mark.parametrize(
    ("accumulation", "steps_per_generation", "num_iterations", "cycle", "pattern"),
    [
        (1, 1, 1, 1, "R"),
        (2, 2, 1, 1, "R."),
        (1, 2, 2, 1, "R..."),
        (2, 1, 1, 1, "RR"),  # two rollouts a step
        (2, 3, 1, 1, "R..R.."),  # a rollout begins in the middle of a step
        (1, 2, 1, 3, "R....."),  # an anchor's steps in between read nothing
    ],
)
def test_grpo_reads_rows_where_a_rollout_begins(
    tmp_path, accumulation, steps_per_generation, num_iterations, cycle, pattern
):
    config = MARGRPOConfig(
        str(tmp_path),
        per_device_train_batch_size=4,
        num_generations=4,
        gradient_accumulation_steps=accumulation,
        steps_per_generation=steps_per_generation,
        num_iterations=num_iterations,
        **({"gsim_weight": 1.0, "auxiliary_updates": cycle} if cycle > 1 else {}),
    )
    assert "".join("R" if reads else "." for reads in config.batch_pattern()) == pattern
