"""The networks of a recipe: sizes of a new one, teacher and student, and their rewards."""

# No `from __future__ import annotations`: the recipe parser reads the field types.

from dataclasses import dataclass, field
from typing import ClassVar

from peft import LoraConfig

from marval_rl.errors import RecipeError
from marval_rl.models import MARConfig, MARModel
from marval_rl.models.checkpoints import load_config, load_model
from marval_rl.runtime.settings import EVALUATED, Conditions, Needs
from marval_rl.trainers.anchors import ANCHORED
from marval_rl.trainers.lora import LORA_TARGETS

PUBLISHED_SIZES = {"base": MARConfig.base, "large": MARConfig.large, "huge": MARConfig.huge}
SIZE = {"help": "Published size of the networks: base, large or huge.", "choices": list(PUBLISHED_SIZES)}


@dataclass
class ModelArguments:
    """Sizes of a teacher to pretrain; image size, channels and classes come from the data."""

    model_size: str | None = field(default=None, metadata=SIZE)
    patch_size: int = field(default=2, metadata={"help": "Latent cells (or pixels) along one side of a token."})
    hidden_size: int = field(default=128, metadata={"help": "Width of encoder and decoder."})
    encoder_num_layers: int = field(default=2, metadata={"help": "Blocks of the encoder."})
    decoder_num_layers: int = field(default=2, metadata={"help": "Blocks of the decoder."})
    num_heads: int = field(default=4, metadata={"help": "Attention heads."})
    buffer_size: int = field(default=4, metadata={"help": "Class tokens in front of the image tokens."})
    head_hidden_size: int = field(default=128, metadata={"help": "Width of the diffusion head."})
    head_num_layers: int = field(default=3, metadata={"help": "Residual blocks of the diffusion head."})
    dropout: float = field(default=0.0, metadata={"help": "Dropout of attention and projections, in 0..1."})

    counts_if: ClassVar[Conditions] = {
        Needs("no model_size, which sets all sizes", ("model_size",), lambda size: size is None): (
            *("patch_size", "hidden_size", "encoder_num_layers", "decoder_num_layers", "num_heads", "buffer_size"),
            *("head_hidden_size", "head_num_layers", "dropout"),
        ),
    }

    def config(self, latents: dict) -> MARConfig:
        """The configuration of a model of these latents, which `DataArguments.latents` describes. A published size
        sets all the sizes here."""
        if self.model_size is not None:
            return PUBLISHED_SIZES[self.model_size](**latents)
        return MARConfig(
            **latents,
            patch_size=self.patch_size,
            encoder_hidden_size=self.hidden_size,
            encoder_num_layers=self.encoder_num_layers,
            encoder_num_heads=self.num_heads,
            decoder_hidden_size=self.hidden_size,
            decoder_num_layers=self.decoder_num_layers,
            decoder_num_heads=self.num_heads,
            buffer_size=self.buffer_size,
            head_hidden_size=self.head_hidden_size,
            head_num_layers=self.head_num_layers,
            attention_dropout=self.dropout,
            projection_dropout=self.dropout,
        )


@dataclass
class TeacherArguments:
    """Which teacher."""

    teacher: str | None = field(
        default=None, metadata={"help": "Teacher: model folder, run folder, hub id or official .pth file."}
    )
    model_size: str | None = field(default=None, metadata=SIZE)

    counts_if: ClassVar[Conditions] = {ANCHORED: ("teacher",)}

    def load(self) -> MARModel:
        """The teacher. Raises CheckpointError, and RecipeError if it is not of `model_size`."""
        assert self.teacher is not None  # the commands refuse it
        self.check_size(load_config(self.teacher), self.teacher)
        return load_model(self.teacher, one_step=False)

    def check_size(self, config: MARConfig, name: str) -> None:
        """Raises RecipeError if a network is not of the size that the recipe was written for."""
        if self.model_size is None:
            return
        wanted = PUBLISHED_SIZES[self.model_size]()
        found = _size_of(config)
        if found != _size_of(wanted):
            raise RecipeError(
                f"{name} is not of model_size {self.model_size}: its widths and depths (encoder, decoder, head) are "
                f"{found}, not {_size_of(wanted)}; set --model_size, or null for any"
            )


