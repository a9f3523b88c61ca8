"""The networks of a recipe: sizes of a new one, teacher and student, and their rewards."""

# No `from __future__ import annotations`: the recipe parser reads the field types.

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

from peft import LoraConfig

from marval_rl.errors import RecipeError
from marval_rl.models import MARConfig, MaskedConfig, MaskedModel
from marval_rl.models.checkpoints import load_config, load_model
from marval_rl.models.maskgen.config import MaskGenConfig
from marval_rl.runtime.settings import EVALUATED, Conditions, Needs, setting
from marval_rl.trainers.anchors import ANCHORED
from marval_rl.trainers.lora import LORA_TARGETS

MAR_SIZES: dict[str, Callable[..., MARConfig]] = {
    "base": MARConfig.base,
    "large": MARConfig.large,
    "huge": MARConfig.huge,
}
PUBLISHED_SIZES: dict[str, Callable[..., MaskedConfig]] = {
    **MAR_SIZES,
    "maskgen_l": MaskGenConfig.large,
    "maskgen_xl": MaskGenConfig.extra_large,
}
SIZE = {
    "help": "Published size of the networks: base, large or huge of MAR, maskgen_l or maskgen_xl.",
    "choices": list(PUBLISHED_SIZES),
}


@dataclass
class ModelArguments:
    """Sizes of a teacher to pretrain; image size, channels and classes come from the data."""

    model_size: str | None = field(default=None, metadata=SIZE)
    backbone: str = setting("mar", "mar knows classes, maskgen reads captions.", ["mar", "maskgen"])
    text_tower: str = setting(
        MaskGenConfig.text_tower,
        "open_clip's name of the text tower, local-dir:FOLDER, or words: one-hot words, no tower.",
    )
    text_pretrained: str | None = setting(
        MaskGenConfig.text_pretrained, "Tag of open_clip or file with the text tower's weights; null for a folder."
    )
    patch_size: int = setting(2, "Latent cells (or pixels) along one side of a token.")
    hidden_size: int = setting(128, "Width of encoder and decoder.")
    encoder_num_layers: int = setting(2, "Blocks of the encoder.")
    decoder_num_layers: int = setting(2, "Blocks of the decoder.")
    num_heads: int = setting(4, "Attention heads.")
    buffer_size: int = setting(4, "Class tokens in front of the image tokens.")
    head_hidden_size: int = setting(128, "Width of the diffusion head.")
    head_num_layers: int = setting(3, "Residual blocks of the diffusion head.")
    dropout: float = setting(0.0, "Dropout of attention and projections, in 0..1.")

    counts_if: ClassVar[Conditions] = {
        Needs("no model_size, which sets all sizes", ("model_size",), lambda size: size is None): (
            *("patch_size", "hidden_size", "encoder_num_layers", "decoder_num_layers", "num_heads", "buffer_size"),
            *("head_hidden_size", "head_num_layers", "dropout"),
        ),
        Needs("backbone mar", ("backbone",), lambda name: name == "mar"): (
            *("encoder_num_layers", "buffer_size", "dropout"),
        ),
        Needs("backbone maskgen", ("backbone",), lambda name: name == "maskgen"): ("text_tower", "text_pretrained"),
    }

    def __post_init__(self):
        if self.model_size is not None and (self.model_size in MAR_SIZES) != (self.backbone == "mar"):
            raise ValueError(f"model_size {self.model_size} is not a size of backbone {self.backbone}")

    def config(self, latents: dict) -> MaskedConfig:
        """The configuration of a model of these latents, which `DataArguments.latents` describes. A published size
        sets all the sizes here."""
        if self.backbone == "maskgen":
            return self._maskgen_config(latents)
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

    def _maskgen_config(self, latents: dict) -> MaskedConfig:
        text: dict[str, Any] = {"text_tower": self.text_tower, "text_pretrained": self.text_pretrained}
        if self.text_tower == "words":
            captions = [caption.lower().split() for caption in latents["class_names"]]
            words = sorted({word for caption in captions for word in caption})
            length = max(map(len, captions))
            text = {"vocabulary": words, "text_length": length, "text_width": len(words) + length}
            text["micro_condition_size"] = 0  # captions without scores
        if self.model_size is not None:
            return PUBLISHED_SIZES[self.model_size](**latents, **text)
        return MaskGenConfig(
            **latents,
            **text,
            hidden_size=self.hidden_size,
            num_layers=self.decoder_num_layers,
            num_heads=self.num_heads,
            head_hidden_size=self.head_hidden_size,
            head_num_layers=self.head_num_layers,
        )


