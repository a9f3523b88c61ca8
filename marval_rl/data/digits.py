"""scikit-learn's handwritten digits: 1797 real 8x8 images, bundled with the package, in one fixed split."""

from __future__ import annotations

import torch
from torch import Tensor

DIGIT_NAMES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]

# Every class name of every labelling, with the digits that belong to it.
DIGIT_GROUPS: dict[str, list[int]] = {
    **{name: [digit] for digit, name in enumerate(DIGIT_NAMES)},
    "even digit": [0, 2, 4, 6, 8],
    "odd digit": [1, 3, 5, 7, 9],
}

# Class names in the order of the class labels; each labelling covers all ten digits.
DIGIT_LABELLINGS: dict[str, list[str]] = {
    "digit": DIGIT_NAMES,
    "parity": ["even digit", "odd digit"],
}

TEST_SIZE = 500
SPLIT_SEED = 0


def load_digit_images(split: str) -> tuple[Tensor, Tensor]:
    """Return (images float32 [N, 1, 8, 8] in 0..1, digits int64 [N]) of the split "train" or "test".

    The split is stratified by digit and always the same: 1297 images to train, 500 to test.
    """
    # Slow to import, and only needed where the data are read.
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    bundle = load_digits()
    parts = train_test_split(
        bundle.images,
        bundle.target,
        test_size=TEST_SIZE,
        random_state=SPLIT_SEED,
        stratify=bundle.target,
    )
    train_images, test_images, train_digits, test_digits = parts
    images, digits = (train_images, train_digits) if split == "train" else (test_images, test_digits)
    # The bundled grey levels are 0..16.
    return torch.from_numpy(images).float().div(16).unsqueeze(1), torch.from_numpy(digits).long()
