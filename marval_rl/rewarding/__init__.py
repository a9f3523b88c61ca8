"""The reward protocol: finding rewards by name, path or entry point, and scoring images with several at once."""

from marval_rl.rewarding.loading import Reward, list_rewards, load_reward
from marval_rl.rewarding.reward_set import RewardScores, RewardSet

__all__ = ["Reward", "RewardScores", "RewardSet", "list_rewards", "load_reward"]
