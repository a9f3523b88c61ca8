"""The MAR model: an MAE encoder/decoder gives each masked token a condition, and a diffusion head generates the token.

Parameter names equal the official ones (LTH14/mar), so official weights load strictly. Teacher and one-step student are
the same class; the student's configuration names its timestep t*.
"""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer

from marval_rl.models.config import MARConfig, is_official_path
from marval_rl.models.head import DiffusionHead, SmallLinear, ZeroLinear
from marval_rl.models.masked import MaskedModel
from marval_rl.models.matmul import attention, quick_products
from marval_rl.models.unmasking import gather_tokens, scatter_tokens


class Attention(nn.Module):
    def __init__(self, width: int, num_heads: int, attention_dropout: float, projection_dropout: float):
        super().__init__()
        self.num_heads = num_heads
        self.attention_dropout = attention_dropout
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.proj_drop = nn.Dropout(projection_dropout)

    def forward(self, x: Tensor, positions: Tensor | None = None) -> Tensor:
        """x [B, L, D] -> [B, L, D], or [B, M, D] of the positions [B, M] alone, which look at all others."""
        batch, length, width = x.shape
        q, k, v = self.qkv(x).view(batch, length, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)  # [B, H, L, D / H]
        if positions is not None:
            q = q.gather(2, positions[:, None, :, None].expand(-1, self.num_heads, -1, q.shape[-1]))
        dropout = self.attention_dropout if self.training else 0.0
        x = attention(q, k, v, dropout)
        return self.proj_drop(self.proj(x.transpose(1, 2).reshape(batch, -1, width)))


class FeedForward(nn.Module):
    def __init__(self, width: int, hidden: int, dropout: float):
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.fc2(self.drop(F.gelu(self.fc1(x)))))


