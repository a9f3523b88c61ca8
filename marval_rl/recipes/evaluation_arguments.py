"""The evaluation of a recipe: what generated images are compared with, in which features, and by which judges."""

# No `from __future__ import annotations`: the recipe parser reads the field types.

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch

from marval_rl.data import LabelledImages
from marval_rl.errors import DataError
from marval_rl.evaluation.evaluator import ImageEvaluator
from marval_rl.evaluation.features import KINDS, load_extractors
from marval_rl.evaluation.references import RealImages, Reference, images_of_data, open_reference
from marval_rl.models import MaskedConfig
from marval_rl.rewarding import load_reward
from marval_rl.rewarding.loading import Offers
from marval_rl.runtime.settings import EVALUATED, Conditions, setting

NONE = "none"


@dataclass
class EvaluationArguments:
    """What generated images are compared with, and by what."""

    eval_features: list[str] | None = setting(
        None,
        f"Feature extractors: {KINDS}, or rewards with a method `features`. The first one gives "
        "frechet_distance, kid, ... their plain names (default: the data's first judge if any, and pixels).",
    )
    eval_reference: str | None = setting(
        None,
        "Real images to compare with: a folder, or statistics in .npz or torch-fidelity's .pt; none to "
        "leave them out (default: the held-out images, else a sample of the training images).",
    )
    eval_reference_images: int = setting(5000, "Real images of the data to compare with, at most.")
    judges: list[str] | None = setting(
        None, "Rewards with a method `mode_log_probs`: accuracy, coverage of modes (default: the data set's)."
    )

    counts_if: ClassVar[Conditions] = {
        EVALUATED: ("eval_features", "eval_reference", "eval_reference_images", "judges"),
    }

    def make_evaluator(
        self,
        config: MaskedConfig,
        judges: list[str],
        load_real: Callable[[], tuple[LabelledImages | None, LabelledImages]] | None,
        offers: Offers,
    ) -> ImageEvaluator:
        """What measures the images of a model.

        Args:
            config: The model's configuration: how large its images are.
            judges: The data set's own judges.
            load_real: Loads the images of the data that are never trained on, or None if there are none, and those
                that are trained on; None if no images can be read.
            offers: Of `load_reward`, for extractors and judges.

        Raises:
            ValueError, MarvalError: For extractors, judges or images that cannot be loaded.
        """
        judges = judges if self.judges is None else self.judges
        features = self.eval_features if self.eval_features is not None else [*judges[:1], "pixels"]
        reference, train, source = self._load_reference(config, load_real, bool(judges))
        evaluator = ImageEvaluator(
            load_extractors(features, offers),
            reference,
            train,
            class_of_mode=None if source is None else torch.tensor(source.class_of_mode),
            judges={name: load_reward(name, offers) for name in judges},
        )
        evaluator.check_statistics(config.image_size)
        return evaluator

    def _load_reference(
        self,
        config: MaskedConfig,
        load_real: Callable[[], tuple[LabelledImages | None, LabelledImages]] | None,
        needs_classes: bool,
    ) -> tuple[Reference | None, RealImages | None, LabelledImages | None]:
        """The reference, other real images for the floor, and images that know the classes."""
        held_out: LabelledImages | None = None
        training: LabelledImages | None = None
        if load_real is not None and (needs_classes or self.eval_reference is None):
            try:
                held_out, training = load_real()
            except DataError as error:
                raise DataError(
                    f"{error}. Evaluation compares with these images: set eval_reference to a folder or statistics of "
                    "others, or to none"
                ) from error
        source = training if held_out is None else held_out
        if source is not None and not _knows(config, source.class_names):
            raise ValueError(
                f"the model knows {len(config.class_names)} classes ({', '.join(config.class_names[:3])}, ...), but "
                f"evaluation compares with {len(source.class_names)} ({', '.join(source.class_names[:3])}, ...): set "
                "--dataset and --class_groups to those that the model was trained on, or eval_reference to none"
            )
        if self.eval_reference is not None:
            if self.eval_reference == NONE:
                return None, None, source
            return open_reference(Path(self.eval_reference), config.image_size), None, source
        if source is None or training is None:
            return None, None, None
        shape = (config.image_size, config.image_channels, self.eval_reference_images)
        train = None if held_out is None else images_of_data(training, *shape)
        return Reference(images=images_of_data(source, *shape)), train, source


def _knows(config: MaskedConfig, names: list[str]) -> bool:
    """Whether labels of images of these classes are a model's own; of captions others may follow."""
    if config.class_names is None:
        return True
    return config.class_names[: len(names)] == names and (config.takes_prompts or config.num_classes == len(names))
