"""The image set that trainers and evaluation share, and its loading by name."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.data import Dataset

from marval_rl.data.digits import DIGIT_GROUPS, DIGIT_LABELLINGS, load_digit_images

SPLITS = ("train", "test")
DEFAULT_LABELLINGS = {"digits": "digit"}  # also the list of known names


class ImageDataset(Dataset):
    """Images in memory, each with a class and with a mode (a finer class inside it, for measuring coverage).

    images:       float32 [N, C, H, W] in 0..1
    class_labels: int64 [N] in 0..len(class_names) - 1
    class_names:  the name of each class, in the order of the labels
    modes:        int64 [N] in 0..num_modes - 1

    Raises ValueError where lengths, ranges or shapes do not fit.
    """

    def __init__(
        self,
        images: Tensor,
        class_labels: Tensor,
        class_names: Sequence[str],
        modes: Tensor,
        num_modes: int,
    ) -> None:
        if images.ndim != 4:
            raise ValueError(f"images must have the shape [N, C, H, W], not {list(images.shape)}")
        for name, values, limit in (("class_labels", class_labels, len(class_names)), ("modes", modes, num_modes)):
            if values.shape != images.shape[:1]:
                raise ValueError(f"{name} has the shape {list(values.shape)}, but there are {len(images)} images")
            if len(values) and not 0 <= int(values.min()) <= int(values.max()) < limit:
                found = f"{int(values.min())}..{int(values.max())}"
                raise ValueError(f"{name} must lie in 0..{limit - 1}, but they lie in {found}")
        self.images = images
        self.class_labels = class_labels
        self.class_names = list(class_names)
        self.modes = modes
        self.num_modes = num_modes

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"images": self.images[index], "class_labels": self.class_labels[index]}


def load_image_dataset(name: str, split: str, labelling: str | None = None) -> ImageDataset:
    """Load the split "train" or "test" of a named image set; nothing is downloaded.

    name "digits": scikit-learn's 1797 digits, 8x8, 1297 to train and 500 to test. Labellings: "digit" (the default:
    ten classes, "zero" to "nine") and "parity" ("even digit", "odd digit"). The mode of an image is its digit.

    Raises ValueError for an unknown name, split or labelling.
    """
    if name not in DEFAULT_LABELLINGS:
        raise ValueError(f"unknown data set {name!r}; known: {', '.join(DEFAULT_LABELLINGS)}")
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; known: {', '.join(SPLITS)}")
    labelling = DEFAULT_LABELLINGS[name] if labelling is None else labelling
    if labelling not in DIGIT_LABELLINGS:
        known = ", ".join(DIGIT_LABELLINGS)
        raise ValueError(f"unknown labelling {labelling!r} for the data set {name!r}; known: {known}")

    images, digits = load_digit_images(split)
    class_names = DIGIT_LABELLINGS[labelling]
    label_of_digit = torch.empty(10, dtype=torch.long)
    for label, class_name in enumerate(class_names):
        label_of_digit[DIGIT_GROUPS[class_name]] = label
    return ImageDataset(images, label_of_digit[digits], class_names, digits, num_modes=10)
