"""The distribution anchor: MMD^2 between generated and real images of each class, in the features of an extractor.

A sister of `score_matching.py` that needs no teacher and no second network: real images are looked at once.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import datasets
import torch
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from marval_rl.data import CroppedImages
from marval_rl.evaluation.features import BATCH_SIZE, FeatureExtractor, load_extractor
from marval_rl.losses.distribution import RealFeatures, distribution_loss
from marval_rl.models import MaskedModel
from marval_rl.models.sampling import student_mean, unmask
from marval_rl.models.unmasking import random_order
from marval_rl.randomness import derive_seed, kept_random_state
from marval_rl.runtime.distributed import gather_objects, gather_rows

NOT_COMPARED = -1  # the set of conditions that are never generated in training
FEATURES, LABELS = "distribution_features", "distribution_labels"  # of recent images, in a trainer's buffer


class DistributionMatching:
    """Compares generated with real images.

    Args:
        args: The trainer's arguments.
        dataset: Rows {"images" or "moments", "class_labels"}.
        images_of: Rows of the data set -> images [B, 1 or 3, H, W] in 0..1.
        set_of: int64 [num_classes], of `sets_of`; each set must have real images.

    Raises:
        ValueError: For an extractor without a gradient, a class with fewer than two real images, or batches that hold
            too few images of a class.
    """

    def __init__(self, args: Any, dataset: Dataset, images_of: Callable[[dict[str, Tensor]], Tensor], set_of: Tensor):
        self.args = args
        self.set_of = set_of.to(args.device)
        compared = sorted(set(set_of.tolist()) - {NOT_COMPARED})
        offers = {"training_images": dataset.unflipped} if isinstance(dataset, CroppedImages) else None
        self.extractor = load_extractor(args.distribution_features, offers)
        check_company_of_a_class(args, len(compared))
        features, labels = real_features(args, self.extractor, dataset, images_of)
        sets = self.set_of[labels]
        few = [number for number in compared if int((sets == number).sum()) < 2]
        if few:
            what = "class" if args.distribution_column is None else f"set of {args.distribution_column}"
            raise ValueError(
                f"{what} {few[0]} has fewer than 2 images among the {len(labels)} that the distribution anchor "
                "compares with: give more data, raise distribution_real_images, or set distribution_weight 0"
            )
        known = sets != NOT_COMPARED
        self.real = RealFeatures.of(features[known], sets[known], args.distribution_kernel)

    def loss(self, images: Tensor, class_labels: Tensor, buffer: dict[str, Tensor]) -> Tensor:
        """MMD^2 over the images of all processes: in each its value, and the gradient of this process's images.

        Gradients are averaged over processes, so each has that of the sum. It does not matter how images are
        distributed among processes.

        Args:
            images: [B, 1 or 3, H, W] in 0..1, with gradient; equally many in each process.
            class_labels: [B].
            buffer: Keeps the features of recent images.
        """
        own = features_of(self.extractor, images)
        labels = self.set_of[gather_rows(class_labels)]
        features, num_processes = with_those_of_others(own)
        loss = distribution_loss(features, labels, self.real, buffer.get(FEATURES), buffer.get(LABELS))
        if (size := self.args.distribution_queue) > 0 and bool(features.isfinite().all()):  # waits for the device
            for name, rows in ((FEATURES, features.detach()), (LABELS, labels)):
                buffer[name] = torch.cat([buffer.get(name, rows[:0]), rows])[-size:].contiguous()
        return loss.detach() + num_processes * (loss - loss.detach())


def sets_of(rows: Any, num_classes: int, column: str | None) -> Tensor:
    """Which set of images each class or prompt belongs to: int64 [num_classes], NOT_COMPARED for those never generated.

    Args:
        rows: {"class_labels": int, ...}, what is rolled out.
        num_classes: Of the model.
        column: The sets are the values of this column of the rows; None makes each class a set of its own.

    Raises:
        ValueError: If there is no such column, or it has two values for one class.
    """
    if column is not None and column not in rows[0]:
        raise ValueError(
            f"distribution_column {column} is not a column of the prompts, which have "
            f"{', '.join(name for name in rows[0] if name != 'class_labels') or 'none but the prompt'}"
        )
    if column is None and not isinstance(rows, datasets.Dataset):  # reading them might read images
        return torch.arange(num_classes)
    labels = rows["class_labels"] if isinstance(rows, datasets.Dataset) else [row["class_labels"] for row in rows]
    values = labels if column is None else [row[column] for row in rows]
    number_of = {value: number for number, value in enumerate(dict.fromkeys(sorted(values)))}
    set_of = torch.full((num_classes,), NOT_COMPARED)
    for label, value in zip(labels, values, strict=True):
        number = int(label) if column is None else number_of[value]
        if set_of[label] not in (NOT_COMPARED, number):
            raise ValueError(f"{column} of the prompts has several values for one prompt, such as {value!r}: give one")
        set_of[label] = number
    return set_of


def features_of(extractor: FeatureExtractor, images: Tensor) -> Tensor:
    """Features [B, F] of images [B, 1 or 3, H, W] in 0..1, in float32 and with their gradient."""
    with torch.autocast(images.device.type, enabled=False):
        return extractor.features(images.float().expand(-1, 3, -1, -1)).float()


def with_those_of_others(own: Tensor) -> tuple[Tensor, int]:
    """The rows [B, F] of all P processes, of which this process's own have a gradient: [P B, F], and P."""
    if not torch.distributed.is_initialized():
        return own, 1
    rank, parts = torch.distributed.get_rank(), list(gather_rows(own).split(len(own)))
    parts[rank] = own
    return torch.cat(parts), len(parts)


