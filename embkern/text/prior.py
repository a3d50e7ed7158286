"""Token frequencies guessed from the order of a vocabulary alone."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .counts import check_num_embeddings, check_size

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


# vocabulary_prior: token frequencies of running text, as ranks in the order of a vocabulary.
ZIPF_SHIFT = 2.0


PROSE_RANK, PROSE = 3.0, frozenset(".,-'\"():;?!")


ASCII_RANK = 40.0  # other ASCII characters


SPECIAL_RANK = 1000.0  # in no text, but few, and read by those who mask, pad or chat


UNREAD = 0.01  # of the last rank's frequency


TEXT_TOKENS = 26  # of one text: a sentence


_UNUSED = re.compile(r"[\[<]\|?(unused_?|extra_id_|reserved_(special_token_)?)\d+\|?[\]>]|madeupword\d+")


_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")


_CHARACTER = re.compile(r"(##|▁)?(.)(</w>)?", re.DOTALL)


_WHITESPACE = frozenset(("▁", "Ġ", "Ċ", "<0x0A>"))  # ASCII in disguise


_SHORTEST_ALPHABET = 16  # by chance, one run in 16! is in order


def vocabulary_prior(tokenizer: PreTrainedTokenizerBase | None, num_embeddings: int) -> Tensor:
    """Guess the relative frequency of every token from the order of the vocabulary alone.

    ``1 / (rank + 2)`` (Zipf and Mandelbrot), normalised. Vocabularies of WordPiece, BPE (by merges) and
    Unigram (by scores) are roughly in order of frequency, so a token's rank is its place among those that
    are left without:

    - characters in the order of Unicode (16 or more in a row: the alphabets of WordPiece, the 256 bytes of
      GPT-2) and byte tokens such as ``<0x0A>``: as rare as the last token. But ASCII characters have rank 40
      and the punctuation of prose rank 3, wherever they are, unless their place is better;
    - special and added tokens: rank 1000; those that the tokenizer puts around every text: one in 26 tokens,
      a sentence's length;
    - rows without a token, ``[unused0]``, ``<extra_id_0>`` and the like: a hundredth of the last token's.

    Without a tokenizer the rank is the id. The constants were chosen with uncased BERT's vocabulary on
    English. A token of docstrings costs 10.8 bits under it, one of general English 10.0 (uniform: 14.9; their
    own frequencies: 8.8 and 7.5; `python -m benchmarks quality`). It knows less of BPE, whose first merges
    are mostly merged further. Text in a language that is rare in the vocabulary is not foreseen.

    Args:
        tokenizer: of the model, or None.
        num_embeddings: V, the rows of the model's table.

    Returns:
        (V,) float64, positive, with sum 1.

    Raises:
        ValueError: the tokenizer belongs to another model: its ids do not fit V.
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
    """Ids of single characters of one form that follow each other in the order of Unicode."""
    found: set[int] = set()
    run: list[int] = []
    last: tuple[Any, ...] | None = None
    for id, token in enumerate([*tokens, ""]):
        match = _CHARACTER.fullmatch(token)
        this = match and (match[1], match[3], match[2])
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
    return weights / weights.sum().clamp_min(1e-300)
