"""What tests/test_text_zero.py does in each process: a tiny distillation of a model of text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from distributed_work import deepspeed_config, whole_state
from safetensors.torch import save_file
from tiny_text import text_model
from tiny_trainers import distiller

SETTINGS = {
    "max_steps": 4,
    "adam_beta1": 0.9,
    "adam_epsilon": 1e-4,  # else the last digits of a gradient near zero decide where Adam goes
    "learning_rate": 1e-3,
    "auxiliary_warmup_steps": 0,
    "auxiliary_updates": 2,
    "guidance_scale": 3.0,
    "guidance_schedule": "linear",
    "ddp_timeout": 120,
}


def run(folder: Path, **settings: Any) -> None:
    """Trains, and leaves the networks and the average beside the folder."""
    trainer = distiller(folder, text_model(1), **{**SETTINGS, **settings})
    trainer.train()
    states = {"model": whole_state(trainer.model), "average": whole_state(trainer.ema.module)}
    flat = {f"{part}.{name}": value.contiguous() for part, state in states.items() for name, value in state.items()}
    if trainer.args.process_index == 0:
        save_file(flat, folder.with_suffix(".safetensors"))


def work(folder: Path) -> None:
    """One of two processes under ZeRO-2."""
    torch.distributed.init_process_group("gloo")
    run(folder / "zero2", deepspeed=deepspeed_config(2))
