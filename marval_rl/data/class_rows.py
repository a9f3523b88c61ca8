"""The prompts of a class-conditional model: its classes."""

from __future__ import annotations

from datasets import Dataset


def class_rows(num_classes: int, repeats: int = 100) -> Dataset:
    """Rows {"class_labels": int} with every class `repeats` times: what the reward trainers roll out when a run has no
    data set of prompts of its own."""
    return Dataset.from_dict({"class_labels": list(range(num_classes)) * repeats})
