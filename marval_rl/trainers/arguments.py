"""Training arguments that all four trainers share."""

# No `from __future__ import annotations`: the command-line parser reads the field types.

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import timedelta
from typing import ClassVar

import torch
from transformers import IntervalStrategy, TrainingArguments
from transformers.integrations.deepspeed import unset_hf_deepspeed_config
from transformers.trainer_utils import SaveStrategy
from transformers.utils.generic import strtobool

from marval_rl.launched import SIZE_VARIABLES, check_company, launched_processes
from marval_rl.models import MaskedConfig
from marval_rl.models.unmasking import MASK_LAWS, draw_num_masked
from marval_rl.paths import deepspeed_config
from marval_rl.runtime.settings import EVALUATED, Conditions, Needs, check_python, setting

# Newer versions of transformers have both names, older ones the first alone.
_CHECKPOINTING = tuple(
    name
    for name in ("gradient_checkpointing", "activation_checkpointing")
    if name in TrainingArguments.__dataclass_fields__
)

_PLANNED_PROCESSES: ContextVar[int | None] = ContextVar("planned_processes", default=None)
GPU_PRECISIONS = ("bf16", "fp16", "tf32")


@contextmanager
def planned_for(num_processes: int) -> Iterator[None]:
    """Within this context arguments are those of a dry run: they count with this many processes, although there is
    one, and neither look for GPUs nor for the other processes."""
    token = _PLANNED_PROCESSES.set(num_processes)
    try:
        yield
    finally:
        _PLANNED_PROCESSES.reset(token)


def accelerator_here() -> str | None:
    """The kind of accelerator of this machine, such as "cuda" or "mps"; None without one."""
    device = torch.accelerator.current_accelerator(check_available=True)
    return None if device is None else device.type


def only_cpu_here(num_processes: int) -> bool:
    """Whether so many processes can meet on the CPU only. Processes on Apple's GPU (mps) cannot exchange tensors."""
    return accelerator_here() is None or (num_processes > 1 and accelerator_here() == "mps")


@dataclass
class MaskingArguments:
    """How many tokens a training step masks; see `draw_num_masked`."""

    mask_ratio_min: float = setting(0.7, "Smallest share of tokens masked.")
    mask_ratio_std: float = setting(0.25, "Deviation of the truncated normal of mask ratios.")
    mask_law: str | None = setting(
        None,
        "Law of the mask ratio: truncated_normal (MAR's) or arccos (MaskGen's), which reads no other "
        "setting (default: the model's own).",
        MASK_LAWS,
    )

    def draw_num_masked(self, config: MaskedConfig) -> int:
        """How many tokens of a model's images a step masks.

        Raises:
            ValueError: For a ratio that was set beside a law that does not read it.
        """
        law = self.mask_law or config.mask_law
        ratios = (self.mask_ratio_min, self.mask_ratio_std)
        defaults = tuple(
            MaskingArguments.__dataclass_fields__[name].default for name in ("mask_ratio_min", "mask_ratio_std")
        )
        if law != "truncated_normal" and ratios != defaults:
            raise ValueError(
                f"mask_ratio_min {ratios[0]} and mask_ratio_std {ratios[1]} count only with mask_law truncated_normal, "
                f"and this model's is {law}: set mask_law, or leave them out"
            )
        return draw_num_masked(config.num_tokens, *ratios, law=law)

    counts_if: ClassVar[Conditions] = {
        Needs("a mask_ratio_min below 1", ("mask_ratio_min",), lambda ratio: ratio != 1): ("mask_ratio_std",),
    }


