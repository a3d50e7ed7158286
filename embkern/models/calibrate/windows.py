"""Texts to the inputs of a calibration: windows of tokens spread evenly over the text, or whole sentences."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ...text.counts import refuse_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CHARS_PER_TOKEN = 32  # kept of the text, some 8 times as many as a token has
LEAST_TOKENS = 4096
BLOCK_CHARS = 4096  # adjacent text that is kept or left out as one
MASK_SHARE = 0.15
LONGEST_TEXT = 1 << 16  # a longer one is cut


@dataclass(frozen=True)
class Windows:
    """The inputs of a model.

    Attributes:
        ids: the ids of each input, (T,) int64.
        first: number of special tokens at the beginning of each.
        last: number of special tokens at the end of each.
    """

    ids: Sequence[np.ndarray]
    first: int = 0
    last: int = 0

    @property
    def tokens(self) -> int:
        """Number of tokens in all inputs."""
        return sum(map(len, self.ids))

    @property
    def length(self) -> int:
        """Number of tokens in the longest input."""
        return max(map(len, self.ids))

    @property
    def fingerprint(self) -> str:
        """Hash of the ids."""
        found = hashlib.sha256()
        for ids in self.ids:
            found.update(len(ids).to_bytes(8, "little") + ids.astype("<i8").tobytes())
        return f"sha256:{found.hexdigest()[:32]}"

    def hold_out(self, tokens: int) -> tuple[Windows, Windows | None]:
        """Return these inputs without some that are spread evenly over them, and those.

        The latter have some ``tokens`` tokens, but are at most a ninth of the inputs; None if that is none.
        """
        count = min(-(-tokens // self.length), len(self.ids) // 9)
        if count <= 0:
            return self, None
        chosen = {(2 * number + 1) * len(self.ids) // (2 * count) for number in range(count)}
        parts: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])
        for number, ids in enumerate(self.ids):
            parts[number in chosen].append(ids)
        return dataclasses.replace(self, ids=parts[0]), dataclasses.replace(self, ids=parts[1])

    def scored(
        self, number: int, mask: int | None, generator: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return the ids (T,) of an input and the positions (n,) whose outputs are scored.

        With the id of a mask token, 15 % of the tokens besides the special ones are masked and scored, else
        all are scored.
        """
        ids = self.ids[number]
        places = np.arange(len(ids))
        if mask is None:
            return ids, places
        content = places[self.first : len(ids) - self.last]
        places = np.sort(generator.permutation(content)[: max(1, round(MASK_SHARE * len(content)))])
        ids = ids.copy()
        ids[places] = mask
        return ids, places

    def batches(self, tokens: int) -> list[list[int]]:
        """Return the numbers of the inputs of each batch: inputs of one length, at most ``tokens`` together.

        Without padding no position has to be left out, whatever the model does with a mask.
        """
        found = []
        order = sorted(range(len(self.ids)), key=lambda number: len(self.ids[number]))
        for length, group in itertools.groupby(order, key=lambda number: len(self.ids[number])):
            numbers, size = list(group), max(1, tokens // length)
            found += [numbers[start : start + size] for start in range(0, len(numbers), size)]
        return found


@dataclass(frozen=True)
class HeldOut:
    """Inputs of a language model that its calibration did not see.

    Attributes:
        windows: the inputs.
        mask: id of the mask token of a masked language model; None for a causal one.
        seed: random seed of the masks.
    """

    windows: Windows
    mask: int | None = None
    seed: int = 0

    def __iter__(self) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Yield each input: ids (T,), the positions (n,) of scored outputs, and the ids (n,) to predict."""
        for number, ids in enumerate(self.windows.ids):
            if self.mask is None:
                yield ids, np.arange(len(ids) - 1), ids[1:]
                continue
            generator = np.random.default_rng((self.seed, number))
            masked, places = self.windows.scored(number, self.mask, generator)
            yield masked, places, ids[places]


def windows_of_text(
    texts: Iterable[str], tokenizer: PreTrainedTokenizerBase, *, tokens: int, length: int, V: int
) -> Windows:
    """Return windows of equal length that are spread evenly over the texts, joined by newlines.

    Each begins and ends with the special tokens that the tokenizer adds to a text.

    Raises:
        ValueError: the texts have fewer than two tokens, or an id is not below V.
    """
    _check_texts(texts)
    before, after = added_tokens(tokenizer)
    added = len(before) + len(after)
    if length <= added:
        raise ValueError(f"length: expected more than the {added} special tokens, got {length}")
    text = "\n".join(_spread(texts, tokens, BLOCK_CHARS))
    ids = np.asarray(tokenizer(text, **_PLAIN)["input_ids"] if text else [], np.int64)
    if len(ids) < 2:
        raise ValueError(f"texts: expected at least 2 tokens to calibrate on, got {len(ids)}")
    _check_ids([ids, np.array(before + after, np.int64)], V)
    count = -(-min(tokens, len(ids) + added) // length)
    own = min(len(ids) // count, max(2, tokens // count - added), length - added)
    starts = [number * (len(ids) - own) // max(1, count - 1) for number in range(count)]
    windows = [np.concatenate([before, ids[start : start + own], after]).astype(np.int64) for start in starts]
    return Windows(windows, len(before), len(after))


def sentences(
    texts: Iterable[str], tokenizer: PreTrainedTokenizerBase, *, tokens: int, length: int, V: int
) -> Windows:
    """Return single texts, truncated to ``length`` tokens; evenly chosen ones if they have too many tokens.

    Raises:
        ValueError: no text has a token, ``length`` has no room for one, or an id is not below V.
    """
    _check_texts(texts)
    added = sum(map(len, added_tokens(tokenizer)))
    if length <= added:
        raise ValueError(f"length: expected more than the {added} special tokens, got {length}")
    kept = _spread((text[: CHARS_PER_TOKEN * length] for text in texts), tokens, 0)  # the rest is truncated
    encoded = tokenizer(
        kept, truncation=True, max_length=length, padding=False, verbose=False, return_attention_mask=False
    )["input_ids"] if kept else []  # fmt: skip
    found = [np.asarray(ids, np.int64) for ids in encoded if len(ids)]
    if not found:
        raise ValueError("texts: expected a text with at least one token to calibrate on, got none")
    _check_ids(found, V)
    share = min(1.0, tokens / sum(map(len, found)))
    # The k-th text is taken where ceil(share * k) grows.
    due = np.ceil(share * np.arange(1, len(found) + 1) - 1e-9).astype(np.int64)
    return Windows([found[number] for number in np.flatnonzero(np.diff(due, prepend=0))])


_PLAIN = {"add_special_tokens": False, "truncation": False, "verbose": False, "return_attention_mask": False}


def _spread(texts: Iterable[str], tokens: int, block_chars: int) -> list[str]:
    """Return blocks of adjacent texts that are spread evenly over all texts, in their order.

    They have some ``CHARS_PER_TOKEN`` characters for each wanted token, so that little more is tokenised than
    is measured, and memory does not grow with the texts. Texts of white space alone are skipped.

    Args:
        texts: the texts.
        tokens: number of tokens that are wanted.
        block_chars: a block ends with the text that reaches this many characters.
    """
    limit = CHARS_PER_TOKEN * max(tokens, LEAST_TOKENS)
    kept: list[str] = []
    chars, stride = 0, 1  # every stride-th block is kept
    for number, block in enumerate(_blocks(texts, block_chars)):
        if number % stride == 0:
            kept.append(block)
            chars += len(block)
            while chars > limit and len(kept) > 1:
                kept, stride = kept[::2], 2 * stride
                chars = sum(map(len, kept))
    return kept


def _blocks(texts: Iterable[str], block_chars: int) -> Iterator[str]:
    """Yield texts, or texts joined by newlines."""
    block: list[str] = []
    size = 0
    for text in texts:
        for start in range(0, len(text), LONGEST_TEXT):
            piece = text[start : start + LONGEST_TEXT]
            if piece.strip():
                block.append(piece)
                size += len(piece)
                if size >= block_chars:
                    yield "\n".join(block)
                    block, size = [], 0
    if block:
        yield "\n".join(block)


def added_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Return the special tokens that a tokenizer adds before and after a text."""
    plain, whole = tokenizer("a", **_PLAIN)["input_ids"], tokenizer("a", verbose=False)["input_ids"]
    for start in range(len(whole) - len(plain) + 1 if plain else 0):
        if whole[start : start + len(plain)] == plain:
            return list(whole[:start]), list(whole[start + len(plain) :])
    return [], []


def _check_texts(texts: Iterable[str]) -> None:
    if isinstance(texts, (str, bytes)):
        raise TypeError(f"texts: expected an iterable of str (read_texts reads a file), got {type(texts)}")


def _check_ids(found: Sequence[np.ndarray], V: int) -> None:
    largest = max((int(ids.max()) for ids in found if len(ids)), default=0)
    if largest >= V:
        refuse_tokenizer(largest + 1, V)
