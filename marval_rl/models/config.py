"""The sizes and conventions of a MAR model, teacher or one-step student."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

from transformers import PreTrainedConfig

from marval_rl.image_size import height_and_width, shortest

# No `from __future__ import annotations` here: transformers turns this class into a dataclass and checks its types.

SIZES = (
    "image_channels",
    "latent_stride",
    "latent_channels",
    "patch_size",
    "num_classes",
    "encoder_hidden_size",
    "encoder_num_layers",
    "encoder_num_heads",
    "decoder_hidden_size",
    "decoder_num_layers",
    "decoder_num_heads",
    "buffer_size",
    "head_hidden_size",
    "head_num_layers",
    "num_train_timesteps",
    "num_diffusion_steps",
)

OFFICIAL_SUFFIXES = (".pth", ".pt", ".ckpt")


def is_official_path(name_or_path: str | Path) -> bool:
    """Whether a model's name means a file of the official code: any file, or a name that ends as theirs do."""
    path = Path(name_or_path)
    return path.is_file() or path.suffix in OFFICIAL_SUFFIXES


class MaskedConfig(PreTrainedConfig):
    """What sampler and trainers ask of any model's configuration.

    A subclass has image_size, image_channels, latent_channels, num_tokens, token_channels, patch_size, num_classes,
    class_names, vae, num_train_timesteps, num_diffusion_steps, clip_sample_range and one_step_timestep.
    """

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of tokens."""
        raise NotImplementedError

    @property
    def takes_prompts(self) -> bool:
        """Whether conditions are prompts, which a run names, and not the classes that the model was trained on."""
        return False

    @property
    def tokens_have_places(self) -> bool:
        """Whether a token is a place in the image; in 1-D tokenizers each is about all of it."""
        return True

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of an image."""
        return self.image_channels, *height_and_width(self.image_size)

    @property
    def depths(self) -> tuple[str, ...]:
        """The fields that count equal layers."""
        raise NotImplementedError

    @property
    def widths_and_depths(self) -> tuple[tuple[int, int], ...]:
        """Of the networks, the head last."""
        raise NotImplementedError

    def on_latents(self) -> Self:
        """The same networks with images that are their latents, so that no autoencoder is needed."""
        raise NotImplementedError

    def changed(self, **changes: Any) -> Self:
        """A copy with other fields."""
        return type(self).from_dict({**self.to_dict(), **changes})

    @property
    def mask_law(self) -> str:
        """How the share of masked tokens is drawn in training; see `draw_num_masked`."""
        raise NotImplementedError

    @property
    def is_one_step(self) -> bool:
        """Whether this is a distilled one-step student."""
        return self.one_step_timestep is not None

    def as_student(self, student_timestep: int) -> Self:
        """The configuration of a one-step student of this teacher."""
        return self.changed(one_step_timestep=student_timestep)

    def _check_sizes(self, names: Sequence[str]) -> None:
        """Raises ValueError unless these fields are whole numbers of at least 1; of layers there may be none."""
        for name in names:
            size, least = getattr(self, name), 0 if name.endswith("_num_layers") else 1
            if not isinstance(size, int) or size < least:
                raise ValueError(f"{name} must be a whole number of at least {least}, not {size!r}")

    def _check_student(self) -> None:
        if self.one_step_timestep is not None and not 0 <= self.one_step_timestep < self.num_train_timesteps:
            raise ValueError(
                f"one_step_timestep {self.one_step_timestep} is outside 0..{self.num_train_timesteps - 1}; "
                "about 700 of 1000 works well, near 999 alpha vanishes and the student blows up"
            )


