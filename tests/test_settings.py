"""No setting is ignored: changing any field of any class of settings changes the run, or is refused by name."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import inspect
import io
import logging
import re
import warnings
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import tiny_model
from tiny_recipes import COMMANDS, CONFIGS, comparable_lines
from tiny_trainers import QUIET, darkness, grey_student, tiny_images
from torch import Tensor
from transformers import Trainer, TrainingArguments
from transformers.integrations import integration_utils
from transformers.utils import logging as transformers_logging

from marval_rl.cli import train as train_command
from marval_rl.cli.arguments import quiet_libraries
from marval_rl.data import class_rows
from marval_rl.evaluation import ImageEvaluator
from marval_rl.evaluation.references import Rows
from marval_rl.models import MARConfig
from marval_rl.recipes import data_arguments, evaluation_arguments
from marval_rl.recipes.data_arguments import DataArguments
from marval_rl.recipes.network_arguments import LoraArguments, ModelArguments, RewardArguments, TeacherArguments
from marval_rl.rewarding import RewardSet
from marval_rl.runtime.settings import (
    OPTIMIZERS,
    REFUSED,
    REFUSED_VALUES,
    check_written,
    conditions_of,
    defaults_of,
    unmet_needs,
)
from marval_rl.trainers.arguments import MARTrainingArguments
from marval_rl.trainers.distill import DistillConfig, DistillTrainer
from marval_rl.trainers.grpo import MARGRPOConfig, MARGRPOTrainer
from marval_rl.trainers.pretrain import PretrainTrainer
from marval_rl.trainers.reward_backprop import RewardBackpropTrainer

# ---- Trainers: each field is refused, or changes what a run leaves behind, or is read by the code that is named ----

BASE = {
    **QUIET,
    **{"max_steps": 6, "lr_scheduler_type": "linear", "learning_rate": 1e-2},
    **{"eval_strategy": "steps", "eval_steps": 3, "eval_on_start": True, "eval_num_images": 6, "eval_batch_size": 3},
    **{"eval_unmasking_steps": 2, "sample_grid_columns": 2, "ema_decay": 0.5, "max_grad_norm": 0.1},
}
CHASING = {"auxiliary_updates": 2, "auxiliary_warmup_steps": 0}
REWARDED = {
    **{**BASE, **CHASING, "gsim_weight": 1.0, "gsim_batch_size": 8, "beta": 0.1, "policy_std": 0.2},
    "distribution_weight": 1.0,
    **{"num_unmasking_steps": 2, "eval_unmasking_steps": 3},
}
SMALL_STEPS = {"num_iterations": 4, "learning_rate": 1e-4}  # the ratios move by little more than a clip range of 1e-4
BASES = {
    "teacher": {**BASE, "eval_guidance_scale": 2.0, "eval_diffusion_steps": 10},
    "distill": {**BASE, **CHASING},
    "grpo": {**REWARDED, "num_generations": 4},
    "reward_backprop": REWARDED,
}

# field -> another value; or that, what else is set before and after, and what is set after alone
CHANGES: dict[str, Any] = {
    "output_dir": None,  # each run has its own here
    **{"max_steps": 3, "num_train_epochs": (1, {"max_steps": -1}), "per_device_train_batch_size": 4},
    **{"gradient_accumulation_steps": 2, "learning_rate": 3e-3, "lr_scheduler_type": "cosine", "warmup_steps": 2},
    "lr_scheduler_kwargs": ({"power": 3}, {"lr_scheduler_type": "polynomial"}),
    **{"optim": "sgd", "optim_args": ("momentum=0.5", {"optim": "sgd"}), "weight_decay": 0.3},
    **{"adam_beta1": 0.5, "adam_beta2": 0.5, "adam_epsilon": 0.1, "max_grad_norm": 0.01},
    "bf16": (True, {"use_cpu": True}),
    "logging_strategy": ("no", {"logging_steps": 10, "max_steps": 11}),
    **{"logging_steps": 2, "logging_first_step": (True, {"logging_steps": 3})},
    **{"eval_strategy": "no", "eval_steps": 2, "eval_delay": 4, "eval_on_start": False, "eval_num_images": 9},
    **{"eval_unmasking_steps": 4, "eval_seed": 5, "eval_redraws": 2, "sample_grid_columns": 1},
    **{"save_strategy": ("steps", {"save_steps": 3}), "save_steps": (2, {"save_strategy": "steps"})},
    "save_total_limit": (1, {"save_strategy": "steps", "save_steps": 2}),
    **{"seed": 3, "data_seed": 3, "ema_decay": 0.01},
    # pretraining and distillation
    **{"label_dropout": 0.9, "mask_ratio_min": 0.3, "timestep_draws": 3, "mask_law": "arccos"},
    "mask_ratio_std": (3.0, {"mask_ratio_min": 0.05}),
    "guidance_schedule": "linear",
    **{"eval_guidance_scale": 1.5, "eval_guidance_schedule": "constant", "eval_diffusion_steps": 5},
    **{"auxiliary_learning_rate": 1e-2, "student_timestep": 300, "guidance_scale": 3.0, "min_timestep": 500},
    **{"max_timestep": 300, "huber_r": 1.0, "auxiliary_updates": 3, "auxiliary_warmup_steps": 3},
    # rewards
    **{"gsim_weight": 2.0, "gsim_batch_size": 4, "gsim_guidance_scale": 3.0, "gsim_min_timestep": 500},
    "gsim_max_timestep": 300,
    **{"distribution_weight": 3.0, "distribution_features": "pixels:2", "distribution_kernel": "energy"},
    **{"distribution_real_images": 12, "distribution_queue": 6, "distribution_batch_size": 7},
    "distribution_column": "alike",
    **{"reward_weights": [2.0], "num_unmasking_steps": 3, "beta": 0.2, "prompt_template": "a {name}"},
    **{"policy_std": 0.3, "best_metric": "rewards/judge/mean", "max_kl": 1e-9},
    **{"max_frechet_ratio": 1.0, "min_diversity": 1.0, "min_mode_coverage": 1.0, "min_recall": 1.0},
    # GRPO
    **{"num_generations": 2, "num_iterations": 2, "steps_per_generation": 2, "log_prob_reduction": "mean"},
    **{"loss_type": ("cispo", {"num_iterations": 2}), "scale_rewards": "none"},
    **{"epsilon": (1e-4, SMALL_STEPS), "epsilon_high": (1e-4, SMALL_STEPS)},
    **{"multi_objective_aggregation": "normalize_then_sum", "share_order": True, "share_noise": True},
    # reward back-propagation
    **{"backprop_steps": "last", "num_backprop_steps": (2, {"backprop_steps": "last"})},
}

# field -> code that reads it, where nothing shows on this machine: speed, several processes, trackers, GPUs
TRAINER, TRACKER, OURS = Trainer, integration_utils, "marval_rl.trainers.base"
READ_BY: dict[str, Any] = {
    **dict.fromkeys(("ddp_find_unused_parameters", "ddp_bucket_cap_mb", "ddp_broadcast_buffers"), TRAINER),
    **dict.fromkeys(("ddp_static_graph",), TRAINER),
    **dict.fromkeys(("ddp_backend", "ddp_timeout", "use_cpu", "fp16", "tf32", "deepspeed"), TrainingArguments),
    **dict.fromkeys(("log_level", "log_level_replica"), TrainingArguments.get_process_log_level),
    **dict.fromkeys(("report_to", "full_determinism", "torch_empty_cache_steps"), TRAINER),
    **dict.fromkeys(("activation_checkpointing", "activation_checkpointing_kwargs"), TRAINER),
    **dict.fromkeys(("gradient_checkpointing", "gradient_checkpointing_kwargs"), (TRAINER, TrainingArguments)),
    **dict.fromkeys(("run_name", "project", "trackio_space_id", "trackio_bucket_id"), TRACKER),
    "trackio_static_space_id": TRACKER,
    **{"disable_tqdm": "marval_rl.runtime.callbacks", "overwrite_output_dir": "marval_rl.cli.training"},
    **dict.fromkeys(("dataloader_num_workers", "dataloader_pin_memory", "dataloader_prefetch_factor"), OURS),
    **dict.fromkeys(("eval_batch_size", "max_skipped_steps", "profile", "torch_compile"), OURS),
    "torch_compile_backend": OURS,
}


class Measures(ImageEvaluator):
    """An evaluation whose figures get worse, and of which some tell of the images."""

    worse = ("diversity", "mode_coverage", "recall")
    calls = 0

    def names(self, num_images: int, num_classes: int | None = None) -> list[str]:
        return ["frechet_distance", *self.worse, *super().names(num_images, num_classes)]

    def figures(self, rows: Rows) -> dict[str, float | None]:
        self.calls += 1
        worse = dict.fromkeys(self.worse, 1 / self.calls)
        return {"frechet_distance": float(self.calls), **worse, **super().figures(rows)}


def judge(images: Tensor, prompts: list[str], **_: Any) -> Tensor:
    return images.mean(dim=(1, 2, 3)) + len(prompts[0])


def judged_darkness(images: Tensor, prompts: list[str], **_: Any) -> Tensor:
    return darkness(images) * (1 + len(prompts[0]))


judged_darkness.differentiable = True


TRAINERS: dict[str, Any] = {
    **{"teacher": PretrainTrainer, "distill": DistillTrainer},
    **{"grpo": MARGRPOTrainer, "reward_backprop": RewardBackpropTrainer},
}


def make_trainer(recipe: str, folder: Path, settings: dict[str, Any]) -> Any:
    options = {"evaluator": Measures(), "eval_rewards": RewardSet([judge])}
    config, trainer_class = CONFIGS[recipe][-1](str(folder), **settings), TRAINERS[recipe]
    if recipe in ("teacher", "distill"):
        return trainer_class(tiny_model(1), config, train_dataset=tiny_images(), **options)
    anchored = {"teacher": tiny_model(3), "anchor_dataset": tiny_images()} if config.gsim_weight > 0 else {}
    rows = class_rows(3, 8)
    if config.distribution_column is not None:
        rows = rows.add_column(config.distribution_column, [0] * len(rows))
    rewards = RewardSet([judged_darkness], config.reward_weights)
    return trainer_class(grey_student(), rewards, config, train_dataset=rows, **anchored, **options)


def outcome(recipe: str, folder: Path, settings: dict[str, Any]) -> tuple[Any, ...]:
    """What a run leaves behind: its lines, weights, files and grids."""
    trainer = make_trainer(recipe, folder, settings)
    trainer.train()
    digest = hashlib.sha256()
    for value in (*trainer.model.state_dict().values(), *trainer.ema.module.state_dict().values()):
        digest.update(value.detach().contiguous().numpy().tobytes())
    for grid in sorted(folder.glob("samples/*.png")):
        digest.update(grid.read_bytes())
    files = sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))
    lines = comparable_lines(folder) if (folder / "metrics.jsonl").exists() else []
    return digest.hexdigest(), files, [{k: v for k, v in line.items() if k != "epoch"} for line in lines]


def fields_of(recipe: str) -> list[str]:
    return [f.name for f in dataclasses.fields(CONFIGS[recipe][-1]) if f.init]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory) -> Any:
    """`outcomes(recipe, **settings)`: what such a run leaves behind; each is run once."""
    known: dict[str, tuple[Any, ...]] = {}

    def of(recipe: str, **settings: Any) -> tuple[Any, ...]:
        key = repr((recipe, sorted(settings.items(), key=str)))
        if key not in known:
            known[key] = outcome(recipe, tmp_path_factory.mktemp(recipe), {**BASES[recipe], **settings})
        return known[key]

    return of


@pytest.mark.parametrize("recipe", COMMANDS)
def test_every_field_has_an_entry(recipe):
    names = set(fields_of(recipe))
    entries = [set(REFUSED), set(CHANGES), set(READ_BY)]
    assert names <= set.union(*entries), names - set.union(*entries)
    for one in entries:
        for other in entries:
            assert one is other or not one & other


# What no trainer of ours reads itself is tried with one of them.
COMMON = {f.name for f in dataclasses.fields(MARTrainingArguments)}
FOR_EACH = {"learning_rate", "weight_decay", "optim", "seed", "data_seed", "ema_decay", "gradient_accumulation_steps"}


@pytest.mark.timeout(1200)  # some fifty runs, of a second each on an idle core
@pytest.mark.parametrize("recipe", COMMANDS)
def test_changing_a_field_changes_the_run(outcomes, recipe):
    unchanged = []
    for name in set(fields_of(recipe)) & set(CHANGES):
        if CHANGES[name] is None or (recipe != "teacher" and name in COMMON - FOR_EACH):
            continue
        value, context, also = (*CHANGES[name], {})[:3] if isinstance(CHANGES[name], tuple) else (CHANGES[name], {}, {})
        if outcomes(recipe, **context) == outcomes(recipe, **context, **{name: value}, **also):
            unchanged.append(name)
    assert unchanged == []


@functools.cache
def source_of(place: Any) -> str:
    return inspect.getsource(import_module(place) if isinstance(place, str) else place)


@pytest.mark.parametrize("recipe", COMMANDS)
def test_settings_without_a_visible_trace_are_read_by_the_named_code(recipe):
    for name in set(fields_of(recipe)) & set(READ_BY):
        places = READ_BY[name] if isinstance(READ_BY[name], tuple) else (READ_BY[name],)
        sources = [source_of(place) for place in places]
        owners = ("args.", "self.", "config.", "self.args.", 'getattr(args, "', '"')  # or in a loop over names
        assert any(owner + name in source for owner in owners for source in sources), name


# ---- What cannot count is refused ----

OTHER_VALUES: dict[str, Any] = {"local_rank": 1, "accelerator_config": {"split_batches": True}, "label_names": ["a"]}


def another_value(name: str, default: Any) -> Any:
    if name in OTHER_VALUES:
        return OTHER_VALUES[name]
    return not default if isinstance(default, bool) else default + 1 if isinstance(default, float | int) else "other"


def test_settings_of_transformers_that_these_trainers_do_not_support_are_refused(tmp_path):
    defaults = defaults_of([DistillConfig])
    for name in REFUSED.keys() & defaults.keys():
        value = another_value(name, defaults[name])
        with pytest.raises(ValueError, match=f"{name} is not supported by these trainers: "):
            DistillConfig(str(tmp_path), **{name: value, "eval_strategy": "no"})
        if value:  # false says that it is off
            with pytest.raises(ValueError, match=f"{name} is not supported by these trainers: "):
                check_written([DistillConfig], {name: value}, ())
    for name, value in REFUSED_VALUES:
        with pytest.raises(ValueError, match=f"{name} {value} is not supported"):
            DistillConfig(str(tmp_path), **{name: value})
    with pytest.raises(ValueError, match=r"optim lion_32bit is not supported .* adamw_torch_fused"):
        DistillConfig(str(tmp_path), optim="lion_32bit")


def test_a_written_default_of_what_is_not_supported_is_refused_unless_it_says_off():
    with pytest.raises(ValueError, match="per_device_eval_batch_size is not supported"):
        check_written([DistillConfig], {"per_device_eval_batch_size": 8}, ())
    written = {"load_best_model_at_end": False, "dataloader_in_order": True, "hub_model_id": None}
    assert check_written([DistillConfig], written, ()) == (written, [])


@pytest.mark.parametrize("optim", OPTIMIZERS)
def test_every_optimizer_that_is_offered_moves_the_weights(tmp_path, optim):
    trainer = make_trainer("distill", tmp_path, {**BASES["distill"], "optim": optim, "eval_strategy": "no"})
    before = [parameter.clone() for parameter in trainer.mar.parameters()]
    trainer.train()
    assert any(not torch.equal(a, b) for a, b in zip(before, trainer.mar.parameters(), strict=True))


# what switches off -> how; of one setting: to which value
ONE_OFF: dict[str, Any] = {
    **{"eval_strategy": "no", "report_to": "none"},
    **{"save_strategy": "epoch", "logging_strategy": "epoch", "max_steps": 10, "lr_scheduler_type": "constant"},
    **dict.fromkeys(("torch_compile", "gradient_checkpointing", "use_peft"), False),
    **dict.fromkeys(("eval_guidance_scale", "guidance_scale", "mask_ratio_min"), 1.0),
    **dict.fromkeys(("gsim_weight", "distribution_weight", "beta"), 0.0),
    **{"backprop_steps": "all", "multi_objective_aggregation": "normalize_then_sum", "model_size": "huge"},
    **{"lora_target_modules": ["qkv"], "eval_reward_funcs": [], "prompts": None},
}
OFF: dict[tuple[str, ...], dict[str, Any]] = {
    **{(name,): {name: value} for name, value in ONE_OFF.items()},
    ("gradient_checkpointing", "activation_checkpointing"): {"gradient_checkpointing": False},
    ("gsim_weight", "distribution_weight"): {"gsim_weight": 0.0, "distribution_weight": 0.0},
    ("loss_type", "epsilon_high"): {"loss_type": "cispo", "epsilon_high": 0.2},
}
OFF_BY_SETTING: dict[str, dict[str, Any]] = {  # where one setting switches some off by one value, some by another
    **{name: {"optim": "sgd"} for name in ("adam_beta1", "adam_beta2", "adam_epsilon")},
    "optim_args": {"optim": "adamw_torch"},
    **{name: {"dataset": "digits"} for name in ("image_column", "label_column", "caption_column", "class_names")},
    **{name: {"dataset": "digits"} for name in ("eval_dataset", "eval_holdout")},
    **{name: {"backbone": "mar"} for name in ("text_tower", "text_pretrained")},
    **{name: {"backbone": "maskgen"} for name in ("encoder_num_layers", "buffer_size", "dropout")},
}
# for settings that need two things
ON = {"use_peft": True, "gsim_weight": 1.0, "eval_guidance_scale": 2.0, "eval_reward_funcs": ["classifier"]}


@pytest.mark.parametrize("recipe", COMMANDS)
def test_a_setting_of_something_that_is_off_is_refused_with_both_names(recipe):
    kinds = CONFIGS[recipe]
    for name, needs in conditions_of(kinds):
        if not set(needs.settings) <= set(defaults_of(kinds)) or name not in defaults_of(kinds):
            continue  # a teacher counts without an anchor where there is none to set
        off = OFF[needs.settings] if needs.settings in OFF else OFF_BY_SETTING[name]
        value = defaults_of(kinds)[name] or 1  # its default, written: that counts as little
        others = {key for other, needed in conditions_of(kinds) if other == name for key in needed.settings}
        met = {key: ON[key] for key in others & ON.keys() & defaults_of(kinds).keys()}
        written = {**met, **off, name: value}
        idle = unmet_needs(kinds, defaults_of(kinds) | written).keys() & met.keys()
        with pytest.raises(ValueError, match=f"\\b{name} .* counts? only with .* leave .* out"):
            check_written(kinds, {key: value for key, value in written.items() if key not in idle}, ())
        # A recipe's setting is left out where the command line switches off what it belongs to, and a line says so.
        kept, lines = check_written(kinds, written, off)
        assert name not in kept and any(name in line for line in lines)


def test_settings_that_need_the_same_are_named_at_once():
    with pytest.raises(ValueError, match=r"gsim_batch_size 8, gsim_guidance_scale 2 count only with .*gsim_weight > 0"):
        check_written(CONFIGS["grpo"], {"gsim_guidance_scale": 2, "gsim_batch_size": 8}, ())


def test_settings_without_effect_are_refused_in_python_and_a_copy_of_arguments_is_not(tmp_path):
    for settings in ({"gsim_batch_size": 8}, {"num_train_epochs": 4}, {"lr_scheduler_kwargs": {"power": 2}}):
        with pytest.raises(ValueError, match="counts only with"):
            MARGRPOConfig(str(tmp_path), **{**QUIET, "num_generations": 4, **settings})
    for kind, settings in ((DistillConfig, BASES["distill"]), (MARGRPOConfig, BASES["grpo"])):
        assert dataclasses.replace(kind(str(tmp_path), **settings), seed=7).seed == 7


# ---- The other classes of settings: each field changes what is made of them ----


def uses_of(recipe: str, monkeypatch: pytest.MonkeyPatch, **settings: Any) -> str:
    """What the networks, rewards and images of a recipe are made with."""
    calls: list[Any] = []

    def recorded(name: str, result: Any = None) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            calls.append((name, args, kwargs))
            return result

        return call

    class Images:
        image_size, mode_names, class_names, class_of_mode = 8, ("a",), ["a"], [0]
        merge_classes, in_memory = recorded("merge_classes"), recorded("in_memory")

        def __repr__(self) -> str:
            return "images"

    images = Images()
    for name in ("load_moments", "CroppedImages", "load_labelled_images", "load_held_out"):
        monkeypatch.setattr(data_arguments, name, recorded(name, images))
    monkeypatch.setattr(data_arguments, "hold_out", recorded("hold_out", (images, images)))
    settings = {"dataset": "digits", **settings}
    for name in ("load_reward", "load_extractors", "images_of_data", "open_reference"):
        monkeypatch.setattr(evaluation_arguments, name, recorded(name))
    monkeypatch.setattr(evaluation_arguments, "ImageEvaluator", lambda *_, **__: ImageEvaluator())
    for kind in CONFIGS[recipe][:-1]:
        part = kind(**{k: v for k, v in settings.items() if k in kind.__dataclass_fields__})
        if isinstance(part, DataArguments):
            part.load_training(None if part.image_size else 8, seed=0)
            part.load_held_out()
            part.evaluator(MARConfig())
            config = MARConfig()
            part.fit(config, "model")
            calls.append((config.vae, part.image_channels))
        elif isinstance(part, ModelArguments):
            calls.append(part.config({}).to_dict())
        elif isinstance(part, LoraArguments):
            calls.append(part.config() and part.config().to_dict())
        elif isinstance(part, TeacherArguments):
            calls.append((part.teacher, part.model_size))  # load() reads both: tests/test_real_recipes.py
    return re.sub(r" at 0x[0-9a-f]+", "", repr(calls))  # functions have other addresses each time


OWN = {"dataset": "images", "image_size": 8}
PARTS: dict[str, tuple[str, Any, dict[str, Any]]] = {  # field -> recipe, another value, what else is set
    "dataset": ("distill", "images", {"image_size": 8}),
    **{
        name: ("distill", value, OWN)
        for name, value in {
            **{"eval_dataset": "val", "eval_holdout": 0.2, "image_size": 9, "image_channels": 1, "flip": False},
            **dict.fromkeys(("image_column", "label_column", "caption_column", "class_names", "cache_dir"), "other"),
        }.items()
    },
    **{
        name: ("distill", value, {})
        for name, value in {
            **{"class_groups": "parity", "vae": "vae", "eval_features": ["pixels"], "eval_reference": "none"},
            **{"eval_reference_images": 9, "judges": ["classifier"], "teacher": "other", "model_size": "huge"},
        }.items()
    },
    **{name: ("teacher", 8, {}) for name in ("patch_size", "hidden_size", "encoder_num_layers", "decoder_num_layers")},
    **{name: ("teacher", 8, {}) for name in ("num_heads", "buffer_size", "head_hidden_size", "head_num_layers")},
    **{"dropout": ("teacher", 0.5, {}), "backbone": ("teacher", "maskgen", {})},
    "text_tower": ("teacher", "local-dir:tower", {"backbone": "maskgen"}),
    "text_pretrained": ("teacher", "weights.bin", {"backbone": "maskgen"}),
    "use_peft": ("grpo", True, {}),
    **{
        name: ("grpo", value, {"use_peft": True})
        for name, value in {
            **{"lora_r": 3, "lora_alpha": 3, "lora_dropout": 0.5, "lora_target": "head"},
            "lora_target_modules": ["qkv"],
        }.items()
    },
}
# read by the command: what a run does with them is in the tests of rewards and of wrong input
READ_BY_TRAIN = {
    *("method", "model", "prompts_per_class", "reward_funcs", "reward_kwargs", "eval_reward_funcs"),
    *("eval_reward_kwargs", "prompts", "prompt_column", "prompt_split", "eval_prompts"),
}


def test_every_other_field_changes_what_is_made_of_it(monkeypatch):
    names = {f.name for recipe in COMMANDS for kind in CONFIGS[recipe][:-1] for f in dataclasses.fields(kind)}
    assert names == PARTS.keys() | READ_BY_TRAIN
    for name, (recipe, value, others) in PARTS.items():
        changed = uses_of(recipe, monkeypatch, **{**others, name: value})
        assert changed != uses_of(recipe, monkeypatch, **others), name
    source = inspect.getsource(train_command) + inspect.getsource(RewardArguments.rolled_out)
    for name in READ_BY_TRAIN:
        assert any(text in source for text in (f"rewarded.{name}", f"self.{name}", f"data.{name}", f'"{name}"')), name


# ---- Warnings that users need come through ----


def test_warnings_that_matter_are_shown_and_noise_is_not(monkeypatch):
    quiet_libraries()
    log = io.StringIO()
    streams = [h for h in logging.getLogger("transformers").handlers if isinstance(h, logging.StreamHandler)]
    for handler in streams:
        monkeypatch.setattr(handler, "stream", log)
    logger = transformers_logging.get_logger("transformers.modeling_utils")
    logger.warning("Some weights of CLIPModel were not initialized from the model checkpoint")
    logger.warning("MARModel does not expose input embeddings.")
    with warnings.catch_warnings(record=True) as caught:
        quiet_libraries()
        for category in (UserWarning, FutureWarning):
            warnings.warn_explicit("text", category, "file.py", 1, module="transformers.modeling_utils")
    assert [warning.category for warning in caught] == [UserWarning]
    assert "Some weights of CLIPModel were not initialized" in log.getvalue()
    assert "input embeddings" not in log.getvalue()
