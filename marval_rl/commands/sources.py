"""What a recipe says beside the trainer's arguments: data, models, rewards, judges."""

# No `from __future__ import annotations`: the recipe parser reads the field types.

from dataclasses import dataclass, field

from marval_rl.data import ImageDataset, load_image_dataset
from marval_rl.evaluation.evaluator import ImageEvaluator
from marval_rl.models import MARConfig
from marval_rl.rewarding import load_reward


@dataclass
class DataArguments:
    """The images and the networks that judge them."""

    dataset: str = field(default="digits", metadata={"help": 'Images to train on and to compare with: "digits".'})
    labelling: str | None = field(
        default=None, metadata={"help": 'Classes of the images; digits: "digit" or "parity".'}
    )
    feature_extractor: str = field(
        default="classifier", metadata={"help": "Reward with a method `features`: the space of the Frechet distance."}
    )
    judges: list[str] = field(
        default_factory=lambda: ["classifier", "held_out_classifier"],
        metadata={"help": "Rewards with a method `mode_log_probs`: accuracy, log-probability, mode coverage."},
    )

    def load(self, split: str) -> ImageDataset:
        """The split "train" or "test"."""
        return load_image_dataset(self.dataset, split, self.labelling)

    def check_classes(self, config: MARConfig, model: str) -> None:
        """Raises ValueError if a model was trained on other classes or another image size than this data's."""
        data = self.load("test")
        names, size = list(data.class_names), data.images.shape[-1]
        if config.num_classes != len(names) or (config.class_names is not None and config.class_names != names):
            known = ", ".join((config.class_names or ["unnamed"])[:3])
            raise ValueError(
                f"{model} knows {config.num_classes} classes ({known}, ...), "
                f"but the data has {len(names)} ({', '.join(names[:3])}, ...): set --labelling or choose another model"
            )
        if (config.image_size, config.image_channels) != (size, data.images.shape[1]):
            raise ValueError(
                f"{model} paints images of {config.image_channels} x {config.image_size} x {config.image_size}, "
                f"the data's are {data.images.shape[1]} x {size} x {size}"
            )

    def evaluator(self) -> ImageEvaluator:
        """Compares generated images with the real ones."""
        judges = {name: load_reward(name) for name in self.judges}
        features = judges.get(self.feature_extractor) or load_reward(self.feature_extractor)
        return ImageEvaluator(self.load("train"), self.load("test"), features.features, judges)


@dataclass
class ModelArguments:
    """Sizes of a teacher to pretrain; image size, channels and classes come from the data."""

    patch_size: int = field(default=2, metadata={"help": "Pixels along one side of a token."})
    hidden_size: int = field(default=128, metadata={"help": "Width of encoder and decoder."})
    encoder_num_layers: int = field(default=2, metadata={"help": "Blocks of the encoder."})
    decoder_num_layers: int = field(default=2, metadata={"help": "Blocks of the decoder."})
    num_heads: int = field(default=4, metadata={"help": "Attention heads."})
    buffer_size: int = field(default=4, metadata={"help": "Class tokens in front of the image tokens."})
    head_hidden_size: int = field(default=128, metadata={"help": "Width of the diffusion head."})
    head_num_layers: int = field(default=3, metadata={"help": "Residual blocks of the diffusion head."})
    dropout: float = field(default=0.0, metadata={"help": "Dropout of attention and projections, in 0..1."})

    def config(self, data: ImageDataset) -> MARConfig:
        """The configuration of a model of pixels for this data."""
        _, channels, size, _ = data.images.shape
        return MARConfig(
            image_size=size,
            image_channels=channels,
            latent_stride=1,
            latent_channels=channels,
            patch_size=self.patch_size,
            num_classes=len(data.class_names),
            class_names=list(data.class_names),
            encoder_hidden_size=self.hidden_size,
            encoder_num_layers=self.encoder_num_layers,
            encoder_num_heads=self.num_heads,
            decoder_hidden_size=self.hidden_size,
            decoder_num_layers=self.decoder_num_layers,
            decoder_num_heads=self.num_heads,
            buffer_size=self.buffer_size,
            head_hidden_size=self.head_hidden_size,
            head_num_layers=self.head_num_layers,
            clip_sample_range=1.0,
            attention_dropout=self.dropout,
            projection_dropout=self.dropout,
        )


@dataclass
class TeacherArguments:
    """Where the teacher is."""

    teacher: str | None = field(default=None, metadata={"help": "Teacher: model folder, run folder or hub id."})


@dataclass
class RewardArguments:
    """The student, and what it is rewarded for."""

    method: str = field(default="grpo", metadata={"help": "The gradient.", "choices": ["grpo", "reward_backprop"]})
    model: str | None = field(default=None, metadata={"help": "Student: model folder, run folder or hub id."})
    reward_funcs: list[str] = field(
        default_factory=list, metadata={"help": "Rewards: names, file.py:attribute or package.module:attribute."}
    )
    reward_kwargs: dict | None = field(
        default=None, metadata={"help": "Reward name -> keyword arguments of its class."}
    )
    eval_reward_funcs: list[str] = field(
        default_factory=list, metadata={"help": "Held-out rewards: looked at in evaluation, never trained on."}
    )
    eval_reward_kwargs: dict | None = field(default=None, metadata={"help": "As reward_kwargs, for eval_reward_funcs."})
