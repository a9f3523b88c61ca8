"""Reports on runs: metrics.jsonl and its neighbours in, one HTML page, or figures and tables for papers, out."""

from __future__ import annotations

from marval_rl.reporting.metrics import read_metrics
from marval_rl.reporting.page import write_report

__all__ = ["read_metrics", "write_report"]
