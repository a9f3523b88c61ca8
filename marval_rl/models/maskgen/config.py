"""The sizes and conventions of a MaskGen-KL model, teacher or one-step student."""

from typing import Any, Self

from marval_rl.image_size import height_and_width, shortest
from marval_rl.models.config import MaskedConfig

# No `from __future__ import annotations` here: transformers turns this class into a dataclass and checks its types.

SIZES = (
    "image_channels",
    "num_tokens",
    "latent_channels",
    "text_width",
    "text_length",
    "hidden_size",
    "num_layers",
    "num_heads",
    "head_hidden_size",
    "head_num_layers",
    "num_train_timesteps",
    "num_diffusion_steps",
)


class MaskGenConfig(MaskedConfig):
    """Configuration of MaskGen-KL (Kim et al. 2025, arXiv 2501.07730).

    Args:
        image_size: Side of a square image, in pixels; or [height, width] where the latents are the pixels.
        image_channels: Colour channels of an image.
        num_tokens: L, tokens per image; they have no place in it.
        latent_channels: C, channels per token.
        latent_scale: The tokenizer's latents are multiplied by it.
        vae: Folder or hub id of the TA-TiTok tokenizer; None where the latents are the pixels themselves, column by
            column (small test images).
        text_tower: open_clip's name of the text tower, or local-dir:FOLDER; OpenAI's weights want quick GELU.
        text_pretrained: Tag or file of its weights; None for a folder.
        vocabulary: Words of a model that reads one-hot words instead of a tower's features (`WordTower`).
        text_width: Width of the text features, those of the tokens and the pooled one.
        text_length: Positions of a prompt's features.
        micro_condition_size: Width of the sinusoids of the aesthetic score; 0 leaves the score out.
        aesthetic_score: The score that prompts have unless they bring their own.
        hidden_size, num_layers, num_heads: The joint transformer.
        head_hidden_size, head_num_layers: The diffusion head, an MLP with adaptive layer norm.
        num_train_timesteps: Length of the diffusion process the head is trained on.
        num_diffusion_steps: Default length of the respaced reverse chain when sampling a teacher.
        clip_sample_range: Clip a teacher's predicted x_0 to this range in each reverse step; None for latents.
        one_step_timestep: None for a teacher, t* for a one-step student.
        num_classes: Number of prompts that the model has the features of; `MaskGenModel.set_prompts` writes it.
        class_names: Those prompts; neither is saved.
    """

    model_type = "maskgen"

    image_size: int | list[int] = 256
    image_channels: int = 3
    num_tokens: int = 32
    latent_channels: int = 16
    latent_scale: float = 0.7525
    vae: str | None = None
    text_tower: str = "ViT-L-14-336-quickgelu"
    text_pretrained: str | None = "openai"
    vocabulary: list[str] | None = None
    text_width: int = 768
    text_length: int = 77
    micro_condition_size: int = 256
    aesthetic_score: float = 6.5
    hidden_size: int = 1024
    num_layers: int = 16
    num_heads: int = 16
    head_hidden_size: int = 1024
    head_num_layers: int = 8
    num_train_timesteps: int = 1000
    num_diffusion_steps: int = 100
    clip_sample_range: float | None = None
    one_step_timestep: int | None = None
    num_classes: int = 0
    class_names: list[str] | None = None

    @classmethod
    def large(cls, **overrides: Any) -> Self:
        """MaskGen-KL-L: 641M parameters (arXiv 2501.07730, table 3)."""
        return cls(**overrides)

    @classmethod
    def extra_large(cls, **overrides: Any) -> Self:
        """MaskGen-KL-XL: 1237M parameters."""
        return cls(**{"hidden_size": 1280, "num_layers": 20, "head_hidden_size": 1280, **overrides})

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        self._check_sizes(SIZES)
        self.image_size = shortest(height_and_width(self.image_size))
        if isinstance(self.image_size, list) and self.vae is not None:
            raise ValueError(f"image_size {self.image_size} is not square, but TA-TiTok's images are")
        if self.hidden_size % self.num_heads:
            raise ValueError(f"hidden_size {self.hidden_size} is not a multiple of num_heads {self.num_heads}")
        if self.micro_condition_size < 0 or self.micro_condition_size % 2:
            raise ValueError(f"micro_condition_size must be even and not negative, not {self.micro_condition_size}")
        if self.vocabulary is not None and len(self.vocabulary) + self.text_length != self.text_width:
            raise ValueError(
                f"text_width {self.text_width} is not that of {len(self.vocabulary)} words and {self.text_length} "
                "positions, one-hot"
            )
        if not self.latent_scale > 0:
            raise ValueError(f"latent_scale must be positive, not {self.latent_scale}")
        self._check_student()

    def to_diff_dict(self) -> dict[str, Any]:
        """What config.json holds: everything but the prompts, which belong to a run and not to a model."""
        return {k: v for k, v in super().to_diff_dict().items() if k not in ("num_classes", "class_names")}

    @property
    def patch_size(self) -> int:
        """Latent positions per token."""
        return 1

    @property
    def grid(self) -> tuple[int, int]:
        return 1, self.num_tokens

    @property
    def token_channels(self) -> int:
        """C, channels per token."""
        return self.latent_channels

    @property
    def takes_prompts(self) -> bool:
        return True

    @property
    def tokens_have_places(self) -> bool:
        return False

    @property
    def depths(self) -> tuple[str, ...]:
        return "num_layers", "head_num_layers"

    @property
    def widths_and_depths(self) -> tuple[tuple[int, int], ...]:
        return (self.hidden_size, self.num_layers), (self.head_hidden_size, self.head_num_layers)

    def on_latents(self) -> Self:
        return self.changed(image_size=[1, self.num_tokens], image_channels=self.latent_channels, vae=None)

    @property
    def mask_law(self) -> str:
        return "arccos"
