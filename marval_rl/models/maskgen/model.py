"""MaskGen-KL: a transformer of image and text tokens gives each masked token a condition, MAR's head generates it.

Parameter names equal the official ones (bytedance/1d-tokenizer), so official weights load strictly. The joint blocks
are diffusers' own, those of Stable Diffusion 3 (arXiv 2403.03206).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers.models.attention import JointTransformerBlock
from diffusers.models.normalization import AdaLayerNormContinuous
from torch import Tensor, nn
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer

from marval_rl.models.head import DiffusionHead
from marval_rl.models.masked import MaskedModel
from marval_rl.models.maskgen.config import MaskGenConfig
from marval_rl.models.maskgen.prompt_cache import features_of
from marval_rl.models.maskgen.prompts import PromptFeatures, blank_prompts
from marval_rl.models.unmasking import gather_tokens, scatter_tokens

NORM_EPS = 1e-6
SCORE_SCALE = 100  # the sinusoids are those of a hundredfold score
# Parts of official parameter names that weight decay leaves alone.
UNDECAYED = ("ln", "bias", "latent_tokens", "mask_token", "embedding", "norm", "gamma", "embed")


def score_embedding(scores: Tensor, width: int) -> Tensor:
    """Sinusoids of aesthetic scores [B] -> [B, width]: sine and cosine by turns, frequencies 10000^(-2j / width)."""
    steps = torch.arange(0, width, 2, device=scores.device, dtype=torch.float32)
    angles = SCORE_SCALE * scores.float().unsqueeze(-1) * 10000 ** (-steps / width)
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)


class JointBlock(GradientCheckpointingLayer, JointTransformerBlock):
    """diffusers' block, whose activations can be computed again in the backward pass."""


