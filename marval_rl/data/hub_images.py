"""Images in a Hugging Face `datasets.Dataset`: parquet files, a saved data set, or one of the hub."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa

from marval_rl.data.class_names import check_number, label_classes, natural_key, read_class_names
from marval_rl.data.decoding import CorruptImageError, read_bytes
from marval_rl.data.labelled_images import LabelledImages
from marval_rl.errors import DataError, nearest


class HubImages(LabelledImages):
    """The rows of a data set with an image and a label column; the labels are read without decoding images.

    Labels may be a ClassLabel (which knows its names), whole numbers (named "class 0", "class 1", ... unless
    `class_names` says better) or text (its different values are the classes, see `label_classes`).

    Args:
        dataset: The rows.
        image_column: Encoded images: an Image feature, bytes, or the {bytes, path} of a parquet file.
        label_column: The labels.
        class_names: A list, "imagenet" or a text file with one name per line.
        where: What the data set is called in messages.
        are_captions: Labels are texts to be taken as they are: the different ones, sorted, are the classes.

    Raises:
        DataError: If a column is missing or holds something else, or a row has no valid label.
    """

    def __init__(
        self,
        dataset: datasets.Dataset,
        image_column: str = "image",
        label_column: str = "label",
        class_names: Sequence[str] | str | None = None,
        where: str = "the data set",
        are_captions: bool = False,
    ):
        for setting, column in (("image_column", image_column), ("label_column", label_column)):
            if column not in dataset.column_names:
                raise DataError(
                    f"{where} has no column {column!r}, only "
                    f"{', '.join(dataset.column_names)} (--{setting} ...){nearest(column, dataset.column_names)}"
                )
        if not len(dataset):
            raise DataError(f"{where} has no rows")
        if not _holds_images(dataset.features[image_column]):
            raise DataError(
                f"the column {image_column!r} of {where} holds no images but {dataset.features[image_column]} "
                "(--image_column ...)"
            )
        self.dataset_name = where
        self.image_column = image_column
        self._images = dataset.select_columns([image_column]).cast_column(image_column, datasets.Image(decode=False))
        column = f"the column {label_column!r} of {where}"
        labels = dataset.select_columns([label_column]).with_format("arrow")[:].column(label_column)
        if labels.null_count:
            raise DataError(f"{column} has no label in {labels.null_count} of {len(labels)} rows")
        if are_captions:
            super().__init__(*_captions(labels, column))
        else:
            super().__init__(*_labels_and_names(labels, dataset.features[label_column], class_names, column))

    def name(self, index: int) -> str:
        return f"row {index}"

    def where(self, index: int) -> str:
        return f"row {index} of {self.dataset_name}"

    def stamp(self, index: int) -> str:
        return self._images._fingerprint  # of all rows: `datasets` derives it from the files

    def encoded(self, index: int) -> bytes:
        cell = self._images[index][self.image_column]
        if cell is None or (cell["bytes"] is None and cell["path"] is None):
            raise CorruptImageError(f"{self.where(index)} holds no image", "it holds no image")
        return cell["bytes"] if cell["bytes"] is not None else read_bytes(Path(cell["path"]))


def _captions(labels: pa.ChunkedArray, column: str) -> tuple[list[int], list[str]]:
    """The caption of each row, and all captions. Raises DataError for a column of something else."""
    if not (pa.types.is_string(labels.type) or pa.types.is_large_string(labels.type)):
        raise DataError(f"{column} holds {labels.type}: captions are text (--caption_column ...)")
    texts = labels.to_pylist()
    captions = sorted(set(texts))
    place = {caption: index for index, caption in enumerate(captions)}
    return [place[text] for text in texts], captions


def _labels_and_names(
    labels: pa.ChunkedArray,
    feature: datasets.Value | datasets.ClassLabel,
    given: Sequence[str] | str | None,
    column: str,
) -> tuple[list[int], list[str]]:
    """The label of each row, and the names of the classes. Raises DataError; `column` is what it calls the labels."""
    if pa.types.is_string(labels.type) or pa.types.is_large_string(labels.type):
        texts = labels.to_pylist()
        words = sorted(set(texts), key=natural_key)
        found, names = label_classes(words, given, column)
        label_of = dict(zip(words, found, strict=True))
        return [label_of[text] for text in texts], names
    if not pa.types.is_integer(labels.type):
        raise DataError(f"{column} holds {labels.type}: labels are whole numbers or text (--label_column ...)")
    values = labels.to_numpy()
    if values.min() < 0:
        row = int(values.argmin())
        raise DataError(f"{column} is {values[row]} in row {row}: labels count from 0 (is the split unlabelled?)")
    if isinstance(feature, datasets.ClassLabel):
        found, names = label_classes(feature.names, given, column, are_numbered=True)
        return np.array(found)[values].tolist(), names
    num_classes = int(values.max()) + 1
    if given is None:
        return values.tolist(), [f"class {label}" for label in range(num_classes)]
    names = read_class_names(given)
    if len(names) < num_classes:  # the last classes may have no images
        check_number(names, num_classes, column)
    return values.tolist(), names


def _holds_images(feature: object) -> bool:
    if isinstance(feature, datasets.Value):
        return feature.dtype in ("binary", "large_binary")
    return isinstance(feature, datasets.Image) or (isinstance(feature, dict) and set(feature) == {"bytes", "path"})
