"""The words whose nearest neighbours a study lists."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Positions of the default words among all words in order of falling frequency.
TYPICAL = (0.001, 0.01, 0.1, 0.3, 0.6, 0.95)

_WORD = re.compile(r"[Ġ▁]?[^\W\d_]{3,}")  # BPE and SentencePiece mark the start of a word


def typical_words(frequencies: Tensor, tokenizer: PreTrainedTokenizerBase | None) -> list[int]:
    """Return the ids of some words, from frequent to rare."""
    order = frequencies.argsort(descending=True, stable=True).tolist()
    names = [None] * len(order) if tokenizer is None else tokenizer.convert_ids_to_tokens(order)
    words = [i for i, name in zip(order, names, strict=True) if name and _WORD.fullmatch(name)]
    marked = {i for i, name in zip(order, names, strict=True) if name and name[0] in "Ġ▁"}
    words = [i for i in words if i in marked] or words or order
    return list(dict.fromkeys(words[int(place * len(words))] for place in TYPICAL))


def find_words(words: Iterable[str], tokenizer: PreTrainedTokenizerBase | None) -> list[int]:
    """Return the ids of words that are a single token.

    Raises:
        ValueError: there is no tokenizer, or a word is not one of its tokens.
    """
    if tokenizer is None:
        raise ValueError("words: expected a tokenizer beside the model, found none")
    vocabulary = tokenizer.get_vocab()
    ids = []
    for word in words:
        found = next((vocabulary[mark + word] for mark in ("Ġ", "▁", "") if mark + word in vocabulary), None)
        if found is None:
            pieces = ", ".join(tokenizer.tokenize(word)) or "nothing"
            raise ValueError(f"words: expected words that are one token, got {word!r}, read as {pieces}")
        ids.append(found)
    return list(dict.fromkeys(ids))
