"""Texts to windows: the inputs of a language model, with the positions to score and their targets."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Masking = Literal["80-10-10", "mask"]
LineFilter = Literal["authors"]
Separator = Literal["newline", "eos"]
Beginning = Literal["text", "window"]

TOKENIZED_AT_ONCE = 1 << 18  # characters; a tokenizer needs some 100 bytes for each
AUTHORS_SHORTEST = 20  # least number of tokens of a line that the authors' filter keeps
_EQUAL_SIGNS = ("=", "Ġ=", "▁=")


class Window(NamedTuple):
    """One input of a model, without padding.

    Attributes:
        ids: (T,) int64, with masks in place of the tokens to predict.
        positions: (n,) positions of the scored outputs; n may be 0.
        targets: (n,) ids that they should predict.
        read: number of tokens that no earlier window had.
    """

    ids: np.ndarray
    positions: np.ndarray
    targets: np.ndarray
    read: int


def masked_windows(
    texts: Iterable[str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    vocabulary_size: int,
    max_length: int,
    seed: int,
    probability: float,
    masking: Masking,
    line_filter: LineFilter | None = None,
    max_tokens: int | None = None,
) -> Iterator[Window]:
    """Yield each text with some of its words masked; a text longer than a window continues in the next.

    The words and their replacements are drawn with ``(seed, number of the window)``, so that they depend on
    the texts and the tokenizer alone.

    Raises:
        ValueError: the tokenizer has no mask, or does not know which tokens form a word.
    """
    if tokenizer.mask_token_id is None:
        raise ValueError("tokenizer: has no mask token, which a masked language model fills in")
    if not tokenizer.is_fast:
        raise ValueError(
            f"tokenizer: expected a fast one, which knows the words, got {type(tokenizer).__name__}"
        )
    mask, equal_signs = tokenizer.mask_token_id, _ids_of(tokenizer, _EQUAL_SIGNS)
    number = read = 0
    for ids, words in _chunks(texts, tokenizer, max_length):
        if line_filter == "authors":
            kept = ~np.isin(ids, equal_signs)
            ids, words = ids[kept], words[kept]
            if len(ids) < AUTHORS_SHORTEST:
                continue
        generator = np.random.default_rng((seed, number))
        positions = whole_words(words, probability, generator)
        masked = ids.copy()
        masked[positions] = mask
        if masking == "80-10-10":
            masked[positions] = _some_kept(masked[positions], ids[positions], vocabulary_size, generator)
        yield Window(masked, positions, ids[positions], len(ids))
        number += 1
        read += len(ids)
        if max_tokens is not None and read >= max_tokens:
            return


def whole_words(words: np.ndarray, probability: float, generator: np.random.Generator) -> np.ndarray:
    """Return the sorted positions (n,) of the words to mask.

    Words are taken in random order until ``max(1, round(probability * T))`` tokens are chosen; a word with
    more tokens than remain to be chosen is skipped. Transformers' ``DataCollatorForWholeWordMask`` worked in
    this way when the paper was measured; its later version masks every word with the probability.

    Args:
        words: (T,) index of each token's word, -1 for special tokens.
        probability: share of the tokens to mask, relative to all tokens.
        generator: draws the order.
    """
    left = max(1, round(probability * len(words)))
    chosen: list[np.ndarray] = []
    for word in generator.permutation(np.unique(words[words >= 0])):
        positions = np.flatnonzero(words == word)
        if len(positions) <= left:
            chosen.append(positions)
            left -= len(positions)
            if not left:
                break
    return np.sort(np.concatenate(chosen)) if chosen else np.zeros(0, np.int64)


def _some_kept(
    masks: np.ndarray, ids: np.ndarray, vocabulary_size: int, generator: np.random.Generator
) -> np.ndarray:
    """Replace a tenth of the masks by random tokens, and a tenth by the original ones."""
    draw = generator.random(len(ids))
    random = generator.integers(vocabulary_size, size=len(ids))
    return np.select([draw < 0.8, draw < 0.9], [masks, random], ids)


def _chunks(
    texts: Iterable[str], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield the token ids of each text with the indices of their words, -1 for special tokens."""
    for batch in _grouped(texts):
        encoded = tokenizer(
            batch, truncation=True, max_length=max_length, return_overflowing_tokens=True, padding=False,
            return_attention_mask=False, return_token_type_ids=False, verbose=False,
        )  # fmt: skip
        for i, ids in enumerate(encoded["input_ids"]):
            words = [-1 if word is None else word for word in encoded.word_ids(i)]
            yield np.array(ids, np.int64), np.array(words, np.int64)


