"""The text tower of MaskGen and TA-TiTok: CLIP's, by open_clip, and the three of its outputs that they read.

Generator and decoder read different layers. Mixing them up moves an image by a tenth (relative L2) and no shape tells.
"""

from __future__ import annotations

import hashlib
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from marval_rl.errors import CheckpointError, first_line, nearest
from marval_rl.models.maskgen.prompts import PromptFeatures

PROMPTS_AT_ONCE = 64
LOCAL = "local-dir:"  # open_clip's prefix of a folder with the configuration and the weights


class TowerOutputs(NamedTuple):
    """What the tower says of B prompts of T positions, W wide."""

    penultimate: Tensor  # [B, T, W], output of the last block but one, without a norm: the generator's tokens
    pooled: Tensor  # [B, W], last block, final norm, end-of-text position, projected: the generator's modulation
    final: Tensor  # [B, T, W], last block, final norm, not projected: the tokenizer's decoder


class TextTower:
    """A frozen CLIP text tower with its tokenizer.

    Args:
        network: open_clip's `CLIP` or `TextTransformer`.
        tokenizer: Prompts to ids: (list of N prompts, number of positions) -> int64 [N, T].
        identity: What tells this tower from others, for caches: its name, weights and tokenizer.
    """

    def __init__(self, network: Any, tokenizer: Callable[[Sequence[str], int], Tensor], identity: str):
        self.network = network.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.identity = f"{identity}, {self.activation}"

    @property
    def length(self) -> int:
        """T, positions of a prompt."""
        return len(self.network.positional_embedding)

    @property
    def activation(self) -> str:
        """The activation in use: OpenAI's weights were trained with "quick GELU"."""
        return "exact GELU" if isinstance(self.network.transformer.resblocks[0].mlp.gelu, nn.GELU) else "quick GELU"

    @torch.no_grad()
    def outputs(self, ids: Tensor) -> TowerOutputs:
        """The three outputs for token ids, int64 [B, T]. Padding is read like everything else."""
        network = self.network
        blocks = network.transformer.resblocks
        caught: list[Tensor] = []
        hook = blocks[-2].register_forward_hook(lambda _module, _inputs, output: caught.append(output))
        try:
            length = ids.shape[1]
            x = network.token_embedding(ids) + network.positional_embedding[:length]
            final = network.ln_final(network.transformer(x, attn_mask=network.attn_mask[:length, :length]))
        finally:
            hook.remove()
        # The end of text has the largest id. open_clip's own pooling returns one value or two, by its release.
        last = final[torch.arange(len(ids), device=ids.device), ids.argmax(dim=1)]
        return TowerOutputs(caught[0], last @ network.text_projection, final)

    def encode(
        self,
        prompts: Sequence[str],
        *,
        dtype: torch.dtype = torch.float16,
        device: torch.device | str = "cpu",
        progress: bool = False,
    ) -> PromptFeatures:
        """The features of prompts and of the empty one, on the CPU in `dtype`; computed in float32 on `device`."""
        self.network.to(device)
        ids = self.tokenizer([*prompts, ""], self.length)
        self._note_cut(prompts, ids)
        parts = []
        for part in tqdm(ids.split(PROMPTS_AT_ONCE), desc="encoding prompts", disable=not progress, leave=False):
            parts.append([output.to("cpu", dtype) for output in self.outputs(part.to(device))])
        tokens, pooled, final = (torch.cat(column) for column in zip(*parts, strict=True))
        return PromptFeatures(list(prompts), tokens, pooled, final)

    def _note_cut(self, prompts: Sequence[str], ids: Tensor) -> None:
        """Warn of prompts whose end is cut off: with room for one more token they end later."""
        longer = self.tokenizer([*prompts, ""], self.length + 1)[:, : self.length]
        cut = [prompt for prompt, differs in zip(prompts, (ids != longer).any(dim=1)[:-1], strict=True) if differs]
        if cut:
            warnings.warn(
                f"the text tower reads {self.length} tokens of a prompt: the end of {len(cut)} of {len(prompts)} "
                f"counts for nothing, the first of them {cut[0]!r}",
                stacklevel=3,
            )