class Block(GradientCheckpointingLayer):
    """A pre-norm transformer block."""

    def __init__(self, config: MARConfig, width: int, num_heads: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.attn = Attention(width, num_heads, config.attention_dropout, config.projection_dropout)
        self.norm2 = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.mlp = FeedForward(width, int(width * config.mlp_ratio), config.projection_dropout)

    def forward(self, x: Tensor, positions: Tensor | None = None) -> Tensor:
        """x [B, L, D] -> [B, L, D], or [B, M, D] of the positions [B, M] alone."""
        attended = self.attn(self.norm1(x), positions)
        x = (x if positions is None else gather_tokens(x, positions)) + attended
        return x + self.mlp(self.norm2(x))


class MARModel(MaskedModel):
    """Masked autoregressive diffusion model (arXiv 2406.11838)."""

    config_class = MARConfig
    base_model_prefix = "mar"
    _no_split_modules = ("Block",)

    def __init__(self, config: MARConfig):
        super().__init__(config)
        width, decoder_width = config.encoder_hidden_size, config.decoder_hidden_size
        length = config.buffer_size + config.num_tokens
        self.class_emb = nn.Embedding(config.num_classes, width)
        self.fake_latent = nn.Parameter(torch.zeros(1, width))  # the null class of classifier-free guidance

        self.z_proj = nn.Linear(config.token_channels, width)
        self.z_proj_ln = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.encoder_pos_embed_learned = nn.Parameter(torch.zeros(1, length, width))
        self.encoder_blocks = nn.ModuleList(
            Block(config, width, config.encoder_num_heads) for _ in range(config.encoder_num_layers)
        )
        self.encoder_norm = nn.LayerNorm(width, eps=config.layer_norm_eps)

        self.decoder_embed = nn.Linear(width, decoder_width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, decoder_width))
        self.decoder_pos_embed_learned = nn.Parameter(torch.zeros(1, length, decoder_width))
        self.decoder_blocks = nn.ModuleList(
            Block(config, decoder_width, config.decoder_num_heads) for _ in range(config.decoder_num_layers)
        )
        self.decoder_norm = nn.LayerNorm(decoder_width, eps=config.layer_norm_eps)
        self.diffusion_pos_embed_learned = nn.Parameter(torch.zeros(1, config.num_tokens, decoder_width))

        self.diffloss = new_head(config)
        self.post_init()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, config: MARConfig | None = None, **kwargs):
        """As transformers', from a folder or hub id; also from an official checkpoint's file, of its average weights.

        Raises:
            CheckpointError: If an official file cannot be used; see `marval_rl.models.official`.
        """
        path = pretrained_model_name_or_path
        if path is None or not is_official_path(path):
            return super().from_pretrained(path, *args, config=config, **kwargs)
        from marval_rl.models.official.mar_weights import load_official_mar  # it builds on this class

        official = load_official_mar(path)
        config = official.config if config is None else config
        return super().from_pretrained(None, *args, config=config, state_dict=official.weights, **kwargs)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """The official start: Xavier for linear layers, 0.02 for tables, zero for adaptive norms and output."""
        if isinstance(module, ZeroLinear):
            init.zeros_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, SmallLinear):
            init.normal_(module.weight, std=0.02)
            init.zeros_(module.bias)
        elif isinstance(module, nn.Linear):
            init.xavier_uniform_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            init.normal_(module.weight, std=0.02)
        elif isinstance(module, MARModel):
            for table in (
                module.fake_latent,
                module.mask_token,
                module.encoder_pos_embed_learned,
                module.decoder_pos_embed_learned,
                module.diffusion_pos_embed_learned,
            ):
                init.normal_(table, std=0.02)

    def embed_classes(self, class_labels: Tensor | None, batch_size: int, drop_mask: Tensor | None = None) -> Tensor:
        """Class embeddings [B, D]. class_labels int64 [B]; None, or a True in drop_mask [B], gives the null class."""
        if class_labels is None:
            return self.fake_latent.expand(batch_size, -1)
        embedding = self.class_emb(class_labels)
        if drop_mask is None:
            return embedding
        return torch.where(drop_mask.unsqueeze(1), self.fake_latent.to(embedding.dtype), embedding)

    def encode(self, tokens: Tensor, class_embedding: Tensor, visible: Tensor) -> Tensor:
        """Encoder output [B, buffer + V, D]: class tokens first, then the V visible tokens.

        tokens [B, L, C] (masked ones are never read), class_embedding [B, D], visible [B, V], positions ascending.
        """
        batch, buffer = tokens.shape[0], self.config.buffer_size
        positions = self.encoder_pos_embed_learned.expand(batch, -1, -1)
        x = self.z_proj(gather_tokens(tokens, visible).to(self.z_proj.weight.dtype)) + gather_tokens(
            positions[:, buffer:], visible
        )
        class_tokens = class_embedding.unsqueeze(1) + positions[:, :buffer]
        x = self.z_proj_ln(torch.cat([class_tokens.to(x.dtype), x], dim=1))
        for block in self.encoder_blocks:
            x = block(x)
        return self.encoder_norm(x)

    def decode(self, encoded: Tensor, visible: Tensor, asked: Tensor) -> Tensor:
        """Conditions [B, M, D] of the tokens that are asked for, from the encoder's output.

        The last block computes their rows alone; their queries look at the keys and values of all tokens.

        encoded [B, buffer + V, D], visible [B, V], asked [B, M].
        """
        buffer = self.config.buffer_size
        encoded = self.decoder_embed(encoded)
        grid = self.mask_token.to(encoded.dtype).expand(encoded.shape[0], self.config.num_tokens, -1)
        grid = scatter_tokens(grid, visible, encoded[:, buffer:])
        x = torch.cat([encoded[:, :buffer], grid], dim=1) + self.decoder_pos_embed_learned
        rows = asked + buffer
        for block in self.decoder_blocks[:-1]:
            x = block(x)
        x = self.decoder_blocks[-1](x, rows) if len(self.decoder_blocks) else gather_tokens(x, rows)
        position_embedding = self.diffusion_pos_embed_learned.expand(len(asked), -1, -1)
        return self.decoder_norm(x) + gather_tokens(position_embedding, asked)

    def conditions_of(
        self,
        tokens: Tensor,
        class_labels: Tensor | None,
        visible: Tensor,
        asked: Tensor,
        drop_mask: Tensor | None,
        guidance_pass: bool,
    ) -> Tensor:
        class_embedding = self.embed_classes(class_labels, tokens.shape[0], drop_mask)
        if guidance_pass:
            class_embedding = torch.cat([class_embedding, self.embed_classes(None, tokens.shape[0])])
            tokens, visible, asked = tokens.repeat(2, 1, 1), visible.repeat(2, 1), asked.repeat(2, 1)
        return self.decode(self.encode(tokens, class_embedding, visible), visible, asked)

    def products(self, num_images: int) -> AbstractContextManager[None]:
        rows = num_images * (self.config.buffer_size + self.config.num_tokens)
        return quick_products(self.device, rows, self.config.encoder_hidden_size)

    def decays(self, name: str, parameter: nn.Parameter) -> bool:
        """The official rule: no decay for vectors, biases and the whole diffusion head."""
        return not (parameter.ndim == 1 or name.endswith(".bias") or "diffloss" in name)

    def freeze_null(self) -> None:
        self.fake_latent.requires_grad_(False)


def new_head(config: MARConfig) -> DiffusionHead:
    """A diffusion head of the sizes in `config`, not initialised beyond PyTorch's defaults."""
    return DiffusionHead(
        config.token_channels, config.decoder_hidden_size, config.head_hidden_size, config.head_num_layers
    )
