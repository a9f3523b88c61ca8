"""`marval-rl rewards serve`; what it does lies apart, for environments without the rest of this package."""

from __future__ import annotations

from marval_rl.rewarding.serving.server import add_serve_arguments, serve

__all__ = ["add_serve_arguments", "serve"]
