"""Resuming with another number of processes or another stage of ZeRO: DeepSpeed's partitions are resharded."""

from __future__ import annotations

import io
from argparse import Namespace
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from marval_rl.errors import CheckpointError, first_line
from marval_rl.runtime.checkpoints import UNFINISHED, Layout, remove_unfinished
from marval_rl.runtime.distributed import from_first_process, gather_objects

ADAM = ("exp_avg", "exp_avg_sq")


def load_resharded(checkpoint: Path, written: Layout, engine: Any, output_dir: Path) -> None:
    """Load the float32 weights and the optimizer's state of a checkpoint into an engine of another layout.

    The first process joins the partitions with DeepSpeed's own converter (`ds_to_universal`), into one file per
    parameter and state, in a temporary folder. DeepSpeed itself could read them only between its stages 1 and 2, and
    would use the first parameter group's settings for all; so here each process fills its own partition.

    Args:
        checkpoint: A complete checkpoint of the run.
        written: Its layout.
        engine: The new engine; its weights are those of the checkpoint already.
        output_dir: The run's folder.

    Raises:
        CheckpointError: In all processes, if DeepSpeed cannot convert it.
    """
    folder = output_dir / UNFINISHED / "converted"
    failure = None
    if torch.distributed.get_rank() == 0:
        try:
            _join(next(checkpoint.glob("global_step*")), written.zero_stage, folder)
        except Exception as error:  # DeepSpeed's script may raise anything, such as AssertionError or KeyError
            failure = f"{type(error).__name__}: {first_line(error)}"
    failure = from_first_process(failure)
    if failure is not None:
        raise CheckpointError(
            f"{checkpoint} was written by {written}, and DeepSpeed could not convert it: {failure}. Continue with "
            f"{written}, or start a new run from its weights"
        )
    _fill_partition(folder / "zero", engine)
    gather_objects(None)  # all have read it
    if torch.distributed.get_rank() == 0:
        remove_unfinished(output_dir)


def _join(partitions: Path, zero_stage: int | None, folder: Path) -> None:
    """Write folder/zero/<parameter>/{fp32,exp_avg,exp_avg_sq,step}.pt."""
    from deepspeed.checkpoint import ds_to_universal

    settings = Namespace(
        input_folder=str(partitions),
        output_folder=str(folder),
        num_extract_workers=1,
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=True,
    )
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        ds_to_universal.main(settings)
    if zero_stage == 3:  # the converter leaves out the optimizer's step
        shapes = _load(next(partitions.glob("*_model_states.pt")))["param_shapes"]
        optimizer = _load(next(partitions.glob("*_optim_states.pt")))["optimizer_state_dict"]["optimizer_state_dict"]
        for group, names in enumerate(shapes):
            for name in names:
                torch.save(optimizer["state"][group]["step"], folder / "zero" / name / "step.pt")


def _fill_partition(folder: Path, engine: Any) -> None:
    """Fill this process's flat float32 tensors, one per parameter group, and their optimizer states."""
    zero3 = engine.zero_optimization_stage() == 3
    optimizer = engine.optimizer
    names = {parameter: name for name, parameter in engine.module.named_parameters()}
    groups = optimizer.fp16_groups if zero3 else optimizer.bit16_groups
    flats = optimizer.fp32_partitioned_groups_flat if zero3 else optimizer.single_partition_of_fp32_groups
    for group, flat in zip(groups, flats, strict=True):
        state = {key: torch.zeros_like(flat.data) for key in ADAM}
        parts = _zero3_parts(group) if zero3 else _fragments(group)
        for parameter, first, start, size in parts:
            for key, partition in (("fp32", flat.data), *state.items()):
                full = _tensor(folder / names[parameter] / f"{key}.pt").flatten()
                partition[start : start + size] = full[first : first + size]
        step = _load(folder / names[group[0]] / "step.pt")
        optimizer.optimizer.state[flat] = {"step": torch.as_tensor(step, dtype=torch.float32), **state}


# Both take parameters with the attributes that DeepSpeed adds, and yield (parameter, index of its first element here,
# that element's index in the flat tensor, number of elements).


def _fragments(group: list[Any]) -> Iterator[tuple[nn.Parameter, int, int, int]]:
    """ZeRO-1 and 2 concatenate the parameters of a group, and cut the result into equal parts."""
    for parameter in group:
        mapping = parameter._hp_mapping
        if mapping is not None:  # else another process has it
            inside, flat = mapping.lp_fragment_address, mapping.hp_fragment_address
            yield parameter, inside.start, flat.start, flat.numel


def _zero3_parts(group: list[Any]) -> Iterator[tuple[nn.Parameter, int, int, int]]:
    """ZeRO-3 cuts each parameter into equal parts, the last one padded, and concatenates the parts of a process."""
    start = 0
    for parameter in group:
        size = parameter.ds_tensor.numel()
        first = size * torch.distributed.get_rank()
        yield parameter, first, start, max(0, min(size, parameter.ds_numel - first))
        start += size


def _tensor(path: Path) -> Tensor:
    content = _load(path)
    return content["param"] if isinstance(content, dict) else content  # from stages 1 and 2, or from stage 3


def _load(path: Path) -> Any:
    return torch.load(path, map_location="cpu", weights_only=False)  # DeepSpeed's files hold objects of its own
