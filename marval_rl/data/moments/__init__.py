"""VAE moments (mean and log-variance of each image's posterior), encoded once and read at every epoch."""

from marval_rl.data.moments.npz import NpzMoments
from marval_rl.data.moments.reader import MomentsCache, load_moments

__all__ = ["MomentsCache", "NpzMoments", "load_moments"]
