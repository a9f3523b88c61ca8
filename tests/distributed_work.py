"""What each process does for the tests of several: all four trainers, tiny, one after another (`run_all`).

Each trainer leaves in the folder: `<trainer>.safetensors` (the weights it ends with), `<trainer>_<rank>.json`
(metrics, what moved in each step, seconds, bytes), and its run folder. What `runtime/distributed.py` makes of this
process's rows, metrics and errors is in `collectives_<rank>.json`.
"""

from __future__ import annotations

import gc
import json
import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tiny_models import tiny_model
from tiny_trainers import ANCHOR, MATCHED, backprop_trainer, distiller, grey_student, grpo_trainer, pretrainer
from torch import Tensor
from transformers import TrainerCallback

from marval_rl.errors import DataError
from marval_rl.launched import launched_processes
from marval_rl.runtime.distributed import failing_together, gather_rows, gathered_in_chunks, mean_over_processes
from marval_rl.trainers.base import MARTrainer

# ZeRO-3 leaves parameters of less than 100,000 numbers whole by default, so all of a tiny model.
ZERO = {1: {}, 2: {}, 3: {"stage3_param_persistence_threshold": 0, "stage3_prefetch_bucket_size": 500}}
STAGES = ("ddp", "zero1", "zero2", "zero3")
MICRO_BATCHES = 2  # of a step, over all processes
# Momentum and weight decay move weights that get no gradient, unless they are kept from it. Adam's epsilon is large, as
# it would divide rounding errors by themselves where a gradient is nothing else, as that of an attention's key bias.
SETTINGS = {"max_steps": 5, "adam_beta1": 0.9, "adam_epsilon": 1e-4, "weight_decay": 0.01, "learning_rate": 1e-3}
CYCLE = {"auxiliary_updates": 2, "auxiliary_warmup_steps": 1}
STUDENT_STEPS = (2, 4)  # that update the student where there is an auxiliary network
ANCHORED = {**SETTINGS, **ANCHOR, **CYCLE, "num_unmasking_steps": 3}

TRAINERS: dict[str, Callable[..., MARTrainer]] = {
    "pretrain": lambda folder, **settings: pretrainer(folder, tiny_model(0), **{**SETTINGS, **settings}),
    "distill": lambda folder, **settings: distiller(folder, tiny_model(0), **{**SETTINGS, **CYCLE, **settings}),
    "grpo": lambda folder, **settings: grpo_trainer(folder, grey_student(), **{**ANCHORED, **settings}),
    "reward_backprop": lambda folder, **settings: backprop_trainer(folder, grey_student(), **{**ANCHORED, **settings}),
}
# Compares the images of all processes with each other, so micro-batches of one process cannot replace it.
DISTRIBUTION: dict[str, Callable[..., MARTrainer]] = {
    "matched_grpo": lambda folder, **settings: grpo_trainer(
        folder, grey_student(), **{**SETTINGS, **MATCHED, "distribution_batch_size": 4, **settings}
    ),
    "matched_backprop": lambda folder, **settings: backprop_trainer(
        folder, grey_student(), None, **{**SETTINGS, **MATCHED, **settings}
    ),
}


def deepspeed_config(stage: int) -> dict[str, Any]:
    """The presets' settings for this stage; buckets are as large as the tiny models."""
    return {
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": stage, "reduce_bucket_size": 100_000, **ZERO[stage]},
    }


def networks_of(trainer: MARTrainer) -> dict[str, torch.nn.Module]:
    """The networks that the optimizer trains, and the average."""
    if trainer.model is trainer.mar:
        return {"model": trainer.mar, "average": trainer.ema.module}
    if trainer.model.auxiliary is None:
        return {"model": trainer.model.student, "average": trainer.ema.module}
    return {"model": trainer.model.student, "auxiliary": trainer.model.auxiliary, "average": trainer.ema.module}


def whole_state(module: torch.nn.Module) -> dict[str, Tensor]:
    """All parameters, complete."""
    names = iter([name for name, _ in module.named_parameters()])
    chunks = gathered_in_chunks(module.parameters())
    return {next(names): parameter.detach().clone() for chunk in chunks for parameter in chunk}


def optimizer_state(trainer: MARTrainer, network: str) -> list[Tensor]:
    """Copies of the optimizer's tensors of a network, those of this process."""
    optimizer = trainer.optimizer.optimizer  # accelerate's wrapper holds it
    if isinstance(optimizer, torch.optim.Optimizer):
        groups = [group["params"] for group in optimizer.param_groups]
        base = optimizer
    else:
        base = optimizer.optimizer
        groups = [list(group["params"]) for group in base.param_groups]
        if optimizer.__class__.__name__ == "DeepSpeedZeroOptimizer_Stage3":  # the groups are filled during a step only
            for index, flat in enumerate(optimizer.fp32_partitioned_groups_flat):
                groups[optimizer.sub_group_to_group_id[index]].append(flat)
    return [
        value.clone()
        for group, parameters in zip(base.param_groups, groups, strict=True)
        if group["network"] == network
        for parameter in parameters
        for value in base.state[parameter].values()
    ]


