"""Training arguments that all four trainers share."""

# No `from __future__ import annotations`: the command-line parser reads the field types.

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from datetime import timedelta

import torch
from transformers import IntervalStrategy, TrainingArguments
from transformers.integrations.deepspeed import unset_hf_deepspeed_config
from transformers.trainer_utils import SaveStrategy

from marval_rl.training.presets import deepspeed_config

_PLANNED_PROCESSES: ContextVar[int | None] = ContextVar("planned_processes", default=None)


@contextmanager
def planned_for(num_processes: int) -> Iterator[None]:
    """Within this context arguments count with this many processes, although there is one: for a dry run."""
    token = _PLANNED_PROCESSES.set(num_processes)
    try:
        yield
    finally:
        _PLANNED_PROCESSES.reset(token)


def cycle_pattern(accumulation: int, cycle: int) -> list[bool]:
    """Batches are read in the first of each `cycle` steps, in all of its micro-steps."""
    return [True] * accumulation + [False] * accumulation * (cycle - 1)


@dataclass
class MARTrainingArguments(TrainingArguments):
    """`transformers.TrainingArguments` with the defaults and options of this library's trainers."""

    max_steps: int = field(default=1000, metadata={"help": "Optimizer steps; -1: num_train_epochs over the data."})
    logging_steps: float = field(default=10, metadata={"help": "Write metrics every this many steps."})
    save_strategy: SaveStrategy | str = field(default="steps", metadata={"help": '"no", "steps" or "epoch".'})
    save_steps: float = field(default=200, metadata={"help": "Write a checkpoint every this many steps."})
    save_total_limit: int | None = field(default=2, metadata={"help": "Keep this many checkpoints."})
    eval_strategy: IntervalStrategy | str = field(default="steps", metadata={"help": '"no" or "steps".'})
    eval_steps: float | None = field(default=200, metadata={"help": "Generate and judge images every this many steps."})
    eval_on_start: bool = field(default=True, metadata={"help": "Evaluate before the first step: the starting point."})
    report_to: None | str | list[str] = field(  # noqa: RUF036 - the order that the argument parser takes apart
        default="none", metadata={"help": 'Trackers as in transformers ("wandb", "tensorboard", ...); none by default.'}
    )
    seed: int = field(default=0, metadata={"help": "Seed of initialisation, data order and all noise."})
    max_grad_norm: float = field(default=1.0, metadata={"help": "Clip the global gradient norm."})
    remove_unused_columns: bool = field(default=False, metadata={"help": "Kept False: columns are passed to rewards."})
    dataloader_pin_memory: bool = field(default=False, metadata={"help": "Pin batches in page-locked memory."})
    overwrite_output_dir: bool = field(default=False, metadata={"help": "Delete an earlier run in output_dir first."})
    max_skipped_steps: int = field(
        default=10,
        metadata={"help": "Skip so many steps in a row whose loss or gradient is not finite; one more ends the run."},
    )
    ema_decay: float = field(default=0.999, metadata={"help": "Decay of the weight average that is sampled and saved."})
    eval_num_images: int = field(default=500, metadata={"help": "Images generated at each evaluation."})
    eval_batch_size: int = field(default=250, metadata={"help": "Images generated at once in evaluation."})
    eval_unmasking_steps: int = field(default=16, metadata={"help": "K, unmasking steps in evaluation."})
    eval_seed: int = field(default=1234, metadata={"help": "Seed of evaluation: the same images at every step."})
    sample_grid_columns: int = field(default=10, metadata={"help": "Images a class in the sample grids."})

    @property
    def rows_per_batch(self) -> int:
        """Rows of the data set in a batch."""
        return self.per_device_train_batch_size

    @property
    def world_size(self) -> int:
        """Processes of the run; in a dry run those that it is planned for."""
        return _PLANNED_PROCESSES.get() or super().world_size

    @property
    def num_readers(self) -> int:
        """Processes among which the batches are dealt out."""
        return self.world_size

    def batch_pattern(self) -> list[bool]:
        """Over the micro-steps, repeated: whether one reads a batch, or goes on with what an earlier one read."""
        return cycle_pattern(self.gradient_accumulation_steps, 1)

    def __post_init__(self):
        self.deepspeed = deepspeed_config(self.deepspeed)
        # On the CPU transformers forgets ddp_timeout where it makes the group: a hanging process would hold up the
        # others for half an hour.
        if self.use_cpu and int(os.environ.get("WORLD_SIZE", 1)) > 1 and not torch.distributed.is_initialized():
            torch.distributed.init_process_group("gloo", timeout=timedelta(seconds=self.ddp_timeout))
        super().__post_init__()
        if self.data_seed is None:
            self.data_seed = self.seed  # else the order of the data would hang on the state of the global generator
        # Under ZeRO-3 transformers would load every model in parts from here on, the teacher and the rewards too. All
        # models are made whole; the engine takes apart the one that it trains.
        unset_hf_deepspeed_config()
        if self.max_steps < 1 and self.max_steps != -1:
            raise ValueError(
                f"max_steps must be at least 1, not {self.max_steps}; -1 trains num_train_epochs passes over the data"
            )
