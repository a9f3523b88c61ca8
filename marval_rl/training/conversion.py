"""Going on under another number of processes or stage of ZeRO: DeepSpeed's partitions are joined and dealt out anew."""

from __future__ import annotations

import io
from argparse import Namespace
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from marval_rl.errors import CheckpointError, first_line
from marval_rl.training.checkpoints import UNFINISHED, Layout, remove_unfinished, share

ADAM = ("exp_avg", "exp_avg_sq")


def load_other_layout(checkpoint: Path, written: Layout, engine: Any, output_dir: Path) -> None:
    """Load the float32 weights and the optimizer's state of a checkpoint into an engine of another layout.

    The first process joins the partitions with DeepSpeed's own converter (`ds_to_universal`), one file a parameter and
    state, in a folder that is deleted again. DeepSpeed would read them back between its stages 1 and 2 only, and would
    take the first parameter group's settings for all; here each process takes its part by DeepSpeed's functions for
    debugging, and all that stays as the run was set up is the groups' settings.

    Args:
        checkpoint: A whole checkpoint of the run.
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
        except Exception as error:  # whatever DeepSpeed's script may raise: also AssertionError and KeyError
            failure = f"{type(error).__name__}: {first_line(error)}"
    failure = share(failure)[0]
    if failure is not None:
        raise CheckpointError(
            f"{checkpoint} was written by {written}, and DeepSpeed could not convert it: {failure}. Go on with "
            f"{written}, or begin a new run from its weights"
        )
    _deal_out(folder / "zero", engine)
    share(None)  # all have read
    if torch.distributed.get_rank() == 0:
        remove_unfinished(output_dir)


def _join(partitions: Path, zero_stage: int, folder: Path) -> None:
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
    if zero_stage == 3:  # of which the converter leaves out the optimizer's step
        shapes = _load(next(partitions.glob("*_model_states.pt")))["param_shapes"]
        optimizer = _load(next(partitions.glob("*_optim_states.pt")))["optimizer_state_dict"]["optimizer_state_dict"]
        for group, names in enumerate(shapes):
            for name in names:
                torch.save(optimizer["state"][group]["step"], folder / "zero" / name / "step.pt")


def _deal_out(folder: Path, engine: Any) -> None:
    optimizer = engine.optimizer
    names = {parameter: name for name, parameter in engine.module.named_parameters()}
    whole_weights = engine.zero_optimization_stage() < 3
    groups = optimizer.bit16_groups if whole_weights else optimizer.fp16_groups
    flats = optimizer.single_partition_of_fp32_groups if whole_weights else optimizer.fp32_partitioned_groups_flat
    for group, flat in zip(groups, flats, strict=True):
        for parameter in group:
            parts = {key: _tensor(folder / names[parameter] / f"{key}.pt") for key in ("fp32", *ADAM)}
            (_set_whole if whole_weights else _set_own_part)(parameter, parts)
        state = optimizer.optimizer.state[flat]
        state["step"] = torch.as_tensor(_load(folder / names[group[0]] / "step.pt")).to(state["step"])


def _set_whole(parameter: nn.Parameter, parts: dict[str, Tensor]) -> None:
    """ZeRO-1 and 2 take what belongs to this process from the whole."""
    from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

    safe_set_full_fp32_param(parameter, parts["fp32"])
    for key in ADAM:
        safe_set_full_optimizer_state(parameter, parts[key], key)


def _set_own_part(parameter: nn.Parameter, parts: dict[str, Tensor]) -> None:
    """ZeRO-3 cuts each parameter into equal parts and fills up the last; its function for whole ones does not."""
    from deepspeed.utils import safe_set_local_fp32_param, safe_set_local_optimizer_state

    size, rank = parameter.ds_tensor.numel(), torch.distributed.get_rank()

    def own(whole: Tensor) -> Tensor:
        filled = torch.zeros(size, dtype=whole.dtype)
        part = whole.flatten()[rank * size : (rank + 1) * size]
        filled[: len(part)] = part
        return filled

    safe_set_local_fp32_param(parameter, own(parts["fp32"]))
    for key in ADAM:
        safe_set_local_optimizer_state(parameter, own(parts[key]), key)


def _tensor(path: Path) -> Tensor:
    content = _load(path)
    return content["param"] if isinstance(content, dict) else content  # from stages 1 and 2, or from stage 3


def _load(path: Path) -> Any:
    return torch.load(path, map_location="cpu", weights_only=False)  # DeepSpeed keeps objects of its own in its files
