"""Reward: ImageReward (arXiv 2304.05977), which people's preferences between generated images were distilled into."""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch
from torch import Tensor
from transformers import BertTokenizer

from marval_rl.errors import CheckpointError, first_line

from .blip import MED_CONFIG, SCORE_MEAN, SCORE_STD, ImageRewardNetwork, network_configs, rename_weights
from .network_reward import NetworkReward
from .preprocessing import Preprocessing
from .sharing import shared_network, weights_identity
from .weights import LOADING_ERRORS, check_exists_if_local, load_strictly, read_tensors

MAX_TOKENS = 35
MARKERS = 2  # [DEC] and [ENC], which the published model appends to BERT's vocabulary and never uses here


class ImageReward(NetworkReward):
    """How much people would like the image for its prompt, by ImageReward; about -2 to 2, 0 is average.

    weights           the published ImageReward.pt (or the same tensors as .safetensors)
    med_config        the published med_config.json; None has the same settings built in
    tokenizer         BERT's lower-case vocabulary: vocab.txt, a folder, or a hub id
    dtype             "float32" or "bfloat16" for the network; in bfloat16 scores move by about 0.01
    micro_batch_size  images at a time, with gradients too; None for all
    compile           compile the network (`torch.compile`) on first use: slow to begin, then faster on a GPU

    The published weights run in transformers' BLIP blocks, without the package image-reward and its old pins. Prompts
    are cut after 35 tokens, as there.

    Raises CheckpointError for a file that is missing, cannot be read or does not fit.
    """

    def __init__(
        self,
        weights: str | os.PathLike,
        med_config: str | os.PathLike | None = None,
        tokenizer: str = "bert-base-uncased",
        dtype: str = "float32",
        micro_batch_size: int | None = None,
        compile: bool = False,
    ) -> None:
        settings = MED_CONFIG if med_config is None else _read_med_config(Path(med_config))
        self.tokenizer = _load_tokenizer(str(tokenizer), settings["vocab_size"])
        source = ("ImageReward", weights_identity(str(weights)), json.dumps(settings, sort_keys=True), dtype)
        network = shared_network(source, lambda: _load_network(Path(weights), settings))
        preprocessing = Preprocessing(network.vision.config.image_size)
        super().__init__(network, preprocessing, dtype, micro_batch_size, compile)

    def score(self, images: Tensor, prompts: list[str]) -> Tensor:
        input_ids, attention_mask = (tokens.to(images.device) for tokens in self.tokenize(prompts))
        raw = self.network(self.pixels(images), input_ids, attention_mask).to(images.dtype)
        return (raw - SCORE_MEAN) / SCORE_STD

    def tokenize(self, prompts: list[str]) -> tuple[Tensor, Tensor]:
        """Prompts (length B) -> token ids [B, 35] from [CLS] to [SEP], then zeros, and their mask [B, 35]."""
        tokens = self.tokenizer(
            prompts, padding="max_length", truncation=True, max_length=MAX_TOKENS, return_tensors="pt"
        )
        return tokens["input_ids"], tokens["attention_mask"]


def _load_network(weights: Path, med_config: dict) -> ImageRewardNetwork:
    if not weights.is_file():
        raise CheckpointError(
            f"ImageReward's weights {str(weights)!r} do not exist; download ImageReward.pt from the hub "
            "(THUDM/ImageReward) and give its path"
        )
    tensors = rename_weights(read_tensors(weights))
    configs = network_configs(tensors, med_config, weights)
    with torch.random.fork_rng(devices=[]):  # weights are drawn before they are loaded
        network = ImageRewardNetwork(*configs)
    load_strictly(network, tensors, weights)
    return network


def _read_med_config(path: Path) -> dict:
    try:
        settings = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"med_config {str(path)!r} cannot be read: {first_line(error)}") from error
    missing = MED_CONFIG.keys() - set(settings)
    if missing:
        raise CheckpointError(f"med_config {str(path)!r} lacks {', '.join(sorted(missing))}; it is no med_config.json")
    return settings


def _load_tokenizer(name_or_path: str, vocab_size: int) -> BertTokenizer:
    check_exists_if_local("the tokenizer", name_or_path)
    if Path(name_or_path).is_file():
        with open(name_or_path, encoding="utf-8-sig") as lines:
            vocabulary = {line.rstrip("\n"): number for number, line in enumerate(lines)}
        tokenizer = BertTokenizer(vocab=vocabulary, do_lower_case=True)
    else:
        try:
            tokenizer = BertTokenizer.from_pretrained(name_or_path)
        except LOADING_ERRORS as error:
            raise CheckpointError(
                f"the tokenizer {name_or_path!r} cannot be loaded (give the path of bert-base-uncased's vocab.txt): "
                f"{first_line(error)}"
            ) from error
    if len(tokenizer) + MARKERS != vocab_size:
        raise CheckpointError(
            f"the tokenizer {name_or_path!r} has {len(tokenizer)} tokens, but the network's vocabulary of {vocab_size} "
            f"needs {vocab_size - MARKERS}; give bert-base-uncased's vocab.txt"
        )
    return tokenizer
