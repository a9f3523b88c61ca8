"""Which settings have an effect: one that cannot is refused by name, with the remedy, and is never silently recorded.

The table `counts_if` of a dataclass says what its settings depend on. `REFUSED` lists the settings of transformers that
these trainers do not support.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK, get_available_reporting_integrations
from transformers.trainer_pt_utils import AcceleratorConfig


class Needs(NamedTuple):
    """What settings depend on.

    Attributes:
        description: The condition in words.
        settings: The names that it looks at; it does not apply to a command that does not have all of them.
        met: Whether their values fulfil it.
        in_python: False if a trainer made in Python can use the dependent settings in another way.
    """

    description: str
    settings: tuple[str, ...]
    met: Callable[..., bool]
    in_python: bool = True


def setting(default: Any, help: str, choices: Iterable[Any] | None = None) -> Any:
    """A field of a dataclass of settings: what the docs and `--help` say of it, and the values that it may have."""
    metadata = {"help": help} if choices is None else {"help": help, "choices": list(choices)}
    return dataclasses.field(default=default, metadata=metadata)


Conditions = dict[Needs, tuple[str, ...]]  # the settings that count only if it is met

EVALUATED = Needs('eval_strategy steps or epoch (it is "no")', ("eval_strategy",), lambda s: s != "no", in_python=False)

_HUB = "nothing is uploaded while training: `hf upload` the folder final/ afterwards, or trainer.push_to_hub in Python"
_BEST = "set best_metric to the figure of an evaluation: output_dir/best keeps the best model"
_EVALUATION = "evaluation generates images: eval_batch_size and eval_num_images say how many"
_TEXT = "it is for language models"
_LOADER = "the order of the data is drawn from data_seed, and every batch is full"
_FSDP = "several GPUs share a model by --accelerate_config zero2 or zero3"
_AVERAGED = "images are generated in the precision of the averaged weights, float32"
_OUTPUT = "all processes share one output_dir, and the first one writes and prints"
REFUSED = {
    **dict.fromkeys(("load_best_model_at_end", "metric_for_best_model", "greater_is_better"), _BEST),
    "save_only_model": "a run is resumed from the optimizer's state: for weights alone take the folder final/",
    "resume_from_checkpoint": "write --resume, or --resume CHECKPOINT",
    "ignore_data_skip": "a resumed run reads the data where it stopped",
    "restore_callback_states_from_checkpoint": "checkpoints restore all that this library's callbacks need",
    "enable_jit_checkpoint": "SIGTERM writes a checkpoint anyway",
    **dict.fromkeys(("save_on_each_node", "log_on_each_node"), _OUTPUT),
    **dict.fromkeys(("push_to_hub", "hub_token", "hub_private_repo", "hub_model_id", "hub_strategy"), _HUB),
    **dict.fromkeys(("hub_always_push", "hub_revision"), _HUB),
    **dict.fromkeys(("per_device_eval_batch_size", "prediction_loss_only", "eval_do_concat_batches"), _EVALUATION),
    **dict.fromkeys(("eval_use_gather_object", "eval_accumulation_steps", "include_for_metrics"), _EVALUATION),
    **dict.fromkeys(("batch_eval_metrics", "label_names"), _EVALUATION),
    **dict.fromkeys(("bf16_full_eval", "fp16_full_eval"), _AVERAGED),
    **dict.fromkeys(("average_tokens_across_devices", "include_num_input_tokens_seen", "use_cache"), _TEXT),
    **dict.fromkeys(("include_tokens_per_second", "label_smoothing_factor", "length_column_name"), _TEXT),
    **dict.fromkeys(("neftune_noise_alpha", "use_liger_kernel", "liger_kernel_config"), _TEXT),
    **dict.fromkeys(("dataloader_drop_last", "dataloader_in_order", "group_by_length"), _LOADER),
    **dict.fromkeys(("train_sampling_strategy", "accelerator_config"), _LOADER),
    "dataloader_persistent_workers": "workers live for one epoch, so that they know which",
    "dataloader_multiprocessing_context": "workers start as torch starts them on this system",
    "remove_unused_columns": "all columns are passed to the rewards",
    "auto_find_batch_size": "--dry_run estimates the memory: set per_device_train_batch_size by it",
    "optim_target_modules": "the optimizer's parameter groups are the networks; use_peft trains parts of a student",
    "torch_compile_mode": "blocks are compiled for any number of tokens, which torch's other modes do not suit",
    **dict.fromkeys(("fsdp", "fsdp_config", "parallelism_config"), _FSDP),
    "logging_nan_inf_filter": "steps that are not finite are skipped and named, see max_skipped_steps",
    "debug": "the first figure that is not finite is named, see max_skipped_steps",
    "skip_memory_metrics": "--dry_run prints an estimate of the memory",
    "do_train": "the command says what is done",
    "do_eval": "eval_strategy and eval_steps say when images are judged",
    "do_predict": "`marval-rl sample` generates images",
    "local_rank": "the launcher tells each process its rank: --num_processes N",
}
_FIGURE = "no figure drives the schedule here: choose another, such as constant_with_warmup"
REFUSED_VALUES = {
    ("save_strategy", "best"): _BEST,
    ("lr_scheduler_type", "reduce_lr_on_plateau"): _FIGURE,
    ("lr_scheduler_type", "greedy"): _FIGURE,
}
OPTIMIZERS = ("adamw_torch", "adamw_torch_fused", "adafactor", "sgd", "adagrad", "rmsprop")  # the tested ones
UNSEEN_TRACKERS = ("azure_ml", "flyte")  # not always among the installed ones that transformers lists


def default_of(f: dataclasses.Field) -> Any:
    """A field's default; MISSING if it has none."""
    if f.default_factory is not dataclasses.MISSING:
        return f.default_factory()
    return f.default


