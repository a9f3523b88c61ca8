"""Answers to unknown settings: the present name of a former or TRL setting, or why it does not exist here."""

from __future__ import annotations

import re
from collections.abc import Collection, Container

from marval_rl.errors import nearest

RENAMED = {  # former names
    "sigma": "policy_std",
    "feature_extractor": "eval_features",
    "anchor_weight": "gsim_weight",
    "anchor_batch_size": "gsim_batch_size",
    # in RL; distillation keeps these names
    **{name: f"gsim_{name}" for name in ("guidance_scale", "min_timestep", "max_timestep")},
}
_ALL_STEPS = "all unmasking steps explore and are trained"
_ADVANTAGES = "advantages are scaled by scale_rewards alone"
_NO_EFFECT = "it changed nothing where it was measured (docs/rl.md)"
REMOVED = {  # former settings, and what holds instead
    "labelling": "class_groups: parity merges classes; without it each stays",
    "num_trained_steps": _ALL_STEPS,
    "trained_steps": _ALL_STEPS,
    "exploration_window": _ALL_STEPS,
    "exploration_shift": _ALL_STEPS,
    "reward_std_floor": _ADVANTAGES,
    "advantage_clip": _ADVANTAGES,
    **dict.fromkeys(("gsim_timestep_draws", "gsim_mask_ratio_min", "gsim_mask_ratio_std"), _NO_EFFECT),
    "gsim_mask_law": "the law is the model's own",
    "gsim_guidance_schedule": "guidance is constant; a linear one did what a larger gsim_weight does (docs/rl.md)",
    "reward_threshold": "the loss is -reward: a threshold changed nothing where it was measured (docs/rl.md)",
}

TRL_NAMES = {  # TRL's name -> ours
    "model_name_or_path": "model",
    "dataset_name": "dataset",
    "generation_batch_size": "steps_per_generation",
    "num_generations_eval": "eval_num_images",
    "dtype": "bf16",
    "torch_dtype": "bf16",
}
_TRL_REASONS = (  # pattern of TRL's names, why there is no such setting
    (
        "vllm|transformers_(paged|continuous)|cache_impl|ds3_gather",
        "a student generates images by itself in a few passes",
    ),
    ("^log_|completions_to_print", "images of each evaluation are written to <output_dir>/samples"),
    ("completion|prompt_length|chat_template|tool_calling|pad_to", "images are generated, all of equally many tokens"),
    (
        "^(temperature|top_[pk]|min_p|repetition_penalty|generation_kwargs)$",
        "the policy is a Gaussian of width policy_std",
    ),
    ("entropy", "the policy is a Gaussian of fixed width policy_std, so its entropy never changes"),
    ("^(delta|sapo_|vespo_|off_policy_|use_bias_corr)", "that loss is not implemented; loss_type names those that are"),
    ("^(load_in|use_bnb|bnb_|attn_|cast_lm|trust_|model_|router_)", "models are folders that marval-rl wrote"),
    ("^dataset_", "dataset, image_column and label_column name the data"),
    ("^importance_sampling_level$", "each unmasking step has a ratio of its own"),
    ("^(sync_ref_model|ref_model_)", "the reference model stays the student as it was"),
    ("^disable_dropout$", "students have no dropout"),
    ("^shuffle_dataset$", "rows are always shuffled, by data_seed"),
)


def explain_unknown(name: str, known: Collection[str], problem: str) -> str:
    """The error message for a setting that does not exist.

    Args:
        name: As it was written, without leading dashes.
        known: The settings that exist.
        problem: How the message begins, such as "unknown key 'sigma'".
    """
    name = name.replace("-", "_")
    if (reason := explain_trl_setting(name, known)) is not None:
        return reason
    if RENAMED.get(name) in known:
        return f"{problem}; it is now called {RENAMED[name]}"
    if name in REMOVED:
        return f"{problem}; it was removed: {REMOVED[name]}"
    return problem + nearest(name, known)


def explain_trl_setting(name: str, known: Container[str]) -> str | None:
    """Why TRL's setting is not one here; None for a known setting, and for names that TRL does not have."""
    name = name.replace("-", "_")
    if name in known:
        return None
    if name in TRL_NAMES:
        return f"{name} is a setting of TRL; here it is {TRL_NAMES[name]}"
    from trl import GRPOConfig, ModelConfig, ScriptArguments

    if not any(name in config.__dataclass_fields__ for config in (GRPOConfig, ModelConfig, ScriptArguments)):
        return None
    reason = next((reason for pattern, reason in _TRL_REASONS if re.search(pattern, name)), None)
    return None if reason is None else f"{name} is a setting of TRL, and has no meaning here: {reason}"
