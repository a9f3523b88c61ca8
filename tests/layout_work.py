"""What the tests of checkpoints in several processes run: tiny distillations, one after another.

    python tests/layout_work.py write|resume FOLDER LAYOUT...

A layout is ddp, zero1, zero2 or zero3; `write` trains FOLDER/<layout> for 3 steps under each, and `resume` goes on with a
copy of FOLDER/<first layout> under each of the others, to step 4. What they find is left in FOLDER as JSON.
"""

from __future__ import annotations

import gc
import json
import resource
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState
from distributed_work import deepspeed_config, whole_state
from safetensors.torch import save_file
from tiny_models import tiny_model
from tiny_trainers import distiller
from torch import Tensor
from transformers import TrainerCallback

from marval_rl.errors import MarvalError
from marval_rl.trainers.distill import DistillTrainer
from marval_rl.training.checkpoints import checkpoints_in, damage

STEP = 3  # one that draws fresh contexts: any number of processes can go on from it
SETTINGS = {"adam_beta1": 0.9, "learning_rate": 1e-3, "auxiliary_warmup_steps": 0, "weight_decay": 0.01}


def trainer_for(folder: Path, layout: str, **settings: Any) -> DistillTrainer:
    AcceleratorState._reset_state()  # else accelerate keeps the engine's settings of the trainer before
    engine = {} if layout == "ddp" else {"deepspeed": deepspeed_config(int(layout[-1]))}
    settings = {"save_strategy": "steps", "save_steps": STEP, "lr_scheduler_type": "linear", **SETTINGS, **settings}
    return distiller(folder, tiny_model(), **settings, **engine, ddp_timeout=60)


def optimizer_states(trainer: DistillTrainer) -> dict[str, Tensor]:
    """Adam's two averages of each trained parameter, whole, and the steps by parameter group."""
    from deepspeed.utils import safe_get_full_optimizer_state

    found = {}
    for name, parameter in trainer.model.named_parameters():
        if parameter.requires_grad:
            for key in ("exp_avg", "exp_avg_sq"):
                found[f"{key}.{name}"] = safe_get_full_optimizer_state(parameter, key).detach().clone()
    return found


class AtStart(TrainerCallback):
    """Keeps what a resumed run begins with."""

    def __init__(self, trainer: DistillTrainer):
        self.trainer = trainer

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        optimizer = self.trainer.optimizer
        self.rates = [group["lr"] for group in optimizer.param_groups]
        self.decays = [group["weight_decay"] for group in optimizer.param_groups]
        self.states = whole_state(self.trainer.model)
        base = optimizer.optimizer.optimizer
        self.states |= optimizer_states(self.trainer)
        self.steps = sorted(float(state["step"]) for state in base.state.values())


def write(folder: Path, layout: str) -> dict[str, Any]:
    """Checkpoints 3, and one at which the disk is full; and what a loss that is NaN in process 1 does."""
    run = folder / layout
    trainer = trainer_for(run, layout, max_steps=STEP)
    trainer.train()
    if trainer.args.process_index == 0:
        states = whole_state(trainer.model) if layout != "zero3" else {}
    else:
        states = {}
    if layout == "zero3":
        states = whole_state(trainer.model)
    report: dict[str, Any] = {"rates": [group["lr"] for group in trainer.optimizer.param_groups]}
    if layout != "ddp":
        states |= optimizer_states(trainer)
        base = trainer.optimizer.optimizer.optimizer
        report["steps"] = sorted(float(state["step"]) for state in base.state.values())
    if trainer.args.process_index == 0:
        save_file({name: value.contiguous() for name, value in states.items()}, folder / f"{layout}.safetensors")
    return report


def fill_disk(folder: Path, layout: str) -> str:
    """Go on in a copy, where process 1 cannot write its checkpoint; what the error says."""
    run = copy_of(folder / layout, folder / f"{layout}_full")
    trainer = trainer_for(run, layout, max_steps=STEP + 1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    # Process 0 writes larger files, so process 1 has to have less room for one of its own to fail.
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000 if rank() == 1 else limits[0], limits[1]))
    try:
        trainer.train(resume_from_checkpoint=str(run / f"checkpoint-{STEP}"))
    except MarvalError as error:
        assert [damage(kept) for kept in checkpoints_in(run)] == [None]
        assert not (run / "unfinished").exists()
        return str(error)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    raise AssertionError("the disk was not full")


def spoil(folder: Path, layout: str) -> dict[str, Any]:
    """The loss of process 1 is NaN in step 1; which weights moved in each step, and the metrics."""
    trainer = trainer_for(folder / f"{layout}_nan", layout, max_steps=3, auxiliary_updates=1, save_strategy="no")
    healthy = trainer.matcher.auxiliary_loss

    def auxiliary_loss(*args: Any) -> Tensor:
        bad = trainer.state.global_step == 1 and rank() == 1
        return healthy(*args) * (torch.nan if bad else 1)

    trainer.matcher.auxiliary_loss = auxiliary_loss
    moved: list[bool] = []

    class Watch(TrainerCallback):
        def look(self) -> list[Tensor]:
            states = [*whole_state(trainer.model).values(), *whole_state(trainer.ema.module).values()]
            return states if layout == "ddp" else [*states, *optimizer_states(trainer).values()]

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.before = self.look()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            moved.append(not all(map(torch.equal, self.before, self.look())))

    trainer.add_callback(Watch())
    trainer.train()
    return {"moved": moved, "skipped": [line.get("skipped_steps") for line in trainer.state.log_history[:3]]}


def resume(folder: Path, written: str, layout: str) -> dict[str, Any]:
    """Go on under another layout by a step: what it begins with, or why it cannot."""
    run = copy_of(folder / written, folder / f"{written}_to_{layout}_{torch.distributed.get_world_size()}")
    trainer = trainer_for(run, layout, max_steps=STEP + 1)
    start = AtStart(trainer)
    if layout != "ddp":
        trainer.add_callback(start)
    try:
        trainer.train(resume_from_checkpoint=str(run / f"checkpoint-{STEP}"))
    except MarvalError as error:
        return {"refused": str(error)}
    if layout == "ddp":
        return {"steps": trainer.state.global_step}
    save_file({name: value.contiguous() for name, value in start.states.items()}, run / "begins_with.safetensors")
    return {"run": str(run), "rates": start.rates, "steps": start.steps, "decays": start.decays}


def copy_of(run: Path, target: Path) -> Path:
    if rank() == 0:
        shutil.copytree(run, target)
    torch.distributed.barrier()
    return target


def rank() -> int:
    return torch.distributed.get_rank()


def main() -> None:
    what, folder, layouts = sys.argv[1], Path(sys.argv[2]), sys.argv[3:]
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    reports: dict[str, Any] = {}
    for layout in layouts:
        if what == "write":
            reports[layout] = write(folder, layout)
            gc.collect()
            reports[layout]["full"] = fill_disk(folder, layout)
            gc.collect()
            reports[layout]["spoilt"] = spoil(folder, layout)
        elif layout != layouts[0]:
            reports[layout] = resume(folder, layouts[0], layout)
        gc.collect()  # the engine and its trainer refer to each other
    (folder / f"{what}_{layouts[0]}_{rank()}.json").write_text(json.dumps(reports))


if __name__ == "__main__":
    main()