def defaults_of(config_types: Sequence[type]) -> dict[str, Any]:
    """The default of each setting."""
    return {f.name: default_of(f) for kind in config_types for f in dataclasses.fields(kind) if f.init}


def conditions_of(config_types: Sequence[type]) -> Iterator[tuple[str, Needs]]:
    """Each setting that depends on others, with what it needs."""
    for kind in config_types:
        for base in kind.__mro__:
            for needs, names in vars(base).get("counts_if", {}).items():
                yield from ((name, needs) for name in names)


def unmet_needs(config_types: Sequence[type], values: Mapping[str, Any]) -> dict[str, Needs]:
    """The settings without an effect, each with the condition that is not met, given the values of all settings."""
    return {
        name: needs
        for name, needs in conditions_of(config_types)
        if name in values
        and all(setting in values for setting in needs.settings)
        and not needs.met(*(values[setting] for setting in needs.settings))
    }


def check_written(
    config_types: Sequence[type], written: Mapping[str, Any], on_command_line: Collection[str]
) -> tuple[dict[str, Any], list[str]]:
    """Check the settings that the user wrote.

    A value that is empty, false or 0 switches something off, and is always accepted.

    Args:
        config_types: The dataclasses of the command.
        written: What the user wrote, in the recipe or on the command line.
        on_command_line: The names that were written there.

    Returns:
        The settings that have an effect, and a line for each group that the command line has switched off.

    Raises:
        ValueError: For a setting that has no effect, unless it is in the recipe and the command line switches off what
            it belongs to; and for settings of transformers that these trainers do not support.
    """
    defaults = defaults_of(config_types)
    check_refused({name: value for name, value in written.items() if value and (value, defaults[name]) != (True, True)})
    idle: list[tuple[str, Needs]] = []
    left_out: dict[Needs, list[str]] = {}
    for name, needs in unmet_needs(config_types, {**defaults, **written}).items():
        if not written.get(name):
            continue
        if name in on_command_line or not set(needs.settings) & set(on_command_line):
            idle.append((name, needs))
        else:
            left_out.setdefault(needs, []).append(name)
    refuse_idle(idle, written)
    lines = [f"# left out of the recipe: {', '.join(names)}, only for {n.description}" for n, names in left_out.items()]
    unused = {name for names in left_out.values() for name in names}
    return {name: value for name, value in written.items() if name not in unused}, lines


def check_python(config: Any) -> None:
    """As `check_written`, for a dataclass that was made in Python: the user wrote what differs from its default.

    Raises:
        ValueError: For a setting that has no effect.
    """
    kind, values = type(config), vars(config)
    written = {name: values[name] for name, default in defaults_of((kind,)).items() if values[name] != default}
    set_by_transformers: tuple[Any, ...] = ("", [], AcceleratorConfig())
    refusable = {name: value for name, value in written.items() if value not in set_by_transformers}
    if config.eval_strategy != "no":
        refusable.pop("do_eval", None)  # transformers sets it
    check_refused(refusable)
    unmet = unmet_needs((kind,), values).items()
    refuse_idle([(name, needs) for name, needs in unmet if needs.in_python and written.get(name)], values)


def refuse_idle(idle: Sequence[tuple[str, Needs]], values: Mapping[str, Any]) -> None:
    """Raises ValueError for the first of these settings, and for all others that need the same."""
    if not idle:
        return
    needs = idle[0][1]
    names = [name for name, other in idle if other == needs]
    shown = ", ".join(f"{name} {values[name]}" for name in names)
    count, them = ("counts", names[0]) if len(names) == 1 else ("count", "them")
    raise ValueError(f"{shown} {count} only with {needs.description}: set that, or leave {them} out")


def check_refused(written: Mapping[str, Any]) -> None:
    """Raises ValueError for settings of transformers that these trainers do not support."""
    for name, value in written.items():
        if name in REFUSED:
            raise ValueError(f"{name} is not supported by these trainers: {REFUSED[name]}")
        if isinstance(value, str) and (name, value) in REFUSED_VALUES:
            raise ValueError(f"{name} {value!s} is not supported by these trainers: {REFUSED_VALUES[name, value]}")
        if name == "optim" and value not in OPTIMIZERS:
            raise ValueError(f"optim {value} is not supported by these trainers: choose one of {', '.join(OPTIMIZERS)}")
    check_trackers(written.get("report_to"))


def check_trackers(report_to: str | list[str] | None) -> None:
    """Raises ValueError for a tracker that is not known, or whose package is missing."""
    for name in [report_to] if isinstance(report_to, str) else report_to or []:
        if name in ("none", "all"):
            continue
        if name not in INTEGRATION_TO_CALLBACK:
            raise ValueError(
                f"report_to {name} is not a known tracker: none, all, {', '.join(INTEGRATION_TO_CALLBACK)}"
            )
        if name not in (*get_available_reporting_integrations(), *UNSEEN_TRACKERS):
            raise ValueError(f"report_to {name} needs a package that is not installed: pip install {name}")
