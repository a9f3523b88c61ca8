"""All measures of a set of generated images at once, against the real ones and under several judges."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

import torch
from torch import Tensor

from marval_rl.data import ImageDataset
from marval_rl.evaluation.diversity import within_class_diversity
from marval_rl.evaluation.frechet import frechet_distance
from marval_rl.evaluation.mode_coverage import mode_entropy

BATCH_SIZE = 500
JUDGED = ("accuracy", "log_probability", "confidence")  # by each judge
FLOOR_DRAWS = 8  # random subsets of the train images over which the floor is averaged


class Judge(Protocol):
    """A classifier of the modes of a data set."""

    def mode_log_probs(self, images: Tensor) -> Tensor:
        """images [B, 3, H, W] in 0..1 -> log-probabilities [B, num_modes]."""


class ImageEvaluator:
    """Holds the statistics of the real images, so that each evaluation costs only the generated ones.

    train, test        the real images; the labels of generated images mean the classes of `train`
    feature_extractor  images [B, 3, H, W] in 0..1 -> features [B, F]: the space of the Frechet distance
    judges             name -> judge; the modes that coverage counts are those of all judges together
    """

    def __init__(
        self,
        train: ImageDataset,
        test: ImageDataset,
        feature_extractor: Callable[[Tensor], Tensor],
        judges: Mapping[str, Judge],
    ) -> None:
        if not judges:
            raise ValueError("evaluation needs at least one judge")
        self.feature_extractor = feature_extractor
        self.judges = dict(judges)
        self.num_modes = train.num_modes
        self.class_modes = torch.zeros(len(train.class_names), train.num_modes, dtype=torch.bool)
        self.class_modes[train.class_labels, train.modes] = True  # [classes, modes]
        self.train_features = _in_batches(feature_extractor, _in_colour(train.images))
        self.test_features = _in_batches(feature_extractor, _in_colour(test.images))
        self.real_diversity = within_class_diversity(_in_colour(test.images), test.class_labels)
        self.real_entropy = mode_entropy(train.modes, train.class_labels, train.num_modes)
        self._floors: dict[int, float] = {}

    @property
    def names(self) -> list[str]:
        """The figures that `evaluate` measures of these data, known before any image is generated."""
        judged = [f"{name}/{figure}" for name in self.judges for figure in JUDGED]
        several_modes = ["mode_coverage"] if self.real_entropy > 0 else []
        return ["frechet_distance", "frechet_floor", "diversity", *judged, *several_modes]

    def evaluate(self, images: Tensor, class_labels: Tensor) -> dict[str, float | None]:
        """Measure generated images [N, 1 or 3, H, W] in 0..1 of the classes class_labels [N].

        frechet_distance        to the real test images (lower is better; biased: compare equal N only)
        frechet_floor           the same for N real train images: what no generator should beat
        diversity               within-class pixel distance over that of real test images (1 is right)
        mode_coverage           entropy of the modes inside a class over that of real train images (1 is right);
                                None where each class has a single mode
        <judge>/accuracy        share of images whose most probable mode belongs to their class
        <judge>/log_probability mean log-probability of the class
        <judge>/confidence      mean of the largest probability of any mode

        Raises ValueError for mismatched lengths, wrong shapes, labels or pixels out of range, or fewer than
        2 images of a class.
        """
        images, class_labels = images.detach().float(), class_labels.to(images.device)
        self._check(images, class_labels)
        images = _in_colour(images)
        diversity = within_class_diversity(images, class_labels)
        members = self.class_modes.to(images.device)[class_labels]  # [N, modes]

        results: dict[str, float | None] = {
            "frechet_distance": frechet_distance(_in_batches(self.feature_extractor, images), self.test_features),
            "frechet_floor": self.frechet_floor(len(images)),
            "diversity": diversity / self.real_diversity,
        }
        log_prob_sum = torch.zeros(members.shape, device=images.device)
        for name, judge in self.judges.items():
            log_probs = _in_batches(judge.mode_log_probs, images)  # [N, modes]
            log_prob_sum += log_probs
            right = members.gather(1, log_probs.argmax(dim=1, keepdim=True))
            of_class = log_probs.masked_fill(~members, -torch.inf).logsumexp(dim=1)  # [N]
            results[f"{name}/accuracy"] = float(right.double().mean())
            results[f"{name}/log_probability"] = float(of_class.double().mean())
            results[f"{name}/confidence"] = float(log_probs.amax(dim=1).exp().double().mean())

        results["mode_coverage"] = None
        if self.real_entropy > 0:
            # All judges together, so that one that was trained on and fooled does not decide alone.
            entropy = mode_entropy(log_prob_sum.argmax(dim=1), class_labels, self.num_modes, self.class_modes)
            results["mode_coverage"] = entropy / self.real_entropy
        return results

    def frechet_floor(self, count: int) -> float:
        """The distance of `count` real train images (at most all) to the test images: a mean over random subsets."""
        count = min(count, len(self.train_features))
        if count not in self._floors:
            generator = torch.Generator().manual_seed(0)
            draws = [torch.randperm(len(self.train_features), generator=generator)[:count] for _ in range(FLOOR_DRAWS)]
            distances = [frechet_distance(self.train_features[draw], self.test_features) for draw in draws]
            self._floors[count] = sum(distances) / len(distances)
        return self._floors[count]

    def _check(self, images: Tensor, class_labels: Tensor) -> None:
        if images.ndim != 4 or images.shape[1] not in (1, 3):
            raise ValueError(f"images must have the shape [N, 1 or 3, H, W], not {list(images.shape)}")
        if class_labels.shape != images.shape[:1]:
            raise ValueError(f"class_labels has the shape {list(class_labels.shape)} for {len(images)} images")
        if len(images) == 0:
            raise ValueError("evaluation needs at least 2 images a class, but there are no images")
        low, high = (float(bound) for bound in images.aminmax())
        if not (low >= 0 and high <= 1):  # also refuses NaN
            raise ValueError(f"pixels must lie in 0..1, but they lie in {low:g}..{high:g}; clamp the images first")
        if not 0 <= int(class_labels.min()) <= int(class_labels.max()) < len(self.class_modes):
            found = f"{int(class_labels.min())}..{int(class_labels.max())}"
            raise ValueError(f"class labels must lie in 0..{len(self.class_modes) - 1}, but they lie in {found}")


def _in_colour(images: Tensor) -> Tensor:
    """Images [N, 1 or 3, H, W] -> [N, 3, H, W], so that judges and pixel distances do not depend on the channels."""
    return images.expand(-1, 3, -1, -1)


@torch.no_grad()
def _in_batches(function: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    """Apply a function of images [B, 3, H, W] to all images [N, 3, H, W] -> [N, F]."""
    return torch.cat([function(batch) for batch in images.split(BATCH_SIZE)])
