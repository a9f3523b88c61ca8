"""The prompts of a class-conditional model: its classes."""

from __future__ import annotations

import numbers
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor

from marval_rl.models.generation import check_class_labels

RESERVED = ("prompts", "completions", "class_names")  # what rewards are given under these names is made here


def class_rows(num_classes: int, repeats: int = 100) -> Dataset:
    """Rows {"class_labels": int} with every class `repeats` times: what the reward trainers roll out when a run has no
    data set of prompts of its own."""
    return Dataset.from_dict({"class_labels": list(range(num_classes)) * repeats})


def check_class_rows(dataset: Any, num_classes: int) -> None:
    """Looks at the columns of rows to roll out, and at the labels of all where reading them costs no images.

    Args:
        dataset: Rows {"class_labels": int, ...}, at least one.
        num_classes: Of the model.

    Raises:
        ValueError: For rows without class_labels, a column with a reserved name, and labels that are not of the model.
    """
    if len(dataset) == 0:
        raise ValueError("train_dataset has no rows: give at least one {'class_labels': int}")
    columns = list(dataset[0])
    if "class_labels" not in columns:
        raise ValueError(
            f"train_dataset has no column class_labels, only {', '.join(columns)}: each row names the class to "
            "generate ({'class_labels': 3}); prompts are made of the classes' names by prompt_template"
        )
    if reserved := [name for name in columns if name in RESERVED]:
        raise ValueError(
            f"train_dataset has a column {reserved[0]}, but rewards are given {', '.join(RESERVED)} of the generated "
            "images: rename the column"
        )
    if isinstance(dataset, Dataset):
        labels_of([{"class_labels": label} for label in dataset["class_labels"]], num_classes)
    else:
        labels_of(dataset if isinstance(dataset, list) else [dataset[0]], num_classes)


def labels_of(rows: Sequence[Mapping[str, Any]], num_classes: int) -> Tensor:
    """Class labels [B] of rows. Raises ValueError for one that is not a whole number in 0..num_classes-1."""
    found: list[int] = []
    for row in rows:
        label = row["class_labels"].item() if isinstance(row["class_labels"], Tensor) else row["class_labels"]
        if not isinstance(label, numbers.Real) or label != label // 1:
            raise ValueError(f"class_labels must be whole numbers in 0..{num_classes - 1}, not {label!r}")
        found.append(int(label))  # type: ignore[call-overload]  # every Real has __trunc__
    labels = torch.tensor(found)
    check_class_labels(labels, num_classes)
    return labels
