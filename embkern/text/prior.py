"""Token frequencies estimated from the order of a vocabulary."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .counts import check_num_embeddings, check_size

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


# Token frequencies of running text, as ranks in the order of a vocabulary; vocabulary_prior explains them.
ZIPF_SHIFT = 2.0
PROSE_RANK, PROSE = 3.0, frozenset(".,-'\"():;?!")
ASCII_RANK = 40.0  # other ASCII characters
SPECIAL_RANK = 1000.0  # absent from text, but few, and read by models that mask, pad or chat
UNREAD = 0.01  # frequency of an unused token, relative to the last rank's
TEXT_TOKENS = 26  # tokens of a text, assumed to be a sentence

_UNUSED = re.compile(r"[\[<]\|?(unused_?|extra_id_|reserved_(special_token_)?)\d+\|?[\]>]|madeupword\d+")
_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")
_CHARACTER = re.compile(r"(##|▁)?(.)(</w>)?", re.DOTALL)
_WHITESPACE = frozenset(("▁", "Ġ", "Ċ", "<0x0A>"))  # how tokenizers write ASCII white space
_SHORTEST_ALPHABET = 16  # characters; by chance, one run of 16 in 16! is sorted


def vocabulary_prior(tokenizer: PreTrainedTokenizerBase | None, num_embeddings: int) -> Tensor:
    """Estimate the relative frequency of every token from the order of the vocabulary.

    ``1 / (rank + 2)`` (Zipf and Mandelbrot), normalised. Vocabularies of WordPiece, BPE (by merges) and
    Unigram (by scores) are roughly in the order of frequency, so that the rank of a token is its place in the
    vocabulary, with these exceptions, which are not counted in the places of the others:

    - characters in the order of Unicode (16 or more in a row, as in the alphabets of WordPiece and the 256
      bytes of GPT-2) and byte tokens such as ``<0x0A>`` are as rare as the last token. ASCII characters have
      at most rank 40 wherever they are, and the punctuation of prose at most rank 3;
    - special and added tokens have rank 1000; each of those that the tokenizer adds to every text is one in
      26 tokens, the length of a sentence;
    - rows without a token, ``[unused0]``, ``<extra_id_0>`` and the like have a hundredth of the frequency of
      the last token.

    Without a tokenizer the rank is the id. The constants were chosen for the vocabulary of uncased BERT and
    English. The cross entropy of docstrings under the estimate is 10.8 bits per token, that of general
    English 10.0 (uniform: 14.9; their own frequencies: 8.8 and 7.5; `python -m benchmarks quality`). The
    estimate is worse for BPE, whose first merges are mostly merged further, and for text in a language that
    is rare in the vocabulary.

    Args:
        tokenizer: the tokenizer of the model, or None.
        num_embeddings: V, the number of rows of the model's table.

    Returns:
        (V,) float64, positive, with sum 1.

    Raises:
        ValueError: the tokenizer belongs to another model: an id is not below V.
    """
    V = num_embeddings
    if tokenizer is None:
        check_num_embeddings(V)
        return normalized(_zipf(torch.arange(V)))
    vocabulary = tokenizer.get_vocab()
    check_size(tokenizer, vocabulary, V)
    tokens = [""] * V
    for token, id in vocabulary.items():
        if id < V:
            tokens[id] = token
    unread = {id for id, token in enumerate(tokens) if not token or _UNUSED.fullmatch(token)}
    special = {id for id in (*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder) if id < V} - unread
    characters = _alphabets(tokens) | {id for id, token in enumerate(tokens) if _BYTE.fullmatch(token)}
    order = sorted(set(range(V)) - unread - special - characters)

    ranks = torch.full((V,), len(order), dtype=torch.float64)
    ranks[order] = torch.arange(len(order), dtype=torch.float64)
    for id, token in enumerate(tokens):
        character = token.removesuffix("</w>")
        if token in _WHITESPACE or (len(character) == 1 and character.isascii()):
            ranks[id] = min(float(ranks[id]), PROSE_RANK if character in PROSE else ASCII_RANK)
    ranks[list(special)] = SPECIAL_RANK
    frequencies = _zipf(ranks)
    frequencies[list(unread)] *= UNREAD
    once_per_text = [id for id in set(tokenizer("")["input_ids"]) if id < V]
    frequencies[once_per_text] = 0
    frequencies = normalized(frequencies) * (1 - len(once_per_text) / TEXT_TOKENS)
    frequencies[once_per_text] = 1 / TEXT_TOKENS
    return normalized(frequencies)


def _alphabets(tokens: list[str]) -> set[int]:
    """Return the ids of alphabets: runs of single characters of one form in the order of Unicode."""
    found: set[int] = set()
    run: list[int] = []
    last: tuple[Any, ...] | None = None
    for id, token in enumerate([*tokens, ""]):  # the empty token ends the last run
        match = _CHARACTER.fullmatch(token)
        this = match and (match[1], match[3], match[2])  # prefix, suffix, character
        if not (this and last and this[:2] == last[:2] and this[2] > last[2]):
            if len(run) >= _SHORTEST_ALPHABET:
                found.update(run)
            run = []
        if this:
            run.append(id)
        last = this
    return found


def _zipf(ranks: Tensor) -> Tensor:
    return 1 / (ranks.double() + ZIPF_SHIFT)


def normalized(weights: Tensor) -> Tensor:
    """Return weights divided by their sum."""
    return weights / weights.sum().clamp_min(1e-300)