@dataclass
class MARTrainingArguments(TrainingArguments):
    """`transformers.TrainingArguments` with the defaults and options of this library's trainers."""

    max_steps: int = setting(1000, "Optimizer steps; -1: num_train_epochs over the data.")
    logging_steps: float = setting(10, "Write metrics every this many steps.")
    save_strategy: SaveStrategy | str = setting("steps", '"no", "steps" or "epoch".')
    save_steps: float = setting(200, "Write a checkpoint every this many steps.")
    save_total_limit: int | None = setting(2, "Keep this many checkpoints.")
    eval_strategy: IntervalStrategy | str = setting("steps", '"no", "steps" or "epoch".')
    eval_steps: float | None = setting(200, "Generate and judge images every this many steps.")
    eval_on_start: bool = setting(True, "Evaluate before the first step: the starting point.")
    report_to: None | str | list[str] = setting(  # noqa: RUF036 - the order that the argument parser takes apart
        "none", 'Trackers as in transformers ("wandb", "tensorboard", ...); none by default.'
    )
    seed: int = setting(0, "Seed of initialisation, data order and all noise.")
    max_grad_norm: float = setting(1.0, "Clip the global gradient norm.")
    remove_unused_columns: bool = setting(False, "Kept False: columns are passed to rewards.")
    dataloader_pin_memory: bool = setting(False, "Pin batches in page-locked memory.")
    overwrite_output_dir: bool = setting(False, "Delete an earlier run in output_dir first.")
    max_skipped_steps: int = setting(
        10, "Skip this many steps in a row whose loss or gradient is not finite; one more ends the run."
    )
    torch_compile: bool = setting(
        False, "Compile the transformer blocks, which takes minutes at the start; for GPUs, and not under ZeRO-3."
    )
    torch_compile_backend: str | None = setting(
        None, "What compiles them, by torch.compile's names (default: inductor)."
    )
    profile: int = setting(0, "Trace this many steps after the first, and print what their time went into; 0 for none.")
    ema_decay: float = setting(0.999, "Decay of the weight average that is sampled and saved.")
    eval_num_images: int = setting(500, "Images generated at each evaluation.")
    eval_batch_size: int = setting(250, "Images generated at once in evaluation.")
    eval_unmasking_steps: int = setting(16, "K, unmasking steps in evaluation.")
    eval_seed: int = setting(1234, "Seed of evaluation: the same images at every step.")
    eval_redraws: int = setting(
        1, "Sets of images at each evaluation: the figures are means, with their deviations as <name>/std."
    )
    sample_grid_columns: int = setting(10, "Images per class in the sample grids.")

    counts_if: ClassVar[Conditions] = {
        EVALUATED: (
            *(
                "eval_on_start",
                "eval_num_images",
                "eval_batch_size",
                "eval_unmasking_steps",
                "eval_seed",
                "eval_redraws",
            ),
            *("eval_delay", "sample_grid_columns"),
        ),
        Needs("eval_strategy steps", ("eval_strategy",), lambda s: s == "steps", in_python=False): ("eval_steps",),
        Needs("save_strategy steps", ("save_strategy",), lambda s: s == "steps", in_python=False): ("save_steps",),
        Needs("logging_strategy steps", ("logging_strategy",), lambda s: s == "steps"): ("logging_steps",),
        Needs("max_steps -1", ("max_steps",), lambda n: n == -1): ("num_train_epochs",),
        Needs("another lr_scheduler_type than constant", ("lr_scheduler_type",), lambda s: s != "constant"): (
            "warmup_steps",
        ),
        Needs("an lr_scheduler_type that takes some", ("lr_scheduler_type",), lambda s: "constant" not in s): (
            "lr_scheduler_kwargs",
        ),
        Needs("an optim of the kind adamw", ("optim",), lambda s: s.startswith("adamw")): (
            *("adam_beta1", "adam_beta2", "adam_epsilon"),
        ),
        Needs("optim sgd, adagrad or rmsprop", ("optim",), lambda s: s in ("sgd", "adagrad", "rmsprop")): (
            "optim_args",
        ),
        Needs("gradient_checkpointing", _CHECKPOINTING, lambda *values: any(values)): (
            *("gradient_checkpointing_kwargs", "activation_checkpointing_kwargs"),
        ),
        Needs("torch_compile true", ("torch_compile",), bool): ("torch_compile_backend",),
        Needs("a tracker in report_to", ("report_to",), lambda t: t not in (None, "none", [], ["none"])): ("run_name",),
        Needs("report_to trackio", ("report_to",), lambda t: "trackio" in (t or ())): (
            *("project", "trackio_space_id", "trackio_bucket_id", "trackio_static_space_id"),
        ),
    }

    @property
    def evaluates(self) -> bool:
        """Whether images are ever generated and measured."""
        return self.eval_strategy != "no" or self.eval_on_start

    @property
    def rows_per_batch(self) -> int:
        """Rows of the data set in a batch."""
        return self.per_device_train_batch_size

    @property
    def precision(self) -> str:
        """What the forward passes of training compute in."""
        return "bf16" if self.bf16 else "fp16" if self.fp16 else "float32"

    @property
    def world_size(self) -> int:
        """Processes of the run; in a dry run those that it is planned for."""
        return _PLANNED_PROCESSES.get() or super().world_size

    @property
    def num_readers(self) -> int:
        """Processes among which the batches are distributed."""
        return self.world_size

    @property
    def cycle(self) -> int:
        """Steps of which the first reads data and may move the model; the others train a network beside it."""
        return 1

    def starts_cycle(self, step: int) -> bool:
        """Whether the step with this index reads data."""
        return step % self.cycle == 0

    def moves_model(self, step: int) -> bool:
        """Whether the step with this index moves the model that is averaged and saved."""
        return self.starts_cycle(step)

    def batch_pattern(self) -> list[bool]:
        """Over the micro-steps, repeated: whether one reads a batch, or continues with what an earlier one read."""
        accumulation = self.gradient_accumulation_steps
        return [True] * accumulation + [False] * accumulation * (self.cycle - 1)

    def __post_init__(self):
        check_python(self)
        if self.eval_strategy == "no":
            self.eval_on_start = False
        for what in ("eval", "save"):  # transformers would evaluate every logging_steps, and never save
            if getattr(self, f"{what}_strategy") == "steps" and not (getattr(self, f"{what}_steps") or 0) > 0:
                raise ValueError(
                    f'{what}_steps must be positive, not {getattr(self, f"{what}_steps")}; {what}_strategy "no" does '
                    "without"
                )
        self.deepspeed = deepspeed_config(self.deepspeed)  # type: ignore[has-type]
        self._heed_accelerate()
        if _PLANNED_PROCESSES.get() is None:
            self._find_devices()
            super().__post_init__()
            check_company(self.world_size)
            # One process uses one GPU: nn.DataParallel, which transformers would choose for the others, would split
            # the batches that the trainers count on.
            self._n_gpu = min(self._n_gpu, 1)  # type: ignore[has-type]
        else:
            self._plan()
        if self.data_seed is None:  # type: ignore[has-type]
            self.data_seed = self.seed  # else the order of the data would depend on the state of the global generator
        # Under ZeRO-3 transformers would load every model in parts from here on, the teacher and the rewards too. All
        # models are made complete; the engine partitions the one that it trains.
        unset_hf_deepspeed_config()
        if self.torch_compile and self._zero_stage() == 3:
            raise ValueError(
                "torch_compile does not work under ZeRO-3, whose blocks have no weights until they run: leave it out, "
                "or use ZeRO-2"
            )
        for name in ("eval_num_images", "eval_batch_size", "sample_grid_columns"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.max_steps < 1 and self.max_steps != -1:
            raise ValueError(
                f"max_steps must be at least 1, not {self.max_steps}; -1 trains num_train_epochs passes over the data"
            )

    def _zero_stage(self) -> int | None:
        """The stage of ZeRO that `deepspeed` or `accelerate launch` says; None without one."""
        if self.deepspeed is not None:
            return self.deepspeed.get("zero_optimization", {}).get("stage")
        return None if self.deepspeed_plugin is None else self.deepspeed_plugin.zero_stage

    def _heed_accelerate(self) -> None:
        """What `accelerate launch` says in the environment counts as if it were said here."""
        precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
        if precision not in ("no", "bf16", "fp16"):
            raise ValueError(f"accelerate's mixed_precision {precision} is not supported: use bf16, fp16 or no")
        if precision != "no" and not (self.bf16 or self.fp16):
            setattr(self, precision, True)
        if strtobool(os.environ.get("ACCELERATE_USE_CPU", "false")):
            self.use_cpu = True

    def _find_devices(self) -> None:
        """Before any work: the CPU and gloo where there is nothing else, or a refusal."""
        num_processes = launched_processes()
        problem = self.missing_gpu()
        if problem is not None:
            raise ValueError(problem)
        self.use_cpu = self.use_cpu or only_cpu_here(num_processes)
        local, num_gpus = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), torch.cuda.device_count()
        uses_nccl = not self.use_cpu and accelerator_here() == "cuda" and self.ddp_backend != "gloo"
        if uses_nccl and local > num_gpus:
            raise ValueError(
                f"{local} processes were started on this machine, which has {num_gpus} GPU(s), and each needs one of "
                "its own: start fewer, or --use_cpu true"
            )
        # On the CPU transformers forgets ddp_timeout where it makes the group: a hanging process would hold up the
        # others for half an hour.
        if self.use_cpu and "WORLD_SIZE" in os.environ and num_processes > 1 and not torch.distributed.is_initialized():
            torch.distributed.init_process_group("gloo", timeout=timedelta(seconds=self.ddp_timeout))

    def missing_gpu(self) -> str | None:
        """Returns which precision this machine cannot compute in, with the remedy; None if it can."""
        needing = ("fp16", "tf32") if self.use_cpu else GPU_PRECISIONS
        asked = [name for name in needing if vars(self)[name]]
        if not asked or not (self.use_cpu or accelerator_here() is None):
            return None
        names, remedy = " and ".join(asked), " ".join(f"--{name} false" for name in asked)
        if os.environ.get("ACCELERATE_MIXED_PRECISION") in asked:
            remedy += " (and mixed_precision no for accelerate)"
        if self.use_cpu:
            return f"{names} needs a GPU, and use_cpu is true: add {remedy}"
        return f"this recipe asks for {names} on a GPU; here is none: --use_cpu true {remedy} to try it slowly"

    def _plan(self) -> None:
        """transformers' own checks and defaults, without those of this machine's devices and processes."""
        looked_for = ("use_cpu", "tf32", "deepspeed")
        asked = {name: vars(self)[name] for name in looked_for}
        self.use_cpu, self.tf32, self.deepspeed = True, None, None
        hidden = {name: os.environ.pop(name) for name in (*SIZE_VARIABLES, "LOCAL_RANK") if name in os.environ}
        try:
            super().__post_init__()
        finally:
            os.environ.update(hidden)
            for name, value in asked.items():
                setattr(self, name, value)