@dataclass
class TeacherArguments:
    """Which teacher."""

    teacher: str | None = setting(None, "Teacher: model folder, run folder, hub id or official .pth file.")
    model_size: str | None = field(default=None, metadata=SIZE)

    counts_if: ClassVar[Conditions] = {ANCHORED: ("teacher",)}

    def load(self) -> MaskedModel:
        """The teacher. Raises CheckpointError, and RecipeError if it is not of `model_size`."""
        assert self.teacher is not None  # the commands refuse it
        self.check_size(load_config(self.teacher), self.teacher)
        return load_model(self.teacher, one_step=False)

    def check_size(self, config: MaskedConfig, name: str) -> None:
        """Raises RecipeError if a network is not of the size that the recipe was written for."""
        if self.model_size is None:
            return
        wanted = PUBLISHED_SIZES[self.model_size]()
        found = config.widths_and_depths
        if found != wanted.widths_and_depths:
            raise RecipeError(
                f"{name} is not of model_size {self.model_size}: its widths and depths (encoder, decoder, head) are "
                f"{found}, not {wanted.widths_and_depths}; set --model_size, or null for any"
            )


@dataclass
class RewardArguments:
    """The student, and what it is rewarded for."""

    method: str = setting("grpo", "The gradient.", ["grpo", "reward_backprop"])
    model: str | None = setting(None, "Student: model folder, run folder or hub id.")
    prompts: str | None = setting(
        None,
        "Prompts to generate images of, for a model of text: .txt (one per line), .jsonl, .parquet, .csv, a "
        "saved `datasets` folder or a hub id; further columns go to the rewards (default: the images' captions).",
    )
    prompt_column: str = setting("prompt", "Column of prompts, for all but .txt.")
    prompt_split: str = setting("train", "Split of prompts (saved `datasets`, hub).")
    prompts_per_class: int = setting(100, "How often an epoch asks for each class or prompt.")
    reward_funcs: list[str] = field(
        default_factory=list, metadata={"help": "Rewards: names, file.py:attribute or package.module:attribute."}
    )
    reward_kwargs: dict | None = setting(None, "Reward name -> keyword arguments of its class.")
    eval_reward_funcs: list[str] = field(
        default_factory=list, metadata={"help": "Held-out rewards: measured in evaluation, never trained on."}
    )
    eval_reward_kwargs: dict | None = setting(None, "As reward_kwargs, for eval_reward_funcs.")

    counts_if: ClassVar[Conditions] = {
        EVALUATED: ("eval_reward_funcs", "eval_reward_kwargs"),
        Needs("eval_reward_funcs", ("eval_reward_funcs",), bool): ("eval_reward_kwargs",),
        Needs("prompts", ("prompts",), bool): ("prompt_column", "prompt_split"),
    }

    def rolled_out(self) -> dict[str, Any]:
        """The arguments of `find_conditions` that say which prompts are rolled out, and how often."""
        named = ("prompts", "prompt_column", "prompt_split")
        return {"repeats": self.prompts_per_class, **{name: vars(self)[name] for name in named}}


@dataclass
class LoraArguments:
    """Whether low-rank adapters of the student are trained in place of its weights; names as in TRL's `ModelConfig`."""

    use_peft: bool = setting(
        False, "Train LoRA adapters in place of the student's weights; they need about 10 x the learning rate."
    )
    lora_r: int = setting(16, "Rank of the adapters.")
    lora_alpha: int = setting(32, "Adapters are scaled by lora_alpha / lora_r.")
    lora_dropout: float = setting(0.0, "Dropout before the adapters; GRPO needs 0, its ratios compare two passes.")
    lora_target: str = setting("all", "Where adapters sit in the student.", LORA_TARGETS)
    lora_target_modules: list[str] | None = setting(
        None, "Names of linear layers, such as qkv, in place of lora_target."
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
