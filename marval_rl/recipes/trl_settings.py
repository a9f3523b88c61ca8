"""Settings of TRL that recipes here do not have, and why: for those who come from TRL."""

from __future__ import annotations

import re
from collections.abc import Container

RENAMED = {
    "model_name_or_path": "model",
    "dataset_name": "dataset",
    "generation_batch_size": "steps_per_generation",
    "num_generations_eval": "eval_num_images",
    "dtype": "bf16",
    "torch_dtype": "bf16",
}
_REASONS = (
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
)  # (pattern of names, what there is instead)


def explain_trl_setting(name: str, known: Container[str]) -> str | None:
    """Why a setting that TRL has is not one here; None for a known setting, and for names that TRL does not have."""
    name = name.replace("-", "_")
    if name in known:
        return None
    if name in RENAMED:
        return f"{name} is a setting of TRL; here it is {RENAMED[name]}"
    from trl import GRPOConfig, ModelConfig, ScriptArguments

    if not any(name in config.__dataclass_fields__ for config in (GRPOConfig, ModelConfig, ScriptArguments)):
        return None
    reason = next((reason for pattern, reason in _REASONS if re.search(pattern, name)), None)
    return None if reason is None else f"{name} is a setting of TRL, and has no meaning here: {reason}"
