"""`--accelerate_config`: the name of a preset, or a YAML file as `accelerate config` writes it.

The file is not read by accelerate's own loader: that fills in defaults, such as machine_rank 0 on every machine, and a
missing setting could no longer be reported.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from marval_rl.errors import RecipeError
from marval_rl.paths import DEEPSPEED_PRESETS, expand_path, shipped_recipe
from marval_rl.text import load_yaml, read_text, yaml_problem

LAUNCH_KEYS = ("num_processes", "num_machines", "machine_rank", "main_process_ip", "main_process_port")
DISTRIBUTED_TYPES = ("NO", "MULTI_CPU", "MULTI_GPU", "DEEPSPEED")
# Without effect here. So is `zero3_init_flag` in deepspeed_config: models are built complete, and the engine partitions
# the one that it trains.
IGNORED_KEYS = (
    "compute_environment", "debug", "downcast_bf16", "enable_cpu_affinity", "main_training_function", "rdzv_backend",
    "same_network", "tpu_env", "tpu_name", "tpu_use_cluster", "tpu_use_sudo", "tpu_zone",
)  # fmt: skip
OTHER_KEYS = ("distributed_type", "mixed_precision", "use_cpu", "gpu_ids", "deepspeed_config")
DEEPSPEED_KEYS = (
    "deepspeed_config_file", "zero_stage", "offload_optimizer_device", "offload_param_device", "zero3_init_flag",
    "zero3_save_16bit_model", "deepspeed_multinode_launcher",
)  # fmt: skip


@dataclass(frozen=True)
class AccelerateConfig:
    """What a configuration says.

    Attributes:
        launch: Values of LAUNCH_KEYS.
        settings: Of the recipe, as on the command line.
        environment: Variables to set for the processes.
    """

    launch: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, str] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)


def read_accelerate_config(name: str | None) -> AccelerateConfig:
    """Read a preset or a file; an empty configuration for None.

    Raises:
        RecipeError: For a name that is neither, and for what only `accelerate launch` can do.
    """
    if name is None:
        return AccelerateConfig()
    if name in DEEPSPEED_PRESETS:
        return AccelerateConfig(settings={"deepspeed": name})
    path = Path(name) if Path(name).is_file() else shipped_recipe(name)
    if path is None:
        raise RecipeError(f"accelerate_config {name!r} is neither a file nor one of {', '.join(DEEPSPEED_PRESETS)}")
    try:
        config = load_yaml(read_text(path))
    except (OSError, UnicodeError) as error:
        raise RecipeError(f"cannot read {path}: {error}") from error
    except yaml.YAMLError as error:
        raise RecipeError(f"cannot read {path}: {yaml_problem(error)}") from error
    if not isinstance(config, dict):
        raise RecipeError(f"{path} is not a configuration of accelerate: it holds {config!r:.60}")
    _refuse_unknown(path, config, (*LAUNCH_KEYS, *OTHER_KEYS, *IGNORED_KEYS))
    kind = config.get("distributed_type") or "NO"  # YAML reads a bare NO as false
    if kind not in DISTRIBUTED_TYPES:
        raise RecipeError(f"{path}: distributed_type {kind} is not one of {', '.join(DISTRIBUTED_TYPES)}")
    launch = {key: config[key] for key in LAUNCH_KEYS if config.get(key) is not None}
    for key, value in launch.items():
        if not isinstance(value, str if key == "main_process_ip" else int):
            raise RecipeError(f"{path}: {key} cannot be {value!r}")
    settings, environment = {}, {}
    precision = config.get("mixed_precision") or "no"  # YAML reads a bare no as false
    if precision in ("bf16", "fp16"):
        settings[precision] = "true"
    elif precision != "no":
        raise RecipeError(f"{path}: mixed_precision {precision} is not one of no, bf16, fp16")
    if config.get("use_cpu") or kind == "MULTI_CPU":
        settings["use_cpu"] = "true"
    if kind == "DEEPSPEED":
        settings["deepspeed"] = _deepspeed_file(path, config.get("deepspeed_config") or {})
    if config.get("gpu_ids") not in (None, "all"):
        environment["CUDA_VISIBLE_DEVICES"] = str(config["gpu_ids"])
    return AccelerateConfig(launch, settings, environment)


def _refuse_unknown(path: Path, config: dict[str, Any], known: tuple[str, ...]) -> None:
    for key, value in config.items():
        if key not in known and value:
            raise RecipeError(
                f"{path}: {key} is not understood here: start with `accelerate launch --config_file {path} -m "
                "marval_rl ...`"
            )


def _deepspeed_file(path: Path, config: dict[str, Any]) -> str:
    """The file or the preset that `deepspeed_config` means."""
    _refuse_unknown(path, config, DEEPSPEED_KEYS)
    file = config.get("deepspeed_config_file")
    if file is not None:
        file = expand_path(file)
        if not Path(file).is_file() and file in {f"marval_rl/presets/{name}.json" for name in DEEPSPEED_PRESETS}:
            return Path(file).stem  # in the files of recipes/accelerate, outside a checkout
        if not Path(file).is_file():
            raise RecipeError(f"{path}: deepspeed_config_file {file} is missing (relative to {Path.cwd()})")
        return str(file)
    offloads = [config.get(f"offload_{what}_device") not in (None, "none") for what in ("optimizer", "param")]
    preset = f"zero{config.get('zero_stage')}{'_offload' if any(offloads) else ''}"
    if preset not in DEEPSPEED_PRESETS:
        raise RecipeError(f"{path}: no preset fits its deepspeed_config: name a deepspeed_config_file")
    return preset
