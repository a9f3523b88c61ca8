"""The one evaluation: what is measured of each image, and the figures that follow from a set of them."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property, partial
from typing import Protocol

import torch
from torch import Tensor

from marval_rl.errors import DataError
from marval_rl.evaluation.features import BATCH_SIZE, FeatureExtractor, Inception, features_of, fingerprint, shrink
from marval_rl.evaluation.image_set import to_pixels
from marval_rl.evaluation.image_statistics import STATISTICS, colourfulness_entropy, image_statistics
from marval_rl.evaluation.measures import (
    NEIGHBOURS,
    SCORE_SPLITS,
    Gaussian,
    cluster_centres,
    cluster_entropy,
    frechet_distance,
    gaussian_of,
    inception_score,
    kernel_distance,
    mode_entropy,
    precision_and_recall,
    within_class_diversity,
)
from marval_rl.evaluation.references import RealImages, Reference, Rows, measure_real
from marval_rl.image_size import ImageSize, height_and_width
from marval_rl.models.generation import balanced_labels
from marval_rl.rewarding import RewardSet
from marval_rl.rewarding.reward_set import checked_images

JUDGED = ("accuracy", "log_probability", "confidence")  # by each judge
REAL_DRAWS = 8  # random subsets of real images over which what they reach themselves is averaged
THUMBNAIL_SIZE = 32  # images are compared pixel by pixel at most at this size
IMAGES_A_CLUSTER, MAX_CLUSTERS = 25, 50  # of real features, where the modes are not known

Figures = dict[str, float | None]
Measure = tuple[
    list[str], Callable[[Rows], Sequence[float | None]]
]  # names, and the function of the rows that gives their values


class Judge(Protocol):
    """A classifier of the modes of a data set."""

    def mode_log_probs(self, images: Tensor) -> Tensor:
        """images [B, 3, H, W] in 0..1 -> log-probabilities [B, num_modes]."""


class ImageEvaluator:
    """Measures sets of generated images against real ones and under several judges.

    `measure` looks at a batch of images, and `figures` at what was measured of all of them: several processes can
    share the work, and no image has to stay in memory. docs/evaluation.md explains each figure.

    Args:
        extractors: Name -> feature extractor. The first one's figures have plain names (kid); where there are several,
            all have names with theirs, too (kid/pixels).
        reference: The real images, or statistics of them in the features of the first extractor.
        train: Other real images, for the floor; None to leave it out.
        class_of_mode: int64 [num_modes], the class that each mode belongs to; None where it is not known.
        judges: Name -> classifier of the modes.

    Raises:
        ValueError: For judges of unknown modes.
    """

    def __init__(
        self,
        extractors: Mapping[str, FeatureExtractor] | None = None,
        reference: Reference | None = None,
        train: RealImages | None = None,
        class_of_mode: Tensor | None = None,
        judges: Mapping[str, Judge] | None = None,
    ) -> None:
        self.extractors = dict(extractors or {})
        self.reference = Reference() if reference is None else reference
        self.train = train
        self.class_of_mode = class_of_mode
        self.judges = dict(judges or {})
        self.rewards: RewardSet | None = None
        self.device: torch.device | str = "cpu"  # where real images are measured
        if self.judges and class_of_mode is None:
            raise ValueError("judges need to know which class each mode belongs to, and these data have no classes")
        self._measured: dict[str, Rows] = {}
        self._gaussians: dict[str, Gaussian] = {}
        self._centres: dict[str, Tensor] = {}

    def add_rewards(
        self, rewards: RewardSet, prompts: Callable[[list[str]], list[str]], class_names: Sequence[str]
    ) -> None:
        """Score generated images by rewards that are not trained on.

        Args:
            rewards: The rewards.
            prompts: The class names of images -> their prompts.
            class_names: The name of each label.
        """
        self.rewards, self.prompts, self.class_names = rewards, prompts, class_names

    def check_statistics(self, image_size: ImageSize) -> None:
        """Raises DataError if the reference's statistics are of other features than the first extractor's."""
        if self.reference.gaussian is None or not self.extractors:
            return
        name, extractor = next(iter(self.extractors.items()))
        probe = torch.zeros(1, 3, *height_and_width(image_size))
        width, stored = features_of(extractor, probe).shape[1], len(self.reference.gaussian.mean)
        if width != stored:
            raise DataError(
                f"{self.reference.path} holds the statistics of {stored} features, but {name}, the first of "
                f"eval_features, has {width}: name first the extractor that they were made with"
            )

    # ---- What is measured of each image ----

    def measure(self, pixels: Tensor, class_labels: Tensor | None = None) -> Rows:
        """Of images uint8 [B, 3, H, W], of the classes int64 [B] where they have some: [B, ...] each, on the CPU."""
        images = pixels.float() / 255
        rows = {key: values for part in self._parts.values() for key, values in part(images).items()}
        if class_labels is None:
            return rows
        if self.judges and not 0 <= int(class_labels.min()) <= int(class_labels.max()) < len(self._class_modes):
            found = f"{int(class_labels.min())}..{int(class_labels.max())}"
            raise ValueError(f"class labels must lie in 0..{len(self._class_modes) - 1}, but they lie in {found}")
        rows["class_labels"] = class_labels.cpu()
        rows |= {key: values for part in self._judged_parts.values() for key, values in part(images).items()}
        if self.rewards is not None:
            names = [self.class_names[label] for label in class_labels.tolist()]
            scores = self.rewards.score(images, self.prompts(names), class_labels.to(images.device), names)
            rows |= {f"reward/{name}": values.float().cpu() for name, values in scores.components.items()}
        return rows

    @property
    def _parts(self) -> dict[str, Callable[[Tensor], Rows]]:
        """The measurements of generated and real images alike; images [B, 3, H, W] in 0..1."""
        features = {name: partial(_feature_rows, name, extractor) for name, extractor in self.extractors.items()}
        return {"pixels of the image": _image_rows, **features}

    @property
    def _judged_parts(self) -> dict[str, Callable[[Tensor], Rows]]:
        return {f"judge {name}": partial(_judge_rows, name, judge) for name, judge in self.judges.items()}

    @property
    def real(self) -> Rows:
        """What was measured of the reference's images; they are read when this is first asked for."""
        images = self._real_images
        return self._measure_real(images, {} if images.modes is None else self._judged_parts)

    @property
    def _real_images(self) -> RealImages:
        assert self.reference.images is not None  # what needs them is not among the measures without them
        return self.reference.images

    def _measure_real(self, images: RealImages, judged: dict[str, Callable[[Tensor], Rows]]) -> Rows:
        if images.identity not in self._measured:
            size = images.read([0]).shape[-2:]
            networks = {name: extractor.features for name, extractor in self.extractors.items()}
            networks |= {f"judge {name}": judge.mode_log_probs for name, judge in self.judges.items()}
            identities = {name: fingerprint(network, size) for name, network in networks.items()}
            self._measured[images.identity] = measure_real(images, self._parts | judged, identities, self.device)
        return self._measured[images.identity]

    # ---- Figures of a set of images ----

    def names(self, num_images: int, num_classes: int | None = None) -> list[str]:
        """The figures of so many generated images, the classes equally often; known before any is generated."""
        labels = None if num_classes is None else balanced_labels(num_images, num_classes)
        return [name for names, _ in self._measures(num_images, labels) for name in names]

    def figures(self, rows: Rows) -> Figures:
        """The figures of the images that these rows were measured of; None where one has no value, such as the ratio
        to a real value of 0."""
        figures: Figures = {}
        for names, function in self._measures(len(rows["thumbnails"]), rows.get("class_labels")):
            figures |= dict(zip(names, function(rows), strict=True))
        return figures

    def evaluate(self, images: Tensor, class_labels: Tensor | None = None) -> Figures:
        """The figures of generated images [N, 1 or 3, H, W] in 0..1. Raises ValueError for invalid ones."""
        images = checked_images(images)
        if class_labels is not None and class_labels.shape != images.shape[:1]:
            raise ValueError(f"class_labels has the shape {list(class_labels.shape)} for {len(images)} images")
        return self.figures(self.measure(to_pixels(images), class_labels))

    def per_class(self, rows: Rows, class_names: Sequence[str]) -> dict[str, Figures]:
        """The figures of each class that occurs, where a single class has them: judges, rewards, diversity.

        Args:
            rows: As in `figures`.
            class_names: The name of each label.
        """
        if "class_labels" not in rows:
            return {}
        real = self.reference.images
        table: dict[str, Figures] = {}
        for label in rows["class_labels"].unique().tolist():
            own = {key: values[rows["class_labels"] == label] for key, values in rows.items()}
            found: Figures = {}
            for name in self.judges:
                found |= dict(zip((f"{name}/{figure}" for figure in JUDGED), self._judged(name, own), strict=True))
            for name in self.rewards.names if self.rewards is not None else ():
                found[name] = _mean(own[f"reward/{name}"])
            if real is not None and real.class_labels is not None and _have_pairs(own["class_labels"]):
                others = self.real["thumbnails"][real.class_labels == label]
                if len(others) >= 2:
                    spread = within_class_diversity(own["thumbnails"], own["class_labels"])
                    zeros = torch.zeros(len(others), dtype=torch.long)
                    found["diversity"] = _ratio(spread, within_class_diversity(others, zeros))
            table[class_names[label]] = found
        return {name: found for name, found in table.items() if found}

    def _measures(self, count: int, labels: Tensor | None) -> Iterator[Measure]:
        """What `count` images of these labels are measured by."""
        real = self.reference.images
        if self._has_judged_modes and labels is not None:
            yield ["mode_coverage"], self._mode_coverage
        for position, name in enumerate(self.extractors):
            for figure_names, function in self._feature_measures(name, count):
                plain = figure_names if position == 0 else []
                if plain == ["mode_coverage"] and self._has_judged_modes and labels is not None:
                    plain = []
                named = [f"{figure}/{name}" for figure in figure_names] if len(self.extractors) > 1 else []
                repeats = bool(plain) + bool(named)
                yield [*plain, *named], _repeated(function, repeats)
            if isinstance(self.extractors[name], Inception) and count >= SCORE_SPLITS:
                yield ["inception_score"], partial(self._inception_score, name)
        if labels is not None and real is not None and real.class_labels is not None and _have_pairs(labels):
            yield ["diversity"], self._diversity
        for name in self.judges if labels is not None else ():
            yield [f"{name}/{figure}" for figure in JUDGED], partial(self._judged, name)
            if real is not None and real.modes is not None:
                yield [f"{name}/real_{figure}" for figure in JUDGED], partial(self._judged_real, name)
        for name in self.rewards.names if labels is not None and self.rewards is not None else ():
            yield [f"rewards/{name}/mean"], partial(self._mean_reward, name)
        suffixes = ["", "/vs_real"] if real is not None else [""]
        looked_at = [*STATISTICS, "colourfulness_entropy"]
        yield [f"image/{name}{suffix}" for suffix in suffixes for name in looked_at], self._image_figures

    def _feature_measures(self, name: str, count: int) -> Iterator[Measure]:
        """The figures in the features of an extractor."""
        reference, key = self.reference, f"features/{name}"
        num_real = 0 if reference.images is None else len(reference.images)
        stored = reference.gaussian is not None and name == next(iter(self.extractors))
        if count >= 2 and (stored or num_real >= 2):
            yield ["frechet_distance"], lambda rows: [frechet_distance(rows[key], self._reference_gaussian(name))]
            if self.train is not None and min(count, len(self.train)) >= 2:
                yield ["frechet_floor"], lambda rows: [self._frechet_floor(name, count)]
        if min(count, num_real) >= 2:
            yield ["kid"], lambda rows: [kernel_distance(rows[key], self.real[key])]
        if min(count, num_real) > NEIGHBOURS:
            yield ["precision", "recall"], lambda rows: precision_and_recall(rows[key], self.real[key])
        if count >= IMAGES_A_CLUSTER and num_real >= 2 * IMAGES_A_CLUSTER:
            yield ["mode_coverage"], lambda rows: [self._cluster_coverage(name, rows[key])]

    def _reference_gaussian(self, name: str) -> Gaussian:
        if self.reference.gaussian is not None and name == next(iter(self.extractors)):
            return self.reference.gaussian
        if name not in self._gaussians:
            self._gaussians[name] = gaussian_of(self.real[f"features/{name}"])
        return self._gaussians[name]

    def _frechet_floor(self, name: str, count: int) -> float:
        """The distance of `count` other real images (at most all) to the reference: what no generator should beat."""
        assert self.train is not None  # else there is no floor among the measures
        features = self._measure_real(self.train, {})[f"features/{name}"]
        draws = [frechet_distance(features[draw], self._reference_gaussian(name)) for draw in _draws(features, count)]
        return sum(draws) / len(draws)

    def _cluster_coverage(self, name: str, features: Tensor) -> float | None:
        """Entropy of the clusters of real images that generated ones fall into, over that of equally many real ones."""
        real = self.real[f"features/{name}"]
        if name not in self._centres:
            self._centres[name] = cluster_centres(real, min(MAX_CLUSTERS, len(real) // IMAGES_A_CLUSTER))
        centres = self._centres[name]
        entropies = [cluster_entropy(real[draw], centres) for draw in _draws(real, len(features))]
        return _ratio(cluster_entropy(features, centres), sum(entropies) / len(entropies))

    # ---- Classes and modes ----

    @cached_property
    def _class_modes(self) -> Tensor:
        """bool [classes, modes]: which modes belong to a class."""
        assert self.class_of_mode is not None  # checked for judges, and nothing else asks
        return torch.arange(int(self.class_of_mode.max()) + 1).unsqueeze(1).eq(self.class_of_mode)

    @property
    def _has_judged_modes(self) -> bool:
        """Whether a class has several modes, a judge distinguishes them, and real images show their shares."""
        real = self.reference.images
        if not self.judges or real is None or real.modes is None:
            return False
        return int(self._class_modes.sum(1).max()) > 1

    def _mode_coverage(self, rows: Rows) -> list[float | None]:
        """By all judges together, so that one that was trained on and fooled does not decide alone."""
        modes = torch.stack([rows[f"judge/{name}"] for name in self.judges]).sum(dim=0).argmax(dim=1)
        real, num_modes = self._real_images, self._class_modes.shape[1]
        assert real.modes is not None
        entropy = mode_entropy(modes, rows["class_labels"], num_modes, self._class_modes)
        return [_ratio(entropy, mode_entropy(real.modes, self._real_labels, num_modes))]

    def _judged_real(self, name: str, _: Rows) -> list[float]:
        """Of the reference's images: how good the judge is, and what a perfect generator would reach."""
        return self._judged(name, self.real | {"class_labels": self._real_labels})

    def _judged(self, name: str, rows: Rows) -> list[float]:
        log_probs, labels = rows[f"judge/{name}"], rows["class_labels"]
        members = self._class_modes[labels]  # [N, modes]
        right = members.gather(1, log_probs.argmax(dim=1, keepdim=True)).double().mean()
        of_class = log_probs.masked_fill(~members, -torch.inf).logsumexp(dim=1).double().mean()
        return [float(right), float(of_class), float(log_probs.amax(dim=1).exp().double().mean())]

    def _diversity(self, rows: Rows) -> list[float | None]:
        real = within_class_diversity(self.real["thumbnails"], self._real_labels)
        return [_ratio(within_class_diversity(rows["thumbnails"], rows["class_labels"]), real)]

    @property
    def _real_labels(self) -> Tensor:
        labels = self._real_images.class_labels
        assert labels is not None
        return labels

    @staticmethod
    def _inception_score(name: str, rows: Rows) -> list[float]:
        return [inception_score(rows[f"logits/{name}"])]

    @staticmethod
    def _mean_reward(name: str, rows: Rows) -> list[float | None]:
        return [_mean(rows[f"reward/{name}"])]

    def _image_figures(self, rows: Rows) -> list[float | None]:
        found = _statistics(rows)
        if self.reference.images is None:
            return [*found]
        return [*found, *map(_ratio, found, _statistics(self.real))]


def mean_and_std(draws: Sequence[Figures]) -> tuple[Figures, dict[str, float]]:
    """Each figure's mean over the draws, and its standard deviation where there are several."""
    values = {name: [value for draw in draws if (value := draw[name]) is not None] for name in draws[0]}
    means = {name: statistics.mean(found) if found else None for name, found in values.items()}
    return means, {name: statistics.stdev(found) for name, found in values.items() if len(found) > 1}


def _image_rows(images: Tensor) -> Rows:
    thumbnails = (shrink(images, THUMBNAIL_SIZE) * 255).round().to(torch.uint8)
    return {"statistics": image_statistics(images).cpu(), "thumbnails": thumbnails.cpu()}


def _feature_rows(name: str, extractor: FeatureExtractor, images: Tensor) -> Rows:
    if not isinstance(extractor, Inception):
        return {f"features/{name}": features_of(extractor, images)}
    parts = [extractor.features_and_logits(part) for part in images.split(BATCH_SIZE)]
    pool, logits = (torch.cat(layer).cpu() for layer in zip(*parts, strict=True))
    return {f"features/{name}": pool, f"logits/{name}": logits}


@torch.no_grad()
def _judge_rows(name: str, judge: Judge, images: Tensor) -> Rows:
    return {f"judge/{name}": torch.cat([judge.mode_log_probs(part).float().cpu() for part in images.split(BATCH_SIZE)])}


def _statistics(rows: Rows) -> list[float]:
    measured = rows["statistics"]
    return [*measured.double().mean(0).tolist(), colourfulness_entropy(measured)]


def _draws(rows: Tensor, count: int) -> list[Tensor]:
    """Random subsets of `count` rows (at most all), by a fixed seed."""
    generator = torch.Generator().manual_seed(0)
    draws = 1 if count >= len(rows) else REAL_DRAWS
    return [torch.randperm(len(rows), generator=generator)[:count] for _ in range(draws)]


def _repeated(
    function: Callable[[Rows], Sequence[float | None]], times: int
) -> Callable[[Rows], Sequence[float | None]]:
    return lambda rows: list(function(rows)) * times


def _have_pairs(labels: Tensor) -> bool:
    """Whether each class that occurs has 2 images at least."""
    return int(labels.unique(return_counts=True)[1].min()) >= 2


def _ratio(value: float, real: float) -> float | None:
    return value / real if real else None


def _mean(scores: Tensor) -> float | None:
    scored = scores[~scores.isnan()].double()
    return float(scored.mean()) if len(scored) else None
