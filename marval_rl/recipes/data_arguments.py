"""The data of a recipe: the images, their latents, and the networks that judge them."""

# No `from __future__ import annotations`: the recipe parser reads the field types.

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from marval_rl.data import CroppedImages, LabelledImages, MomentsCache, hold_out, load_labelled_images, load_moments
from marval_rl.data.bundled import BUNDLED, find_groups
from marval_rl.data.class_names import describe_classes
from marval_rl.data.image_folder import ImageFolder
from marval_rl.data.sources import load_held_out
from marval_rl.errors import RecipeError
from marval_rl.evaluation.evaluator import ImageEvaluator
from marval_rl.image_size import ImageSize, height_and_width, shortest
from marval_rl.models import MaskedConfig
from marval_rl.recipes.evaluation_arguments import EvaluationArguments
from marval_rl.rewarding.loading import Offers
from marval_rl.runtime.settings import Conditions, Needs, setting
from marval_rl.trainers.anchors import READS_IMAGES

TrainingData = CroppedImages | MomentsCache


@dataclass
class DataArguments(EvaluationArguments):
    """The images, their classes, and what generated images are compared with."""

    dataset: str | None = setting(
        None,
        f"A bundled set ({', '.join(BUNDLED)}), a folder of class folders, parquet, a saved `datasets` "
        "folder, or a hub id.",
    )
    class_groups: dict[str, list[str]] | str | None = setting(
        None,
        "Classes to merge: new name -> the names of its classes, which become its modes; or the name of "
        "groups that a bundled set defines (parity).",
    )
    eval_dataset: str | None = setting(
        None, "Held-out images: the name of a split of `dataset` (val), or other images of its classes."
    )
    eval_holdout: float = setting(0.0, "Share of each class to hold out from training, where no split is held out.")
    image_column: str = setting("image", "Column of images (parquet, `datasets`).")
    label_column: str = setting("label", "Column of class labels (parquet, `datasets`).")
    caption_column: str | None = setting(
        None, "Column of captions (parquet, `datasets`), for a model of text; in place of label_column."
    )
    eval_prompts: str | None = setting(
        None,
        "Held-out prompts that evaluation generates, for a model of text: a file as `prompts` takes "
        "(default: the prompts or captions that are trained on).",
    )
    class_names: str | None = setting(
        None, 'Names where the data has none: "imagenet", or a file of one name per line.'
    )
    image_size: list[int] | None = setting(
        None,
        "Images are cropped to squares of this many pixels (one number), or to [height, width] where the latents are "
        "the pixels (default: the model's).",
    )
    image_channels: int | None = setting(
        None, "1 turns images grey, 3 makes grey ones RGB (default: the model's; of a new one the data's)."
    )
    flip: bool | None = setting(None, "Mirror half of the images (default: true; false for bundled digits).")
    vae: str | None = setting(None, "diffusers AutoencoderKL of the latents: folder or hub id (default: none).")
    cache_dir: str | None = setting(None, "Folder of VAE moments by `marval-rl cache`; read instead of the images.")
    counts_if: ClassVar[Conditions] = {
        Needs("images of your own (a data set that is not bundled)", ("dataset",), lambda name: name not in BUNDLED): (
            *("image_column", "label_column", "caption_column", "class_names", "eval_dataset", "eval_holdout"),
        ),
        READS_IMAGES: (
            *("image_column", "label_column", "class_names", "image_size", "image_channels", "flip"),
            "cache_dir",
        ),
    }

    def __post_init__(self):
        if self.eval_reference_images < 2:
            raise ValueError(f"eval_reference_images must be at least 2, not {self.eval_reference_images}")
        if self.image_channels not in (None, 1, 3):
            raise ValueError(f"image_channels must be 1 or 3, not {self.image_channels}")
        if self.image_channels is not None and (self.vae is not None or self.cache_dir is not None):
            other = "vae" if self.vae is not None else "cache_dir"
            raise ValueError(f"image_channels {self.image_channels} cannot count with {other}: leave it out")
        if isinstance(self.crop_size, list) and (self.vae is not None or self.cache_dir is not None):
            other = "vae" if self.vae is not None else "cache_dir"
            raise ValueError(
                f"image_size {self.crop_size} is not square, but with {other} images must be: give one number"
            )
        if not 0 <= self.eval_holdout < 1:
            raise ValueError(f"eval_holdout is a share of the images, in [0, 1), not {self.eval_holdout}")
        if self.eval_dataset is not None and self.eval_holdout:
            raise ValueError("eval_dataset and eval_holdout both say which images are held out: leave one out")
        if self.dataset in BUNDLED and isinstance(self.class_groups, str):
            find_groups(self.dataset, self.class_groups)

    @property
    def crop_size(self) -> int | list[int] | None:
        """image_size: one number for squares, else height and width; None where it is not set."""
        return None if self.image_size is None else shortest(height_and_width(self.image_size))

    @property
    def is_bundled(self) -> bool:
        return self.dataset in BUNDLED

    @property
    def flips(self) -> bool:
        """Whether half of the images are mirrored: a mirrored digit is not a digit."""
        return self.flip if self.flip is not None else not self.is_bundled

    def load_training(self, image_size: ImageSize | None, seed: int) -> TrainingData:
        """What is trained on: rows of "images" or cached "moments", and "class_labels"; it knows its `class_names`.

        Raises DataError for data that cannot be read, RecipeError where no size is known to crop to.
        """
        if self.cache_dir is not None:
            moments = load_moments(
                self.cache_dir, flip=self.flips, seed=seed, class_names=self.class_names, holdout=self.eval_holdout
            )
            return self._merge(moments)
        return self._crop_training(image_size, self.image_channels or 3, flip=self.flips, seed=seed)

    def _crop_training(self, image_size: ImageSize | None, channels: int, **flips: Any) -> CroppedImages:
        source = self.load_images()
        size = self.crop_size or image_size or source.image_size
        if size is None:
            raise RecipeError("image_size is not set: say how many pixels to crop images to (--image_size 256)")
        return CroppedImages(source, size, channels=channels, **flips)

    def announce(self, dataset: TrainingData, process_index: int) -> None:
        """Prints what is trained on, once for all processes."""
        if process_index == 0:
            print(describe_data(dataset), flush=True)

    def load_images(self) -> LabelledImages:
        """The images to train on as they are, before they are cropped; those that are held out are not among them."""
        source = self._load(self.dataset)
        return self._merge(hold_out(source, self.eval_holdout)[0] if self.eval_holdout else source)

    def load_held_out(self) -> LabelledImages | None:
        """The images that are never trained on, of the same classes; None where the data have none.

        They are the test split of a bundled set, those of `eval_dataset`, or the share `eval_holdout`.
        """
        if self.dataset in BUNDLED:
            return self._merge(load_labelled_images(self.dataset, "test"))
        if self.eval_holdout:
            return self._merge(hold_out(self._load(self.dataset), self.eval_holdout)[1])
        if self.dataset is None or self.eval_dataset is None:
            return None
        names = self._load(self.dataset).mode_names
        return self._merge(load_held_out(self.dataset, self.eval_dataset, self.class_names, names, **self._columns()))

    def crop(self, source: LabelledImages, config: MaskedConfig) -> CroppedImages:
        """Images as a model generates them, never mirrored: to compare with."""
        return CroppedImages(source, config.image_size, flip=False, channels=config.image_channels)

    def _columns(self) -> dict[str, Any]:
        return {name: vars(self)[name] for name in ("image_column", "label_column", "caption_column")}

    def _load(self, name: str | None) -> LabelledImages:
        if name is None:
            raise RecipeError(f"dataset is not set: name the images ({', '.join(BUNDLED)}, a folder, ...; --dataset)")
        images = load_labelled_images(name, class_names=self.class_names, **self._columns())
        if self.caption_column is not None and isinstance(images, ImageFolder):
            raise RecipeError(
                f"caption_column {self.caption_column} counts only for parquet and `datasets`, and {name} names its "
                "classes otherwise: leave it out"
            )
        if isinstance(images, ImageFolder) and (self.image_column, self.label_column) != ("image", "label"):
            raise RecipeError(
                f"image_column {self.image_column} and label_column {self.label_column} count only for parquet and "
                f"`datasets`, and {name} holds class folders: leave them out"
            )
        return images

    def _merge(self, data: Any) -> Any:
        if self.class_groups:
            data.merge_classes(find_groups(self.dataset, self.class_groups))
        return data

    def fit(self, config: MaskedConfig, model: str, dataset: TrainingData | None = None) -> None:
        """Gives a model's configuration the recipe's VAE, and the names of its classes where it has none.

        Raises ValueError if the model was trained on other classes or another image size than this data's. dataset:
        what `load_training` gave; None where no image is read.
        """
        if self.vae is not None:
            config.vae = self.vae
        if dataset is None:
            return
        names = list(dataset.class_names)
        if not config.takes_prompts:
            if config.num_classes != len(names) or (config.class_names is not None and config.class_names != names):
                known = ", ".join((config.class_names or ["unnamed"])[:3])
                raise ValueError(
                    f"{model} knows {config.num_classes} classes ({known}, ...), "
                    f"but the data has {len(names)} ({', '.join(names[:3])}, ...): "
                    "set --class_groups, or choose another model"
                )
            config.class_names = names
        if isinstance(dataset, CroppedImages):
            dataset.image_size = self.crop_size or config.image_size
            if self.image_channels is None:
                dataset.channels, dataset.refuse_colour = config.image_channels, config.image_channels == 1
        self._check_shape(config, model, dataset[0])

    def _check_shape(self, config: MaskedConfig, model: str, row: dict[str, Any]) -> None:
        if "moments" in row:
            rows, columns = (config.patch_size * length for length in config.grid)
            expected = (2 * config.latent_channels, rows, columns)
            if tuple(row["moments"].shape) != expected:
                raise ValueError(
                    f"{model} generates latents whose moments are {_shape(expected)}, those of {self.cache_dir} are "
                    f"{_shape(row['moments'].shape)}: cache with this model's VAE and image size"
                )
        elif tuple(row["images"].shape) != config.image_shape:
            raise ValueError(
                f"{model} generates images of {_shape(config.image_shape)}, "
                f"the data's are {_shape(row['images'].shape)}"
            )

    def text_latents(self, dataset: TrainingData, patch_size: int) -> dict[str, Any]:
        """As `latents`, for a model of text: the tokens of TA-TiTok, or of patches of pixels."""
        captions = {"num_classes": len(dataset.class_names), "class_names": list(dataset.class_names)}
        if self.vae is not None:
            from marval_rl.models.maskgen.codec import load_tokenizer

            tokenizer = load_tokenizer(self.vae).config
            names = ("image_size", "num_tokens", "latent_channels", "text_width", "text_length")
            return {**{name: getattr(tokenizer, name) for name in names}, "vae": self.vae, **captions}
        found = self.latents(dataset)
        (height, width), channels = height_and_width(found["image_size"]), found["image_channels"]
        if height % patch_size or width % patch_size:
            raise ValueError(f"patch_size {patch_size} does not divide the images' {height} x {width} pixels")
        return {
            "image_size": found["image_size"],
            "image_channels": channels,
            "num_tokens": (height // patch_size) * (width // patch_size),
            "latent_channels": channels * patch_size**2,
            "clip_sample_range": found["clip_sample_range"],
            **captions,
        }

    def latents(self, dataset: TrainingData) -> dict[str, Any]:
        """The fields of a MARConfig that follow from data to pretrain on: image size, latents, classes."""
        classes = {"num_classes": len(dataset.class_names), "class_names": list(dataset.class_names)}
        if self.vae is None:
            if self.image_channels is None and isinstance(dataset, CroppedImages) and dataset.looks_grey():
                dataset.channels, dataset.refuse_colour = 1, True
            channels, *size = torch.as_tensor(dataset[0]["images"]).shape
            # Clipping suits pixels, which lie in -1..1; latents do not.
            pixels = {"latent_stride": 1, "latent_channels": channels, "clip_sample_range": 1.0}
            return {"image_size": shortest(size), "image_channels": channels, **pixels, **classes}
        from marval_rl.models.vae import load_autoencoder, stride_of

        autoencoder = load_autoencoder(self.vae)
        stride, channels = stride_of(autoencoder), autoencoder.config.latent_channels
        row: dict[str, Any] = dataset[0]
        size = row["moments"].shape[-1] * stride if "moments" in row else row["images"].shape[-1]
        return {
            "image_size": size,
            "latent_stride": stride,
            "latent_channels": channels,
            "vae": self.vae,
            **classes,
        }

    def evaluator(self, config: MaskedConfig) -> ImageEvaluator:
        """Measures the images of a model, against these data where they are there.

        Raises:
            ValueError, MarvalError: For feature extractors, judges or images that cannot be loaded.
        """
        judges = list(BUNDLED[self.dataset].judges) if self.dataset in BUNDLED else []
        # A run on cached latents may not have the images; one that names held-out images has them.
        has_images = self.dataset is not None and (self.cache_dir is None or self.names_held_out)
        load_real = (lambda: (self.load_held_out(), self.load_images())) if has_images else None
        return self.make_evaluator(config, judges, load_real, self.offers(lambda: config))

    def offers(self, load_config: Callable[[], MaskedConfig | None]) -> Offers:
        """What rewards may learn from: the images that a model is trained on, as it generates them.

        load_config: Loads the model's configuration, when a reward asks for the images; None where there is no model.
        """

        def training_images() -> CroppedImages:
            config = load_config()
            size, channels = (None, 3) if config is None else (config.image_size, config.image_channels)
            return self._crop_training(size, channels, flip=False)

        return {"training_images": training_images}

    @property
    def names_held_out(self) -> bool:
        return self.is_bundled or self.eval_dataset is not None or self.eval_holdout > 0


def describe_data(dataset: TrainingData) -> str:
    """How many images of which classes, and what changed since they were cached."""
    described = describe_classes(len(dataset), dataset.class_names)
    note = dataset.changes() if isinstance(dataset, MomentsCache) else None
    return described if note is None else f"{described}\nnote: {note}"


def _shape(shape: Any) -> str:
    return " x ".join(map(str, shape))
