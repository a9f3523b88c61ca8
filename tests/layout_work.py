"""What the tests of checkpoints do in several processes: tiny distillations, one after another.

A layout is ddp, zero1, zero2 or zero3, under as many processes as there are. The task LAYOUT trains a run in
FOLDER/<layout>, with its end in FOLDER/<layout>.safetensors, and then tries a full disk and a loss that is NaN. The
task WRITTEN:LAYOUT continues from the checkpoint of FOLDER/<written> under another layout. What each process found is
left in FOLDER/found_<processes>_<rank>.json, by task.
"""

from __future__ import annotations

import gc
import json
import resource
import shutil
import signal
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState
from distributed_work import deepspeed_config, equal, optimizer_state, whole_state
from safetensors.torch import save_file
from tiny_models import tiny_model
from tiny_trainers import distiller
from torch import Tensor
from transformers import TrainerCallback

from marval_rl.errors import MarvalError
from marval_rl.runtime.checkpoints import checkpoints_in, find_problem
from marval_rl.trainers.distill import DistillTrainer

STEP = 3  # one that draws fresh contexts: any number of processes can continue from it
SETTINGS = {
    "max_steps": STEP + 2,
    "adam_beta1": 0.9,
    "adam_epsilon": 1e-4,  # else the last digits of a gradient near zero decide where Adam goes
    "learning_rate": 1e-3,
    "weight_decay": 0.01,
    "lr_scheduler_type": "linear",
    "auxiliary_warmup_steps": 0,
    "save_strategy": "steps",
    "save_steps": STEP,
    "save_total_limit": None,
    "ddp_timeout": 120,
}


def trainer_for(folder: Path, layout: str, **settings: Any) -> DistillTrainer:
    AcceleratorState._reset_state()  # else accelerate keeps the engine's settings of the trainer before
    engine = {} if layout == "ddp" else {"deepspeed": deepspeed_config(int(layout[-1]))}
    return distiller(folder, tiny_model(), **{**SETTINGS, **engine, **settings})


def write(folder: Path, layout: str) -> None:
    """A checkpoint, and the end of the run."""
    trainer = trainer_for(folder / layout, layout)
    trainer.train()
    save_states(trainer, folder / f"{layout}.safetensors")


def fill_disk(folder: Path, layout: str) -> str:
    """Continue in a copy where process 1 cannot write its checkpoint; returns the error's text."""
    run = copy_of(folder / layout, folder / f"{layout}_full")
    trainer = trainer_for(run, layout)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    # Process 0 writes larger files, so process 1 has to have less room for one of its own to fail.
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000 if rank() == 1 else limits[0], limits[1]))
    try:
        trainer.train(resume_from_checkpoint=str(run / f"checkpoint-{STEP}"))
    except MarvalError as error:
        assert [find_problem(kept) for kept in checkpoints_in(run)] == [None]
        assert not (run / "unfinished").exists()
        return str(error)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    raise AssertionError("the disk was not full")


def spoil(folder: Path, layout: str) -> dict[str, Any]:
    """The loss of process 1 is NaN in step 1; which weights moved in each step, and the metrics."""
    trainer = trainer_for(folder / f"{layout}_nan", layout, max_steps=3, auxiliary_updates=1, save_strategy="no")
    healthy = trainer.matching.auxiliary_loss

    def auxiliary_loss(*args: Any) -> Tensor:
        bad = trainer.state.global_step == 1 and rank() == 1
        return healthy(*args) * (torch.nan if bad else 1)

    trainer.matching.auxiliary_loss = auxiliary_loss
    moved: list[bool] = []

    class Watch(TrainerCallback):
        def look(self) -> list[Tensor]:
            states = optimizer_state(trainer, "model") + optimizer_state(trainer, "auxiliary")
            return [*states, *whole_state(trainer.model).values(), *whole_state(trainer.ema.module).values()]

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.before = self.look()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            moved.append(not equal(self.before, self.look()))

    trainer.add_callback(Watch())
    trainer.train()
    return {"moved": moved, "skipped": [line.get("skipped_steps") for line in trainer.state.log_history[:3]]}


def resume(folder: Path, written: str, layout: str) -> str | None:
    """Resume under another layout, to the end; returns why it cannot, or None."""
    target = folder / f"{written}_to_{layout}_{world_size()}"
    run = copy_of(folder / written, target)
    # All draw and read the same, however many processes there are.
    trainer = trainer_for(run, layout, gradient_accumulation_steps=2 // world_size())
    try:
        trainer.train(resume_from_checkpoint=str(run / f"checkpoint-{STEP}"))
    except MarvalError as error:
        return str(error)
    save_states(trainer, target.with_suffix(".safetensors"))
    return None


def save_states(trainer: DistillTrainer, path: Path) -> None:
    states = {"model": whole_state(trainer.model), "average": whole_state(trainer.ema.module)}
    if rank() == 0:
        flat = {f"{part}.{name}": value for part, state in states.items() for name, value in state.items()}
        save_file({name: value.contiguous() for name, value in flat.items()}, path)


def copy_of(run: Path, target: Path) -> Path:
    """The run as it was when it had written the checkpoint."""
    if rank() == 0:
        shutil.copytree(run / f"checkpoint-{STEP}", target / f"checkpoint-{STEP}")
    torch.distributed.barrier()
    return target


def rank() -> int:
    return torch.distributed.get_rank()


def world_size() -> int:
    return torch.distributed.get_world_size()


def work(folder: Path, tasks: tuple[str, ...]) -> None:
    """One of the processes; each task in its turn."""
    torch.distributed.init_process_group("gloo")
    found: dict[str, Any] = {}
    for task in tasks:
        if ":" in task:
            found[task] = resume(folder, *task.split(":"))
        else:
            write(folder, task)
            gc.collect()  # the engine and its trainer refer to each other
            found[task] = {"full": fill_disk(folder, task)}
            gc.collect()
            found[task] |= spoil(folder, task)
        gc.collect()
    (folder / f"found_{world_size()}_{rank()}.json").write_text(json.dumps(found))
    torch.distributed.destroy_process_group()