class MARConfig(MaskedConfig):
    """Configuration of a masked autoregressive diffusion model (MAR, Li et al. 2024, arXiv 2406.11838).

    Args:
        image_size: Side of a square image, in pixels; or [height, width] where the latents are the pixels.
        image_channels: Colour channels of an image (1 grey, 3 RGB).
        latent_stride: Pixels along one side of a latent cell (1: the latents are the pixels themselves; 16 for KL-16).
        latent_channels: Channels of the latents.
        patch_size: Latent cells along one side of a token.
        vae: Name or path of the diffusers `AutoencoderKL` that belongs to the latents; None where they are pixels.
        num_classes: Number of classes the model is conditioned on.
        class_names: Their names, in order of their labels; used for prompts and reports.
        encoder_hidden_size, encoder_num_layers, encoder_num_heads: The MAE encoder.
        decoder_hidden_size, decoder_num_layers, decoder_num_heads: The MAE decoder.
        mlp_ratio: Width of a block's MLP over the width of the block.
        buffer_size: Number of class tokens in front of the image tokens.
        head_hidden_size, head_num_layers: The diffusion head, an MLP with adaptive layer norm.
        attention_dropout, projection_dropout: Dropout inside the blocks while training, in 0..1.
        layer_norm_eps: Epsilon of every layer norm.
        num_train_timesteps: Length of the diffusion process the head is trained on.
        num_diffusion_steps: Default length of the respaced reverse chain when sampling a teacher.
        clip_sample_range: Clip a teacher's predicted x_0 to this range in each reverse step; 1.0 suits pixels, None (no
            clipping) is what the official models do with latents.
        one_step_timestep: None for a teacher. For a one-step student the fixed timestep t* of
            x0 = (z - sigma_t* eps(z, t*, c)) / alpha_t*.
    """

    model_type = "mar"

    image_size: int | list[int] = 256
    image_channels: int = 3
    latent_stride: int = 16
    latent_channels: int = 16
    patch_size: int = 1
    vae: str | None = None
    num_classes: int = 1000
    class_names: list[str] | None = None
    encoder_hidden_size: int = 1024
    encoder_num_layers: int = 16
    encoder_num_heads: int = 16
    decoder_hidden_size: int = 1024
    decoder_num_layers: int = 16
    decoder_num_heads: int = 16
    mlp_ratio: float = 4.0
    buffer_size: int = 64
    head_hidden_size: int = 1280
    head_num_layers: int = 8
    attention_dropout: float = 0.1
    projection_dropout: float = 0.1
    layer_norm_eps: float = 1e-6
    num_train_timesteps: int = 1000
    num_diffusion_steps: int = 100
    clip_sample_range: float | None = None
    one_step_timestep: int | None = None

    @classmethod
    def base(cls, **overrides: Any) -> Self:
        """MAR-B: 208M parameters, ImageNet at 256 px on KL-16 latents (arXiv 2406.11838, table 4)."""
        return cls._published(768, 12, 12, (1024, 6), overrides)

    @classmethod
    def large(cls, **overrides: Any) -> Self:
        """MAR-L: 478M parameters."""
        return cls._published(1024, 16, 16, (1280, 8), overrides)

    @classmethod
    def huge(cls, **overrides: Any) -> Self:
        """MAR-H: 942M parameters."""
        return cls._published(1280, 20, 16, (1536, 12), overrides)

    @classmethod
    def _published(
        cls, width: int, num_layers: int, num_heads: int, head: tuple[int, int], overrides: dict[str, Any]
    ) -> Self:
        sizes = {
            f"{part}_{name}": value
            for part in ("encoder", "decoder")
            for name, value in (("hidden_size", width), ("num_layers", num_layers), ("num_heads", num_heads))
        }
        return cls(**{**sizes, "head_hidden_size": head[0], "head_num_layers": head[1], **overrides})

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        self._check_sizes(SIZES)
        self.image_size = shortest(height_and_width(self.image_size))
        if any(length % (self.latent_stride * self.patch_size) for length in self.image_shape[1:]):
            raise ValueError(
                f"image_size {self.image_size} is not a multiple of latent_stride x patch_size = "
                f"{self.latent_stride} x {self.patch_size}"
            )
        if isinstance(self.image_size, list) and (self.vae is not None or self.latent_stride != 1):
            raise ValueError(f"image_size {self.image_size} is not square, but images for a VAE must be")
        for part in ("encoder", "decoder"):
            width, heads = getattr(self, f"{part}_hidden_size"), getattr(self, f"{part}_num_heads")
            if width % heads:
                raise ValueError(f"{part}_hidden_size {width} is not a multiple of {part}_num_heads {heads}")
        if self.class_names is not None and len(self.class_names) != self.num_classes:
            raise ValueError(f"{len(self.class_names)} class_names were given for num_classes = {self.num_classes}")
        self._check_student()

    def as_student(self, student_timestep: int) -> Self:
        """As any model's, and without dropout."""
        student = super().as_student(student_timestep)
        student.attention_dropout = student.projection_dropout = 0.0
        return student

    @property
    def num_tokens(self) -> int:
        """L, tokens per image."""
        return math.prod(self.grid)

    @property
    def token_channels(self) -> int:
        """C, channels per token."""
        return self.latent_channels * self.patch_size**2

    @property
    def grid(self) -> tuple[int, int]:
        _, height, width = self.image_shape
        side = self.latent_stride * self.patch_size
        return height // side, width // side

    @property
    def mask_law(self) -> str:
        return "truncated_normal"

    @property
    def depths(self) -> tuple[str, ...]:
        return "encoder_num_layers", "decoder_num_layers", "head_num_layers"

    @property
    def widths_and_depths(self) -> tuple[tuple[int, int], ...]:
        return (
            (self.encoder_hidden_size, self.encoder_num_layers),
            (self.decoder_hidden_size, self.decoder_num_layers),
            (self.head_hidden_size, self.head_num_layers),
        )

    def on_latents(self) -> Self:
        size = shortest([length // self.latent_stride for length in self.image_shape[1:]])
        return self.changed(image_size=size, image_channels=self.latent_channels, latent_stride=1, vae=None)
