"""Labelled image sets to train on and to judge against."""

from marval_rl.data.class_rows import class_rows
from marval_rl.data.datasets import ImageDataset, load_image_dataset

__all__ = ["ImageDataset", "class_rows", "load_image_dataset"]
