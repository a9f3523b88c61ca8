"""The reward protocol: finding rewards by name, path or entry point, and scoring images with several at once."""

from __future__ import annotations

import importlib
from typing import Any

# Imported when first asked for: `marval-rl rewards --help` must not wait for torch.
_EXPORTS = {
    "Reward": "marval_rl.rewarding.loading",
    "RewardScores": "marval_rl.rewarding.reward_set",
    "RewardSet": "marval_rl.rewarding.reward_set",
    "list_rewards": "marval_rl.rewarding.loading",
    "load_reward": "marval_rl.rewarding.loading",
}

__all__ = [*_EXPORTS]


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_EXPORTS[name]), name)
