"""Labelled image sets to train on and to judge against."""

from marval_rl.data.class_rows import class_rows
from marval_rl.data.cropped_images import CroppedImages
from marval_rl.data.datasets import ImageDataset, load_image_dataset
from marval_rl.data.image_sources import load_labelled_images
from marval_rl.data.labelled_images import LabelledImages
from marval_rl.data.moments import MomentsCache, NpzMoments, load_moments

__all__ = [
    "CroppedImages",
    "ImageDataset",
    "LabelledImages",
    "MomentsCache",
    "NpzMoments",
    "class_rows",
    "load_image_dataset",
    "load_labelled_images",
    "load_moments",
]