def check_company_of_a_class(args: Any, num_classes: int) -> None:
    """Raises ValueError where most images would have no other of their class to be compared with."""
    images, classes = args.distribution_at_once(num_classes)
    if images + args.distribution_queue >= 2 * classes:
        return
    raise ValueError(
        f"distribution_weight {args.distribution_weight} compares the images of a class with each other, and {images} "
        f"images at once of {classes} classes are too few: set distribution_queue to at least "
        f"{2 * classes - images}, better ten times that, or take more images at once"
    )


def real_features(
    args: Any, extractor: FeatureExtractor, dataset: Any, images_of: Callable[[dict[str, Tensor]], Tensor]
) -> tuple[Tensor, Tensor]:
    """Features [M, F] and class labels [M] of at most `distribution_real_images` images, a fixed random choice.

    Each process reads its share of the batches, so that the features do not depend on their number. Raises ValueError
    if no gradient flows through the extractor.
    """
    chosen = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0))[: args.distribution_real_images]
    batches = chosen.split(BATCH_SIZE)
    mine: list[tuple[int, Tensor, Tensor]] = []
    for number in range(args.process_index, len(batches), args.world_size):
        rows = default_collate([dataset[index] for index in batches[number].tolist()])
        with torch.no_grad(), kept_random_state(args.device):
            torch.manual_seed(derive_seed("real images", number))  # of latents drawn from moments
            images = images_of(rows)
            features = features_of(extractor, images)
        if not mine and not features_of(extractor, images[:1].clone().requires_grad_()).requires_grad:
            raise ValueError(
                f"distribution_features {args.distribution_features} has no gradient: take pixels, clip:..., hf:..., "
                "timm:... or a differentiable reward with a method `features`, and keep this one for eval_features"
            )
        mine.append((number, features.cpu(), rows["class_labels"]))
    read = sorted((batch for share in gather_objects(mine) for batch in share), key=lambda batch: batch[0])
    _, parts, labels = zip(*read, strict=True)
    return torch.cat(parts).to(args.device), torch.cat(labels).to(args.device)


def generate_differentiably(student: MaskedModel, class_labels: Tensor, num_unmasking_steps: int) -> Tensor:
    """Tokens [B, L, C] that the student generates of these classes, with a gradient through all unmasking steps."""
    config, device = student.config, class_labels.device
    shape = (len(class_labels), config.num_tokens)
    inputs = {
        "class_labels": class_labels,
        "order": random_order(*shape, device),
        "noise": torch.randn(*shape, config.token_channels, device=device),
    }
    predict = partial(student_mean, student, inputs)
    steps = range(num_unmasking_steps)
    *_, last = unmask(predict, inputs["order"], config.token_channels, num_unmasking_steps, gradient_steps=steps)
    return last.tokens