def load_tower(model: str, pretrained: str | None) -> TextTower:
    """CLIP's text tower by open_clip; its image tower is dropped.

    Args:
        model: A name of open_clip, such as "ViT-L-14-336-quickgelu", or "local-dir:FOLDER".
        pretrained: A tag of open_clip ("openai") or a file of weights; None for a folder, which has its own.

    Raises:
        CheckpointError: Without open_clip, or for weights that are missing or damaged.
        ValueError: For a model that open_clip does not know, or without a text tower of CLIP's kind.
    """
    try:
        import open_clip
    except ImportError as error:
        raise CheckpointError(
            f"the text tower needs open_clip_torch, which cannot be imported ({first_line(error)}); "
            "install it: pip install 'marval-rl[rewards]'"
        ) from error
    _check_source(open_clip, model, pretrained)
    try:
        with torch.random.fork_rng(devices=[]), _silent_log():
            clip = open_clip.create_model(model, pretrained, require_pretrained=True, weights_only=True)
            tokenizer = open_clip.get_tokenizer(model)
    except (OSError, RuntimeError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"cannot load the text tower {model!r} with the weights {pretrained!r}: {first_line(error)}"
        ) from error
    if not isinstance(clip, open_clip.CLIP):
        raise ValueError(f"{model!r} is a {type(clip).__name__}; MaskGen reads the text tower of a CLIP")
    del clip.visual
    tower = TextTower(clip, lambda texts, length: tokenizer(list(texts), length), tower_identity(model, pretrained))
    if tower.activation == "exact GELU" and pretrained == "openai":
        warnings.warn(
            f"OpenAI's weights were trained with quick GELU, and {model!r} has the exact one: write "
            f"{model.removesuffix('-quickgelu')}-quickgelu",
            stacklevel=2,
        )
    return tower


def tower_identity(model: str, pretrained: str | None) -> str:
    """A line that two towers share only if they encode alike; files count by their content."""
    if model.startswith(LOCAL):
        folder = Path(model.removeprefix(LOCAL))
        files = sorted(path for path in folder.iterdir() if path.is_file())
        return f"{LOCAL}{_digest(files)}"
    weights = _digest([Path(pretrained)]) if pretrained is not None and Path(pretrained).is_file() else pretrained
    return f"{model}, {weights}, CLIP's BPE"


def _digest(files: Sequence[Path]) -> str:
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def _check_source(open_clip: Any, model: str, pretrained: str | None) -> None:
    """Refuses what open_clip would take for random weights or for another thing."""
    if model.startswith(LOCAL):
        folder = Path(model.removeprefix(LOCAL))
        if not (folder / "open_clip_config.json").is_file():
            raise CheckpointError(f"{model!r}: there is no {folder / 'open_clip_config.json'}; give a folder with one")
        if pretrained is not None:
            raise ValueError(f"{model!r} has weights of its own; leave text_pretrained ({pretrained!r}) out")
        return
    if model not in open_clip.list_models():
        hint = nearest(model, open_clip.list_models())
        raise ValueError(f"unknown text tower {model!r}{hint} (a folder is written local-dir:FOLDER)")
    tags = open_clip.list_pretrained_tags_by_model(model)
    if pretrained is None or not (open_clip.is_pretrained_cfg(model, pretrained) or Path(pretrained).is_file()):
        raise CheckpointError(
            f"text_pretrained {pretrained!r} is neither a file nor a tag of {model} ({', '.join(tags)})"
        )


@contextmanager
def _silent_log() -> Iterator[None]:
    """What open_clip logs of a failure is in the error that it raises."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        yield
    finally:
        logging.disable(before)