def causal_windows(
    texts: Iterable[str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    stride: int,
    separator: Separator = "newline",
    beginning: Beginning = "text",
    max_tokens: int | None = None,
) -> Iterator[Window]:
    """Yield windows that slide by ``stride`` tokens over all texts, joined to one.

    Every token but the first is predicted once; after the first window, with at least ``max_length - stride``
    tokens of context. With ``stride == max_length`` the first token of each window is not predicted.

    With ``beginning="window"`` the special tokens that begin a text (BOS) begin every window, not the first
    alone, and take their place in its ``max_length`` tokens. Where there are any, every token of the text is
    predicted then.

    Raises:
        ValueError: ``separator`` is ``eos`` and the tokenizer has no end-of-text token, or a window has no
            room for two tokens of text.
    """
    if separator == "eos" and tokenizer.eos_token_id is None:
        raise ValueError("separator: expected newline, as the tokenizer has no end-of-text token; got eos")
    first, ids = _first_tokens(tokenizer), _joined(texts, tokenizer, separator)
    each: list[int] = []  # what begins every window
    if beginning == "window":
        each = first
    else:
        ids = itertools.chain(first, ids)
    room = max_length - len(each)
    if room < 2:
        raise ValueError(f"max_length: expected at least {len(each) + 2}, got {max_length}")
    window: list[int] = []
    fresh = 0  # number of tokens at its end that no earlier window had
    for token in itertools.islice(ids, max_tokens):
        window.append(token)
        fresh += 1
        if len(window) == room:
            yield _predicting(each + window, fresh)
            window, fresh = window[stride:], 0
    if fresh:
        yield _predicting(each + window, fresh)


def _predicting(window: Sequence[int], fresh: int) -> Window:
    ids = np.array(window, np.int64)
    targets = np.arange(max(1, len(ids) - fresh), len(ids))
    return Window(ids, targets - 1, ids[targets], fresh)


def _first_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the special tokens that begin a text (BOS)."""
    probe = tokenizer("a", return_special_tokens_mask=True)
    marked = zip(probe["input_ids"], probe["special_tokens_mask"], strict=True)
    return [id for id, special in itertools.takewhile(lambda pair: pair[1], marked)]


def _joined(texts: Iterable[str], tokenizer: PreTrainedTokenizerBase, separator: Separator) -> Iterator[int]:
    """Yield the ids of all texts."""
    plain = functools.partial(tokenizer, add_special_tokens=False, truncation=False, verbose=False)
    newline = ""
    for batch in _grouped(texts):
        if separator == "eos":
            for ids in plain(batch)["input_ids"]:
                yield from ids
                yield tokenizer.eos_token_id
        else:
            yield from plain(newline + "\n".join(batch))["input_ids"]
            newline = "\n"


def _grouped(texts: Iterable[str]) -> Iterator[list[str]]:
    """Yield lists of texts with ``TOKENIZED_AT_ONCE`` characters or more, the last one with the rest."""
    batch: list[str] = []
    size = 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= TOKENIZED_AT_ONCE:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _ids_of(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[str]) -> list[int]:
    vocabulary = tokenizer.get_vocab()
    return [vocabulary[token] for token in tokens if token in vocabulary]
