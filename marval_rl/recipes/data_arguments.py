"""What a recipe says of its data: the images, their latents, and the networks that judge them."""

# No `from __future__ import annotations`: the recipe parser reads the field types.

from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch.utils.data import Dataset

from marval_rl.data import (
    CroppedImages,
    ImageDataset,
    MomentsCache,
    load_image_dataset,
    load_labelled_images,
    load_moments,
)
from marval_rl.data.class_names import describe_classes
from marval_rl.data.image_folder import ImageFolder
from marval_rl.errors import RecipeError
from marval_rl.evaluation.evaluator import ImageEvaluator
from marval_rl.models import MARConfig
from marval_rl.rewarding import load_reward
from marval_rl.runtime.settings import EVALUATED, Conditions, Needs
from marval_rl.trainers.anchors import ANCHORED

DIGITS = "digits"
DIGIT_JUDGES = ("classifier", "held_out_classifier")


@dataclass
class DataArguments:
    """The images, and for the digits the networks that judge them."""

    dataset: str = field(
        default=DIGITS,
        metadata={"help": '"digits", a folder of class folders, parquet, a saved `datasets` folder, or a hub id.'},
    )
    labelling: str | None = field(
        default=None, metadata={"help": 'Classes of the digits: "digit" (default) or "parity".'}
    )
    image_column: str = field(default="image", metadata={"help": "Column of images (parquet, `datasets`)."})
    label_column: str = field(default="label", metadata={"help": "Column of class labels (parquet, `datasets`)."})
    class_names: str | None = field(
        default=None, metadata={"help": 'Names where the data has none: "imagenet", or a file of one name a line.'}
    )
    image_size: int | None = field(
        default=None, metadata={"help": "Images are cropped to this many pixels (default: the model's)."}
    )
    image_channels: int | None = field(
        default=None,
        metadata={"help": "1 turns images grey, 3 makes grey ones RGB (default: the model's; new ones ask the data)."},
    )
    flip: bool = field(default=True, metadata={"help": "Mirror half of the images (never the digits)."})
    vae: str | None = field(
        default=None, metadata={"help": "diffusers AutoencoderKL of the latents: folder or hub id (default: none)."}
    )
    cache_dir: str | None = field(
        default=None, metadata={"help": "Folder of VAE moments by `marval-rl cache`; read instead of the images."}
    )
    feature_extractor: str = field(
        default="classifier",
        metadata={"help": "Digits: reward with a method `features`, the space of the Frechet distance."},
    )
    judges: list[str] = field(
        default_factory=lambda: list(DIGIT_JUDGES),
        metadata={"help": "Digits: rewards with a method `mode_log_probs`: accuracy, mode coverage."},
    )

    counts_if: ClassVar[Conditions] = {
        Needs("the digits (dataset digits)", ("dataset",), lambda name: name == DIGITS): (
            *("labelling", "feature_extractor", "judges"),
        ),
        Needs("images of your own (another dataset than digits)", ("dataset",), lambda name: name != DIGITS): (
            *("image_column", "label_column", "class_names", "image_size", "image_channels", "flip", "cache_dir"),
        ),
        EVALUATED: ("feature_extractor", "judges"),
        ANCHORED: ("image_column", "label_column", "class_names", "image_size", "image_channels", "flip", "cache_dir"),
    }

    def __post_init__(self):
        if self.image_channels not in (None, 1, 3):
            raise ValueError(f"image_channels must be 1 or 3, not {self.image_channels}")
        if self.image_channels is not None and (self.are_digits or self.vae is not None or self.cache_dir is not None):
            other = "dataset digits" if self.are_digits else "vae" if self.vae is not None else "cache_dir"
            raise ValueError(f"image_channels {self.image_channels} cannot count with {other}: leave it out")

    @property
    def are_digits(self) -> bool:
        return self.dataset == DIGITS

    def load(self, split: str) -> ImageDataset:
        """The digits' split "train" or "test"."""
        return load_image_dataset(self.dataset, split, self.labelling)

    def load_training(self, image_size: int | None, seed: int) -> Dataset:
        """What is trained on: rows of "images" or cached "moments", and "class_labels"; it knows its `class_names`.

        Raises DataError for data that cannot be read, RecipeError where no size is known to crop to.
        """
        if self.are_digits:
            return self.load("train")
        if self.cache_dir is not None:
            return load_moments(self.cache_dir, flip=self.flip, seed=seed, class_names=self.class_names)
        size = self.image_size or image_size
        if size is None:
            raise RecipeError("image_size is not set: say how many pixels to crop images to (--image_size 256)")
        return CroppedImages(self.load_images(), size, flip=self.flip, seed=seed, channels=self.image_channels or 3)

    def announce(self, dataset: Dataset, process_index: int) -> None:
        """Prints what is trained on, once for all processes."""
        if process_index == 0:
            print(describe_data(dataset), flush=True)

    def load_images(self):
        """The images as they are, before they are cropped.

        Raises RecipeError if columns are named and the images lie in class folders, which have none.
        """
        images = load_labelled_images(
            self.dataset,
            image_column=self.image_column,
            label_column=self.label_column,
            class_names=self.class_names,
        )
        if isinstance(images, ImageFolder) and (self.image_column, self.label_column) != ("image", "label"):
            raise RecipeError(
                f"image_column {self.image_column} and label_column {self.label_column} count only for parquet and "
                f"`datasets`, and {self.dataset} holds class folders: leave them out"
            )
        return images

    def fit(self, config: MARConfig, model: str, dataset: Dataset | None = None) -> None:
        """Gives a model's configuration the recipe's VAE, and the names of its classes where it has none.

        Raises ValueError if the model was trained on other classes or another image size than this data's. dataset:
        what `load_training` gave; None where no image is read.
        """
        if self.vae is not None:
            config.vae = self.vae
        if dataset is None:
            return
        names = list(dataset.class_names)
        if config.num_classes != len(names) or (config.class_names is not None and config.class_names != names):
            known = ", ".join((config.class_names or ["unnamed"])[:3])
            raise ValueError(
                f"{model} knows {config.num_classes} classes ({known}, ...), "
                f"but the data has {len(names)} ({', '.join(names[:3])}, ...): "
                f"{'set --labelling or ' if self.are_digits else ''}choose another model"
            )
        config.class_names = names
        if isinstance(dataset, CroppedImages):
            dataset.image_size = self.image_size or config.image_size
            if self.image_channels is None:
                dataset.channels, dataset.refuse_colour = config.image_channels, config.image_channels == 1
        self._check_shape(config, model, dataset[0])

    def _check_shape(self, config: MARConfig, model: str, row: dict[str, Any]) -> None:
        side = config.image_size
        if "moments" in row:
            expected = (2 * config.latent_channels, side // config.latent_stride, side // config.latent_stride)
            if tuple(row["moments"].shape) != expected:
                raise ValueError(
                    f"{model} paints latents whose moments are {_shape(expected)}, those of {self.cache_dir} are "
                    f"{_shape(row['moments'].shape)}: cache with this model's VAE and image size"
                )
        elif tuple(row["images"].shape) != (config.image_channels, side, side):
            raise ValueError(
                f"{model} paints images of {_shape((config.image_channels, side, side))}, "
                f"the data's are {_shape(row['images'].shape)}"
            )

    def latents(self, dataset: Dataset) -> dict[str, Any]:
        """The fields of a MARConfig that follow from data to pretrain on: image size, latents, classes."""
        classes = {"num_classes": len(dataset.class_names), "class_names": list(dataset.class_names)}
        if self.vae is None:
            if self.image_channels is None and isinstance(dataset, CroppedImages) and dataset.looks_grey():
                dataset.channels, dataset.refuse_colour = 1, True
            channels, size, _ = dataset[0]["images"].shape
            # Clipping suits pixels, which lie in -1..1; latents do not.
            pixels = {"latent_stride": 1, "latent_channels": channels, "clip_sample_range": 1.0}
            return {"image_size": size, "image_channels": channels, **pixels, **classes}
        from marval_rl.models.vae import load_autoencoder, stride_of

        autoencoder = load_autoencoder(self.vae)
        stride, channels = stride_of(autoencoder), autoencoder.config.latent_channels
        row = dataset[0]
        size = row["moments"].shape[-1] * stride if "moments" in row else row["images"].shape[-1]
        return {
            "image_size": size,
            "latent_stride": stride,
            "latent_channels": channels,
            "vae": self.vae,
            **classes,
        }

    def evaluator(self) -> ImageEvaluator | None:
        """Compares generated digits with the real ones; None for other data, which `marval-rl evaluate` measures."""
        if not self.are_digits:
            return None
        judges = {name: load_reward(name) for name in self.judges}
        features = judges.get(self.feature_extractor) or load_reward(self.feature_extractor)
        return ImageEvaluator(self.load("train"), self.load("test"), features.features, judges)


def describe_data(dataset: Dataset) -> str:
    """How many images of which classes, and what changed since they were cached."""
    described = describe_classes(len(dataset), dataset.class_names)
    note = dataset.changes() if isinstance(dataset, MomentsCache) else None
    return described if note is None else f"{described}\nnote: {note}"


def _shape(shape: Any) -> str:
    return " x ".join(map(str, shape))
