"""MarVAL: reinforcement learning of masked auto-regressive image models distilled to one step."""

from __future__ import annotations

__version__ = "0.1.0"