class Watch(TrainerCallback):
    """Notes in each step which networks moved, and whether the optimizer's state of the model did."""

    def __init__(self, trainer: MARTrainer):
        self.trainer = trainer
        self.moved: list[dict[str, bool]] = []

    def look(self) -> dict[str, list[Tensor]]:
        seen = {name: list(whole_state(module).values()) for name, module in networks_of(self.trainer).items()}
        return {**seen, "optimizer": optimizer_state(self.trainer, "model")}

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.before = self.look()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        after = self.look()
        self.moved.append({name: not equal(values, after[name]) for name, values in self.before.items()})


def equal(one: list[Tensor], other: list[Tensor]) -> bool:
    return len(one) == len(other) and all(map(torch.equal, one, other))


def run(name: str, folder: Path, watched: bool = True, **settings: Any) -> dict[str, Any]:
    """Trains; returns {metrics, moved, seconds, peak_bytes} and leaves the weights in `<name>.safetensors`.

    peak_bytes is how far the resident memory rose above what it was before. What moved is seen by copying all weights
    in each step, which takes time and memory: not unless `watched`.
    """
    settings = {"gradient_accumulation_steps": MICRO_BATCHES // launched_processes(), **settings}
    resident = start_peak()
    trainer = (TRAINERS | DISTRIBUTION)[name](folder / name, **settings)
    watch = Watch(trainer)
    if watched:
        trainer.add_callback(watch)
    start = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - start
    peak = memory("VmHWM") - resident
    states = {network: whole_state(module) for network, module in networks_of(trainer).items()}
    if trainer.args.process_index == 0:
        flat = {f"{network}.{key}": value for network, state in states.items() for key, value in state.items()}
        save_file(flat, folder / f"{name}.safetensors")
    metrics = [
        {key: value for key, value in line.items() if key != "epoch"}
        for line in trainer.state.log_history
        if "loss" in line
    ]
    return {"metrics": metrics, "moved": watch.moved, "seconds": seconds, "peak_bytes": peak}


def start_peak() -> int:
    """Let the peak of this process's resident memory begin at what it holds now, and return that in bytes."""
    gc.collect()  # an engine and its trainer refer to each other
    Path("/proc/self/clear_refs").write_text("5")
    return memory("VmRSS")


def memory(name: str) -> int:
    """VmRSS, the resident memory of this process in bytes, or VmHWM, its peak (see proc(5))."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status[name].split()[0]) * 1024


def collectives(rank: int) -> dict[str, Any]:
    """Process 0 has two values of `shared` and fails in `own`; process 1 has one, a NaN, and a metric of its own."""
    nan, values = float("nan"), torch.tensor([1.0, 2.0, 6.0])
    recorded = (
        {"shared": list(values[:2])} if rank == 0 else {"shared": [values[2], torch.tensor(nan)], "own": [values[0]]}
    )
    errors = {}
    for name, failing in {"own": rank == 0, "nowhere": False}.items():
        try:
            with failing_together(torch.device("cpu"), DataError):
                if failing:
                    raise DataError("the disk is gone")
        except DataError as error:
            errors[name] = str(error)
    return {
        "rows": gather_rows(torch.tensor([[rank], [rank + 10]])).tolist(),
        "means": mean_over_processes(recorded | {"never": [torch.tensor(nan)]}),
        "errors": errors,
    }


def matching(folder: Path, rank: int | None = None) -> dict[str, Any]:
    """The distribution anchor's losses and their gradient on this process's half of the images, or on all of them."""
    anchors = backprop_trainer(folder, grey_student(), None, **MATCHED).anchors
    images = torch.rand(8, 1, 4, 4, generator=torch.Generator().manual_seed(5))
    mine = slice(None) if rank is None else slice(4 * rank, 4 * rank + 4)
    own, labels = images[mine].clone().requires_grad_(), (torch.arange(8) % 3)[mine]
    recent: dict[str, Tensor] = {}
    losses = [anchors.distribution.loss(own, labels, recent) for _ in range(2)]  # the second one beside recent images
    gradient = torch.autograd.grad(sum(losses), own)[0]
    return {"losses": [float(loss.detach()) for loss in losses], "gradient": gradient.tolist()}


def run_all(stage: str, folder: Path, names: Iterable[str] = (*TRAINERS, *DISTRIBUTION), **options: Any) -> None:
    """What one of the processes does; the options are those of `run`."""
    if stage.startswith("zero"):
        options["deepspeed"] = deepspeed_config(int(stage[-1]))
    rank = int(os.environ["RANK"])
    for name in names:
        report = run(name, folder, **options)
        (folder / f"{name}_{rank}.json").write_text(json.dumps(report))
    (folder / f"collectives_{rank}.json").write_text(json.dumps(collectives(rank)))
    if stage == "ddp":
        (folder / f"matching_{rank}.json").write_text(json.dumps(matching(folder / f"matching_{rank}", rank)))
    torch.distributed.barrier()  # none leaves while another one still needs it
    torch.distributed.destroy_process_group()
