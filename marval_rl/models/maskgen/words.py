"""A text tower of words: no weights, the model's own projection learns the embeddings. For small vocabularies."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from marval_rl.models.maskgen.prompts import PromptFeatures


class WordTower:
    """Prompts as one-hot words beside one-hot positions; the projection in the model makes both into embeddings.

    Args:
        vocabulary: The words, in lower case.
        length: T, words per prompt at most.
    """

    def __init__(self, vocabulary: Sequence[str], length: int):
        self.vocabulary = {word: index for index, word in enumerate(vocabulary)}
        self.length = length

    @property
    def width(self) -> int:
        """W of the features."""
        return len(self.vocabulary) + self.length

    def encode(self, prompts: Sequence[str]) -> PromptFeatures:
        """The features of prompts and of the empty one, float32.

        Raises:
            ValueError: For a word outside the vocabulary, or too many words.
        """
        tokens = torch.zeros(len(prompts) + 1, self.length, self.width)
        for row, prompt in enumerate(prompts):
            words = prompt.lower().split()
            if len(words) > self.length:
                raise ValueError(f"the prompt {prompt!r} has {len(words)} words, the model reads {self.length}")
            for position, word in enumerate(words):
                if word not in self.vocabulary:
                    raise ValueError(
                        f"the model does not know the word {word!r} of the prompt {prompt!r}; its words are "
                        f"{', '.join(self.vocabulary)}"
                    )
                tokens[row, position, self.vocabulary[word]] = 1
                tokens[row, position, len(self.vocabulary) + position] = 1
        # All words in a row: which stands where is lost, so the joint blocks must read the tokens.
        return PromptFeatures(list(prompts), tokens, tokens.mean(dim=1))
