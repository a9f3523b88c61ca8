"""RL post-training for masked autoregressive image generators.

from marval_rl import MARGRPOConfig, MARGRPOTrainer, MARModel
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

# Imported when first asked for: `marval-rl --help` must not wait for torch.
_EXPORTS = {
    "DistillConfig": "marval_rl.trainers.distill",
    "DistillTrainer": "marval_rl.trainers.distill",
    "MARConfig": "marval_rl.models",
    "MARGRPOConfig": "marval_rl.trainers.grpo_config",
    "MARGRPOTrainer": "marval_rl.trainers.grpo",
    "MARModel": "marval_rl.models",
    "MaskGenConfig": "marval_rl.models.maskgen.config",
    "MaskGenModel": "marval_rl.models.maskgen.model",
    "PretrainConfig": "marval_rl.trainers.pretrain",
    "PretrainTrainer": "marval_rl.trainers.pretrain",
    "RewardBackpropConfig": "marval_rl.trainers.reward_backprop",
    "RewardBackpropTrainer": "marval_rl.trainers.reward_backprop",
    "RewardSet": "marval_rl.rewarding",
    "generate": "marval_rl.models",
    "load_model": "marval_rl.models.checkpoints",
}

__all__ = ["__version__", *_EXPORTS]


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_EXPORTS[name]), name)
