"""TA-TiTok: images <-> 1-D tokens, with a decoder that also reads the prompt (arXiv 2501.07730, section 3.2).

Parameter names equal the official ones (bytedance/1d-tokenizer). Encoder and decoder are two vision transformers of
different width, depth and number of heads.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

SIZES = ("image_size", "patch_size", "num_tokens", "latent_channels", "text_width", "text_length")
NETWORK_SIZES = ("hidden_size", "num_layers", "num_heads")


class TATiTokConfig(PreTrainedConfig):
    """Configuration of the tokenizer with KL latents; the defaults are those of the published one.

    Args:
        image_size: Height and width of an image, in pixels.
        patch_size: Pixels along one side of a patch.
        num_tokens: L, latent tokens per image.
        latent_channels: C, channels per latent token.
        text_width, text_length: The decoder's text features: width, and positions.
        encoder_hidden_size, encoder_num_layers, encoder_num_heads: The encoder, a ViT-B.
        decoder_hidden_size, decoder_num_layers, decoder_num_heads: The decoder, a ViT-L.
    """

    model_type = "tatitok"

    image_size: int = 256
    patch_size: int = 16
    num_tokens: int = 32
    latent_channels: int = 16
    text_width: int = 768
    text_length: int = 77
    encoder_hidden_size: int = 768
    encoder_num_layers: int = 12
    encoder_num_heads: int = 12
    decoder_hidden_size: int = 1024
    decoder_num_layers: int = 24
    decoder_num_heads: int = 16

    def __post_init__(self, **kwargs: Any):
        super().__post_init__(**kwargs)
        parts = [f"{part}_{name}" for part in ("encoder", "decoder") for name in NETWORK_SIZES]
        for name in (*SIZES, *parts):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise ValueError(f"{name} must be a whole number of at least 1, not {getattr(self, name)!r}")
        if self.image_size % self.patch_size:
            raise ValueError(f"image_size {self.image_size} is not a multiple of patch_size {self.patch_size}")
        for part in ("encoder", "decoder"):
            width, heads = getattr(self, f"{part}_hidden_size"), getattr(self, f"{part}_num_heads")
            if width % heads:
                raise ValueError(f"{part}_hidden_size {width} is not a multiple of {part}_num_heads {heads}")

    @property
    def grid_size(self) -> int:
        """Patches along one side of the image."""
        return self.image_size // self.patch_size


class FeedForward(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.c_fc = nn.Linear(width, 4 * width)
        self.c_proj = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(F.gelu(self.c_fc(x)))


class Block(nn.Module):
    """A pre-norm transformer block, all positions at all."""

    def __init__(self, width: int, num_heads: int):
        super().__init__()
        self.ln_1 = nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, num_heads, batch_first=True)
        self.ln_2 = nn.LayerNorm(width)
        self.mlp = FeedForward(width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, need_weights=False)[0]
        return x + self.mlp(self.ln_2(x))


class Encoder(nn.Module):
    def __init__(self, config: TATiTokConfig):
        super().__init__()
        width, patch = config.encoder_hidden_size, config.patch_size
        self.class_embedding = nn.Parameter(torch.zeros(1, width))
        self.positional_embedding = nn.Parameter(torch.zeros(config.grid_size**2 + 1, width))
        self.latent_token_positional_embedding = nn.Parameter(torch.zeros(config.num_tokens, width))
        self.patch_embed = nn.Conv2d(3, width, patch, patch)
        self.ln_pre = nn.LayerNorm(width)
        self.transformer = nn.ModuleList(
            Block(width, config.encoder_num_heads) for _ in range(config.encoder_num_layers)
        )
        self.ln_post = nn.LayerNorm(width)
        self.conv_out = nn.Conv2d(width, 2 * config.latent_channels, 1)

    def forward(self, images: Tensor, latent_tokens: Tensor) -> Tensor:
        """Images [B, 3, H, W] in 0..1, latent_tokens [L, D] -> moments [B, 2C, 1, L]."""
        batch = len(images)
        patches = self.patch_embed(images).flatten(2).transpose(1, 2)  # [B, P, D]
        x = torch.cat([self.class_embedding.expand(batch, 1, -1), patches], dim=1) + self.positional_embedding
        latents = (latent_tokens + self.latent_token_positional_embedding).expand(batch, -1, -1)
        x = self.ln_pre(torch.cat([x, latents], dim=1))
        for block in self.transformer:
            x = block(x)
        latents = self.ln_post(x[:, -len(latent_tokens) :])  # [B, L, D]
        return self.conv_out(latents.transpose(1, 2).unsqueeze(2))


class Decoder(nn.Module):
    def __init__(self, config: TATiTokConfig):
        super().__init__()
        width, patch = config.decoder_hidden_size, config.patch_size
        self.grid_size = config.grid_size
        self.class_embedding = nn.Parameter(torch.zeros(1, width))
        self.positional_embedding = nn.Parameter(torch.zeros(config.grid_size**2 + 1, width))
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.latent_token_positional_embedding = nn.Parameter(torch.zeros(config.num_tokens, width))
        self.text_guidance_positional_embedding = nn.Parameter(torch.zeros(config.text_length, width))
        self.decoder_embed = nn.Linear(config.latent_channels, width)
        self.ln_pre = nn.LayerNorm(width)
        self.transformer = nn.ModuleList(
            Block(width, config.decoder_num_heads) for _ in range(config.decoder_num_layers)
        )
        self.ln_post = nn.LayerNorm(width)
        # A patch's channels: row, column, colour, the last one fastest. PixelShuffle has colour slowest.
        self.ffn = nn.Sequential(nn.Conv2d(width, patch * patch * 3, 1))
        self.conv_out = nn.Conv2d(3, 3, 3, padding=1)
        self.text_guidance_proj = nn.Linear(config.text_width, width)

    def forward(self, latents: Tensor, text: Tensor) -> Tensor:
        """Latents [B, C, 1, L] and text features [B, T, W] -> images [B, 3, H, W], about 0..1."""
        batch, side = len(latents), self.grid_size
        tokens = self.decoder_embed(latents.squeeze(2).transpose(1, 2)) + self.latent_token_positional_embedding
        grid = self.mask_token.expand(batch, side**2, -1)
        x = torch.cat([self.class_embedding.expand(batch, 1, -1), grid], dim=1) + self.positional_embedding
        text = self.text_guidance_proj(text) + self.text_guidance_positional_embedding
        x = self.ln_pre(torch.cat([x, tokens, text], dim=1))
        for block in self.transformer:
            x = block(x)
        patches = self.ln_post(x[:, 1 : 1 + side**2])  # [B, P, D]
        return self.conv_out(self.pixels(self.ffn(patches.transpose(1, 2).unflatten(2, (side, side)))))

    def pixels(self, patches: Tensor) -> Tensor:
        """[B, p*p*3, h, w] -> [B, 3, h*p, w*p]."""
        batch, channels, height, width = patches.shape
        p = round((channels // 3) ** 0.5)
        x = patches.view(batch, p, p, 3, height, width).permute(0, 3, 4, 1, 5, 2)
        return x.reshape(batch, 3, height * p, width * p)


class TATiTokModel(PreTrainedModel):
    """The tokenizer: `encode` gives moments of the latents, `decode` images."""

    config_class = TATiTokConfig
    base_model_prefix = "tatitok"
    main_input_name = "images"

    def __init__(self, config: TATiTokConfig):
        super().__init__(config)
        self.latent_tokens = nn.Parameter(torch.zeros(config.num_tokens, config.encoder_hidden_size))
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Transformers' own, and the tables, which are scaled by their width as the official ones are."""
        super()._init_weights(module)
        for name, table in module.named_parameters(recurse=False):
            if name.endswith(("embedding", "_token", "latent_tokens")):
                nn.init.normal_(table, std=table.shape[-1] ** -0.5)

    def encode(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] in 0..1 -> mean and log variance of the posterior, [B, 2C, 1, L], unscaled."""
        return self.encoder(images, self.latent_tokens)

    def decode(self, latents: Tensor, text: Tensor) -> Tensor:
        """Latents [B, C, 1, L], unscaled, and text features [B, T, W] -> images [B, 3, H, W], not clipped.

        The text is the output of the tower's last block after its final norm, not the generator's.
        """
        return self.decoder(latents, text)

    def forward(self, images: Tensor, text: Tensor) -> Tensor:
        """Images of the posterior's mean: [B, 3, H, W] in 0..1 -> [B, 3, H, W]."""
        return self.decode(self.encode(images).chunk(2, dim=1)[0], text)