class MaskGenModel(MaskedModel):
    """Masked autoregressive model with text as its condition (arXiv 2501.07730, section 3.3).

    Conditions are indices into a list of prompts, whose features `set_prompts` gives.
    """

    config_class = MaskGenConfig
    base_model_prefix = "maskgen"
    _no_split_modules = ("JointBlock",)

    def __init__(self, config: MaskGenConfig):
        super().__init__(config)
        width, length = config.hidden_size, config.num_tokens
        self.prompts: PromptFeatures | None = None

        self.decoder_pos_embed_learned = nn.Parameter(torch.zeros(1, length, width))
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.diffusion_pos_embed_learned = nn.Parameter(torch.zeros(1, length, width))
        self.text_emb = nn.Linear(config.text_width, width)
        self.text_pooled_emb = nn.Linear(config.text_width + config.micro_condition_size, width)
        self.decoder_blocks = nn.ModuleList(
            JointBlock(width, config.num_heads, width // config.num_heads, context_pre_only=i == config.num_layers - 1)
            for i in range(config.num_layers)
        )
        self.decoder_norm = AdaLayerNormContinuous(width, width, elementwise_affine=False, eps=NORM_EPS)
        self.z_proj = nn.Linear(config.token_channels, width)
        self.z_proj_ln = nn.LayerNorm(width, eps=NORM_EPS)
        self.diffloss = DiffusionHead(config.token_channels, width, config.head_hidden_size, config.head_num_layers)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """The official start: Xavier for every linear layer, also those that MAR starts at zero; 0.02 for tables."""
        if isinstance(module, nn.Linear):
            init.xavier_uniform_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm) and module.elementwise_affine:
            init.ones_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, MaskGenModel):
            for table in (module.mask_token, module.decoder_pos_embed_learned, module.diffusion_pos_embed_learned):
                init.normal_(table, std=0.02)

    def set_prompts(self, prompts: PromptFeatures) -> None:
        """Gives the model the prompts that its conditions index; the configuration gets their number and texts.

        Raises:
            ValueError: If their features have another width than the model reads.
        """
        if prompts.pooled.shape[-1] != self.config.text_width:
            raise ValueError(
                f"the prompts' features are {prompts.pooled.shape[-1]} wide, the model reads {self.config.text_width}: "
                "encode them with the model's own text tower"
            )
        self.prompts = prompts
        self.config.num_classes, self.config.class_names = len(prompts), list(prompts.prompts)

    def condition_on(self, names: Sequence[str]) -> None:
        """Encodes these prompts by the text tower that the configuration names, or reads their features from the cache.

        The tower runs where the model is, and is gone afterwards. Raises as `features_of`.
        """
        self.set_prompts(features_of(names, self.config, device=self.device, progress=True))

    def share_conditions(self, other: MaskedModel) -> None:
        assert isinstance(other, MaskGenModel)
        if other.prompts is not None:
            self.set_prompts(other.prompts)

    def set_blank_conditions(self) -> None:
        self.set_prompts(blank_prompts(1, self.config.text_length, self.config.text_width))

    def embed_text(self, class_labels: Tensor | None, batch_size: int, drop_mask: Tensor | None = None) -> Any:
        """What the joint blocks read of the prompts: text tokens [B, T, D] and the modulating vector [B, D].

        class_labels int64 [B]; None, or a True in drop_mask [B], gives the empty prompt. The score is the prompt's in
        either case.
        """
        if self.prompts is None:
            raise ValueError("the model has no prompts: give it their features first (model.set_prompts(...))")
        config, device = self.config, self.text_emb.weight.device
        scores = self.prompts.scores_of(class_labels, batch_size, config.aesthetic_score, device)
        if class_labels is not None and drop_mask is not None:
            class_labels = class_labels.masked_fill(drop_mask, len(self.prompts))
        text = self.prompts.rows("tokens", class_labels, batch_size, device)
        pooled = self.prompts.rows("pooled", class_labels, batch_size, device)
        return self.project_text(text, pooled, scores)

    def decoder_text(self, class_labels: Tensor) -> Tensor | None:
        """Features [B, T, W] for TA-TiTok's decoder; None where the prompts bring none."""
        if self.prompts is None or self.prompts.decoder is None:
            return None
        return self.prompts.rows("decoder", class_labels, len(class_labels), class_labels.device)

    def project_text(self, text: Tensor, pooled: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
        """Features [B, T, W] and [B, W], and scores [B], in the width of the blocks: [B, T, D] and [B, D]."""
        dtype = self.text_emb.weight.dtype
        if self.config.micro_condition_size:
            micro = score_embedding(scores, self.config.micro_condition_size)
            pooled = torch.cat([pooled.float(), micro], dim=-1)
        return self.text_emb(text.to(dtype)), self.text_pooled_emb(pooled.to(dtype))

    def decode(self, tokens: Tensor, text: Tensor, modulation: Tensor, visible: Tensor) -> Tensor:
        """Conditions of all tokens [B, L, D].

        tokens [B, L, C] (masked ones are never read), text [B, T, D], modulation [B, D], visible [B, V].
        """
        known = self.z_proj_ln(self.z_proj(gather_tokens(tokens, visible).to(self.z_proj.weight.dtype)))
        x = self.mask_token.to(known.dtype).expand(len(tokens), self.config.num_tokens, -1)
        x = scatter_tokens(x, visible, known) + self.decoder_pos_embed_learned
        for block in self.decoder_blocks:
            text, x = block(x, text, modulation)
        return self.decoder_norm(x, modulation) + self.diffusion_pos_embed_learned

    def conditions_of(
        self,
        tokens: Tensor,
        class_labels: Tensor | None,
        visible: Tensor,
        asked: Tensor,
        drop_mask: Tensor | None,
        guidance_pass: bool,
    ) -> Tensor:
        batch = len(tokens)
        if guidance_pass:  # labels and the empty prompt in one pass, with the same scores
            assert class_labels is not None
            tokens, visible, asked = tokens.repeat(2, 1, 1), visible.repeat(2, 1), asked.repeat(2, 1)
            class_labels = class_labels.repeat(2)
            null = torch.arange(2 * batch, device=tokens.device) >= batch
            drop_mask = null if drop_mask is None else null | drop_mask.repeat(2)
        text, modulation = self.embed_text(class_labels, len(tokens), drop_mask)
        return gather_tokens(self.decode(tokens, text, modulation, visible), asked)

    def decays(self, name: str, parameter: nn.Parameter) -> bool:
        """The official rule: no decay for vectors, and for names that hold one of `UNDECAYED`."""
        return parameter.ndim > 1 and not any(part in name for part in UNDECAYED)
