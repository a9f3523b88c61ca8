"""Which classes a set of images shows, and how a sample grid is laid out."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

from marval_rl.models.generation import balanced_labels, save_image_grid


def test_fewer_images_than_classes_are_of_classes_far_apart():
    assert balanced_labels(4, 1000).tolist() == [0, 250, 500, 750]
    assert balanced_labels(7, 3).tolist() == [0, 0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize(
    ("labels", "columns", "size"),
    [
        ([0, 0, 0, 1, 1], 10, (2, 2)),  # a row per class, as long as the shortest
        ([0, 0, 0, 1, 1, 1], 2, (2, 2)),
        ([0], 10, (1, 1)),
        (list(range(16)), 10, (1, 16)),
        (list(range(17)), 10, (5, 4)),  # many classes: a square
        (list(range(36)), 1, (6, 6)),
    ],
)
def test_a_grid_has_a_row_a_class_or_is_a_square(tmp_path, labels, columns, size):
    images = torch.linspace(0, 0.5, len(labels)).view(-1, 1, 1, 1).expand(-1, 3, 24, 24)
    save_image_grid(images, torch.tensor(labels), tmp_path / "grid.png", columns)
    with Image.open(tmp_path / "grid.png") as picture:
        assert picture.size == tuple(25 * count - 1 for count in size)
        assert picture.getpixel((0, 0)) == (0, 0, 0)
