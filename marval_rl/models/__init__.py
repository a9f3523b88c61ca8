"""The MAR model, its diffusion process, unmasking and sampling. Knows no trainer."""

from marval_rl.models.config import MARConfig, MaskedConfig
from marval_rl.models.generation import GenerationOutput, generate
from marval_rl.models.latents import LatentCodec, PixelCodec, codec_for, patchify, unpatchify
from marval_rl.models.mar import MARModel
from marval_rl.models.masked import MAROutput, MaskedModel

__all__ = [
    "GenerationOutput",
    "LatentCodec",
    "MARConfig",
    "MARModel",
    "MAROutput",
    "MaskedConfig",
    "MaskedModel",
    "PixelCodec",
    "codec_for",
    "generate",
    "patchify",
    "unpatchify",
]