@dataclass
class RewardArguments:
    """The student, and what it is rewarded for."""

    method: str = field(default="grpo", metadata={"help": "The gradient.", "choices": ["grpo", "reward_backprop"]})
    model: str | None = field(default=None, metadata={"help": "Student: model folder, run folder or hub id."})
    prompts_per_class: int = field(default=100, metadata={"help": "How often an epoch asks for each class."})
    reward_funcs: list[str] = field(
        default_factory=list, metadata={"help": "Rewards: names, file.py:attribute or package.module:attribute."}
    )
    reward_kwargs: dict | None = field(
        default=None, metadata={"help": "Reward name -> keyword arguments of its class."}
    )
    eval_reward_funcs: list[str] = field(
        default_factory=list, metadata={"help": "Held-out rewards: measured in evaluation, never trained on."}
    )
    eval_reward_kwargs: dict | None = field(default=None, metadata={"help": "As reward_kwargs, for eval_reward_funcs."})

    counts_if: ClassVar[Conditions] = {
        EVALUATED: ("eval_reward_funcs", "eval_reward_kwargs"),
        Needs("eval_reward_funcs", ("eval_reward_funcs",), bool): ("eval_reward_kwargs",),
    }


@dataclass
class LoraArguments:
    """Whether low-rank adapters of the student are trained in place of its weights; names as in TRL's `ModelConfig`."""

    use_peft: bool = field(
        default=False,
        metadata={
            "help": "Train LoRA adapters in place of the student's weights; they need about 10 x the learning rate."
        },
    )
    lora_r: int = field(default=16, metadata={"help": "Rank of the adapters."})
    lora_alpha: int = field(default=32, metadata={"help": "Adapters are scaled by lora_alpha / lora_r."})
    lora_dropout: float = field(
        default=0.0, metadata={"help": "Dropout before the adapters; GRPO needs 0, its ratios compare two passes."}
    )
    lora_target: str = field(
        default="all", metadata={"help": "Where adapters sit in the student.", "choices": list(LORA_TARGETS)}
    )
    lora_target_modules: list[str] | None = field(
        default=None, metadata={"help": "Names of linear layers, such as qkv, in place of lora_target."}
    )

    counts_if: ClassVar[Conditions] = {
        Needs("use_peft", ("use_peft",), bool): (
            *("lora_r", "lora_alpha", "lora_dropout", "lora_target", "lora_target_modules"),
        ),
        Needs("no lora_target_modules, which take its place", ("lora_target_modules",), lambda names: not names): (
            "lora_target",
        ),
    }

    def config(self) -> LoraConfig | None:
        """peft's configuration; None to train all of the student.

        Raises:
            RecipeError: For a rank or a dropout out of range.
        """
        if not self.use_peft:
            return None
        if self.lora_r < 1:
            raise RecipeError(f"lora_r must be at least 1, not {self.lora_r}")
        if not 0 <= self.lora_dropout < 1:
            raise RecipeError(f"lora_dropout must lie in [0, 1), not {self.lora_dropout}")
        return LoraConfig(
            r=self.lora_r,
            lora_alpha=self.lora_alpha,
            lora_dropout=self.lora_dropout,
            target_modules=self.lora_target_modules or LORA_TARGETS[self.lora_target],
        )


def _size_of(config: MARConfig) -> tuple[tuple[int, int], ...]:
    return (
        (config.encoder_hidden_size, config.encoder_num_layers),
        (config.decoder_hidden_size, config.decoder_num_layers),
        (config.head_hidden_size, config.head_num_layers),
    )
