"""Loading models strictly: every weight present, none left over, every number finite."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from marval_rl.errors import CheckpointError, first_line
from marval_rl.models.config import MARConfig, MaskedConfig, is_official_path
from marval_rl.models.mar import MARModel
from marval_rl.models.masked import MaskedModel
from marval_rl.models.maskgen.config import MaskGenConfig
from marval_rl.models.official.mar_weights import read_mar
from marval_rl.paths import looks_like_hub_id


def resolve_model(name_or_path: str | Path) -> str:
    """The folder that holds a model: itself, or the `final` inside a run folder; else an official checkpoint's file or
    a hub id, unchanged.

    Raises:
        CheckpointError: For a path that does not exist or holds no model.
    """
    path = Path(name_or_path)
    if path.is_file():
        return str(path)
    if (path / "config.json").is_file():
        return str(path)
    if (path / "final" / "config.json").is_file():
        return str(path / "final")
    if path.is_dir():
        raise CheckpointError(
            f"{path} holds no model: config.json is in neither it nor its folder final/ (has its run finished? "
            "`--resume` continues it)"
        )
    if not looks_like_hub_id(name_or_path) or is_official_path(path):
        raise CheckpointError(f"no model at {path}: the path does not exist")
    return str(name_or_path)


def model_class(model_type: str | None) -> type[MaskedModel] | None:
    """The class of the models whose config.json says this model_type; None for a type that is not ours."""
    if model_type == MaskGenConfig.model_type:
        from marval_rl.models.maskgen.model import MaskGenModel  # diffusers is slow to import

        return MaskGenModel
    return MARModel if model_type == MARConfig.model_type else None


def new_model(config: MaskedConfig) -> MaskedModel:
    """A model of this configuration with fresh weights."""
    kind: Any = model_class(config.model_type)
    return kind(config)


def load_config(name_or_path: str | Path) -> MaskedConfig:
    """The configuration of a model folder, run folder, official checkpoint or hub id. Raises CheckpointError."""
    resolved = resolve_model(name_or_path)
    if is_official_path(resolved):
        return read_mar(resolved).config
    try:
        config = MARConfig.get_config_dict(resolved)[0]
    except (OSError, json.JSONDecodeError) as error:
        raise CheckpointError(f"cannot read the configuration of {resolved}: {first_line(error)}") from error
    model_type = config.get("model_type") if isinstance(config, dict) else None
    types: dict[Any, type[MaskedConfig]] = {c.model_type: c for c in (MARConfig, MaskGenConfig)}
    if model_type not in types:
        hint = ""
        if isinstance(config, dict) and isinstance(config.get("model"), dict):
            hint = " (official MaskGen weights? `marval-rl convert` makes a model folder of them)"
        raise CheckpointError(f'{resolved} is not a MAR model: its config.json says model_type "{model_type}"{hint}')
    try:
        return types[model_type].from_dict(config)
    except (TypeError, ArithmeticError) as error:  # a size that is not a number, or zero heads
        raise CheckpointError(f"the configuration of {resolved} is wrong: {first_line(error)}") from error


def load_model(name_or_path: str | Path, *, one_step: bool | None = None) -> MaskedModel:
    """A model in eval mode, on the CPU, in float32.

    Args:
        name_or_path: A model folder, a run folder, the file of an official checkpoint (its average weights are taken)
            or a hub id.
        one_step: True asks for a student, False for a teacher, None takes either.

    Raises:
        CheckpointError: If it does not exist, is damaged, has other sizes than its configuration, misses weights, has
            too many or non-finite ones, or is of the other kind.
    """
    config = load_config(name_or_path)
    resolved = resolve_model(name_or_path)
    if one_step is not None and config.is_one_step != one_step:
        wanted, found = ("a one-step student", "a many-step teacher")[:: 1 if one_step else -1]
        raise CheckpointError(f"{resolved} is {found}, but {wanted} is needed here")
    try:
        kind: Any = model_class(config.model_type)
        model, info = kind.from_pretrained(resolved, config=config, output_loading_info=True, dtype=torch.float32)
    except (SafetensorError, OSError, RuntimeError) as error:
        raise CheckpointError(
            f"the weights of {resolved} cannot be loaded (a damaged file, or sizes other than config.json's): "
            f"{first_line(error)}"
        ) from error
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[what]:
            shown = ", ".join(map(str, sorted(info[what], key=str)[:5]))
            raise CheckpointError(
                f"the weights of {resolved} do not fit: {len(info[what])} {what.replace('_', ' ')}: {shown}"
            )
    for name, parameter in model.named_parameters():
        if not parameter.isfinite().all():
            raise CheckpointError(f"the weight {name} of {resolved} holds NaN or infinity")
    if config.is_one_step:
        model.freeze_null()  # a student has no guidance pass
    return model.eval()
