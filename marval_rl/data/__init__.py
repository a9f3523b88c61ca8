"""Labelled image sets to train on and to judge against."""

from marval_rl.data.class_rows import class_rows
from marval_rl.data.datasets import CroppedImages, ImageDataset, load_cropped_images, load_image_dataset
from marval_rl.data.labelled_images import LabelledImages, fixed_choice, hold_out
from marval_rl.data.moments import MomentsCache, NpzMoments, load_moments
from marval_rl.data.sources import load_labelled_images

__all__ = [
    "CroppedImages",
    "ImageDataset",
    "LabelledImages",
    "MomentsCache",
    "NpzMoments",
    "class_rows",
    "fixed_choice",
    "hold_out",
    "load_cropped_images",
    "load_image_dataset",
    "load_labelled_images",
    "load_moments",
]
