"""Token counts: ``count_tokens`` makes them, ``TokenCounts`` holds them in memory and in a file."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import BaseModel, Field
from torch import Tensor
from tqdm import tqdm

from ..io.tensor_format import TensorFormat

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


FORMAT = TensorFormat("embkern.counts/1", "token counts", required=("counts",), settings=("facts",))
_MOST = 2**63 - 1
BATCH_CHARS = 1 << 18  # characters per call of the tokenizer, which needs about 100 bytes for each


def count_tokens(
    texts: Iterable[str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    num_embeddings: int | None = None,
    progress: bool | None = None,
    batch_chars: int = BATCH_CHARS,
) -> TokenCounts:
    """Count the tokens of texts.

    ``sum(torch.bincount(torch.tensor(tokenizer(text).input_ids), minlength=V) for text in texts)``

    Texts are not truncated. Tokens that the tokenizer adds (CLS, SEP, BOS) count once per text. Texts of
    white space alone are skipped.

    Args:
        texts: an iterable of str, such as ``read_texts`` returns; it is consumed once.
        tokenizer: a fast tokenizer of transformers.
        num_embeddings: V, the number of rows of the model's table; None takes the largest id plus 1.
        progress: whether to show a progress bar on stderr; None shows it on a terminal.
        batch_chars: characters per call of the tokenizer.

    Raises:
        ValueError: there is no text, or the tokenizer belongs to another model: an id is not below V.
        TypeError: ``texts`` is a single string.
    """
    if isinstance(texts, (str, bytes)):
        raise TypeError(f"texts: expected an iterable of str (read_texts reads a file), got {type(texts)}")
    vocabulary = tokenizer.get_vocab()
    V = check_size(tokenizer, vocabulary, num_embeddings)
    counts, read = np.zeros(V, np.int64), 0
    with tqdm(
        desc="count tokens", unit="token", unit_scale=True, disable=None if progress is None else not progress
    ) as bar:
        for batch in _batches(texts, batch_chars):
            encoded = tokenizer(
                batch, add_special_tokens=True, padding=False, truncation=False, verbose=False,
                return_attention_mask=False, return_token_type_ids=False,
            )  # fmt: skip
            ids = np.fromiter(itertools.chain.from_iterable(encoded["input_ids"]), np.int64)
            found = np.bincount(ids, minlength=V)
            if len(found) > V:
                refuse_tokenizer(len(found), V)
            counts += found
            read += len(batch)
            bar.update(len(ids))
    if not counts.any():
        raise ValueError("texts: expected some text, got none")
    return TokenCounts(torch.from_numpy(counts), read, fingerprint(tokenizer), len(vocabulary))


@dataclass(frozen=True, eq=False)
class TokenCounts:
    """How often each token occurs in some texts.

    Attributes:
        counts: (V,) int64 on the CPU; V may exceed the size of the vocabulary, as in padded tables.
        texts: number of texts.
        fingerprint: hash of the tokenizer's vocabulary.
        vocabulary_size: tokens of the tokenizer, added ones included.

    Raises:
        ValueError: the counts are not (V,) with V >= 1, a number is negative, or the sum exceeds int64.
        TypeError: the counts are not int64.
    """

    counts: Tensor
    texts: int
    fingerprint: str
    vocabulary_size: int

    def __post_init__(self) -> None:
        if self.counts.dtype != torch.int64:
            raise TypeError(f"counts: expected int64, got {self.counts.dtype}")
        if self.counts.dim() != 1 or not len(self.counts):
            raise ValueError(f"counts: expected shape (V,) with V >= 1, got {tuple(self.counts.shape)}")
        if self.texts < 0 or self.vocabulary_size < 0 or int(self.counts.min()) < 0:
            raise ValueError("counts, texts, vocabulary_size: expected at least 0, got less")
        if (total := _exact_sum(self.counts)) >= 2**63:
            raise ValueError(f"counts: expected a sum below 2^63, got {total:,}")

    @classmethod
    def from_mapping(
        cls, counts: Mapping[Any, int], num_embeddings: int, tokenizer: PreTrainedTokenizerBase | None
    ) -> TokenCounts:
        """Return counts that are given by id or by token, such as a ``collections.Counter``; others are 0.

        Args:
            counts: maps ids below V, or pieces of the tokenizer's vocabulary, to integers.
            num_embeddings: V.
            tokenizer: the tokenizer of the ids; needed for pieces.

        Raises:
            ValueError: a key is no id below V and no token, or a count is negative.
            TypeError: a count is no integer.
        """
        vocabulary = {} if tokenizer is None else tokenizer.get_vocab()
        found = np.zeros(num_embeddings, np.int64)
        for key, count in counts.items():
            id = vocabulary.get(key, -1) if isinstance(key, str) else key
            if not isinstance(id, (int, np.integer)) or not 0 <= id < num_embeddings:
                tokens = "" if tokenizer is None else " or tokens of the model's tokenizer"
                raise ValueError(f"counts: expected ids below {num_embeddings}{tokens} as keys, got {key!r}")
            if not isinstance(count, (int, np.integer)):
                raise TypeError(f"counts: expected integers, got {count!r} for {key!r}")
            if not 0 <= count <= _MOST:
                raise ValueError(f"counts: expected integers from 0 to {_MOST}, got {count} for {key!r}")
            found[id] += count
        known = "none" if tokenizer is None else fingerprint(tokenizer)
        return cls(torch.from_numpy(found), 0, known, len(vocabulary))

    @property
    def tokens(self) -> int:
        """Number of tokens: the sum of the counts."""
        return int(self.counts.sum())

    def __add__(self, other: TokenCounts) -> TokenCounts:
        """Return the sum of two counts; V is the larger of the two.

        Raises:
            ValueError: the counts belong to different tokenizers, or the sum exceeds int64.
        """
        if self.fingerprint != other.fingerprint:
            raise ValueError(
                "counts: expected those of one tokenizer, got "
                f"{self.fingerprint} ({self.vocabulary_size} tokens) "
                f"and {other.fingerprint} ({other.vocabulary_size} tokens)"
            )
        V = max(len(self.counts), len(other.counts))
        total = self.resized(V).counts + other.resized(V).counts
        return TokenCounts(total, self.texts + other.texts, self.fingerprint, self.vocabulary_size)

    def resized(self, num_embeddings: int) -> TokenCounts:
        """Return the counts with ``num_embeddings`` entries, padded with 0 or cut.

        Raises:
            ValueError: an entry that would be cut is not 0.
        """
        if bool(self.counts[num_embeddings:].any()):
            refuse_tokenizer(int(self.counts.nonzero().max()) + 1, num_embeddings)
        counts = F.pad(self.counts[:num_embeddings], (0, max(0, num_embeddings - len(self.counts))))
        return TokenCounts(counts, self.texts, self.fingerprint, self.vocabulary_size)

    def check_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Raise ValueError if the counts belong to another tokenizer."""
        if (got := fingerprint(tokenizer)) != self.fingerprint:
            raise ValueError(
                f"counts: expected those of the model's tokenizer ({got}, {len(tokenizer)} tokens), "
                f"got those of {self.fingerprint} ({self.vocabulary_size} tokens)"
            )

    def summary(self, tokenizer: PreTrainedTokenizerBase, top: int = 10) -> CountSummary:
        """Return a summary with the ``top`` most frequent tokens."""
        ids = self.counts.argsort(descending=True, stable=True)[: min(top, int(self.counts.count_nonzero()))]
        named = zip(
            ids.tolist(),
            tokenizer.convert_ids_to_tokens(ids.tolist()),
            self.counts[ids].tolist(),
            strict=True,
        )
        distinct = int(self.counts.count_nonzero())
        return CountSummary(
            texts=self.texts,
            tokens=self.tokens,
            distinct=distinct,
            vocabulary_size=self.vocabulary_size,
            seen=distinct / max(1, self.vocabulary_size),
            fingerprint=self.fingerprint,
            top=[TopToken(id=i, token=token, count=count) for i, token, count in named],
        )

    def save(self, path: str | os.PathLike) -> None:
        """Write the counts to one safetensors file; an existing file is replaced atomically."""
        facts = {
            "texts": self.texts,
            "fingerprint": self.fingerprint,
            "vocabulary_size": self.vocabulary_size,
        }
        FORMAT.save(path, {"counts": self.counts}, facts=facts)

    @classmethod
    def load(cls, path: str | os.PathLike) -> TokenCounts:
        """Read a file that ``save`` wrote.

        Raises:
            FileNotFoundError: the file does not exist.
            ValueError: the file is truncated, edited, or not a file of counts.
        """

        def build(tensors: dict[str, Any], settings: dict[str, Any]) -> TokenCounts:
            facts = settings["facts"]
            texts, fingerprint, size = (facts[name] for name in ("texts", "fingerprint", "vocabulary_size"))
            if type(texts) is not int or type(size) is not int or type(fingerprint) is not str:
                raise TypeError(f"facts: expected integers and a fingerprint, got {facts!r}")
            return cls(tensors["counts"], texts, fingerprint, size)

        return FORMAT.load(path, build)


class TopToken(BaseModel):
    """A token and its count."""

    id: int
    token: str
    count: int


class CountSummary(BaseModel):
    """A summary of token counts, as ``embkern count`` prints it."""

    texts: int = Field(description="number of texts")
    tokens: int = Field(description="number of tokens in them")
    distinct: int = Field(description="tokens that occur at least once")
    vocabulary_size: int = Field(description="tokens of the tokenizer, added ones included")
    seen: float = Field(description="distinct / vocabulary_size")
    fingerprint: str = Field(description="hash of the tokenizer's vocabulary")
    top: list[TopToken] = Field(description="the most frequent tokens, in descending order")

    def rows(self) -> dict[str, str]:
        """Return the rows of the printed table by name."""
        return {
            "texts": f"{self.texts:,}",
            "tokens": f"{self.tokens:,}",
            "distinct": f"{self.distinct:,} of the vocabulary's {self.vocabulary_size:,} ({self.seen:.1%})",
            "most frequent": "  ".join(f"{each.token} {each.count / self.tokens:.1%}" for each in self.top),
        }


def fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a hash of a tokenizer's vocabulary (tokens and ids) that is the same in every process."""
    vocabulary = json.dumps(sorted(tokenizer.get_vocab().items()))
    return f"sha256:{hashlib.sha256(vocabulary.encode()).hexdigest()[:32]}"


def check_size(
    tokenizer: PreTrainedTokenizerBase, vocabulary: dict[str, int], num_embeddings: int | None
) -> int:
    """Return V, by default the largest id plus 1.

    Added tokens may have ids of V and above; ``count_tokens`` raises if one occurs.

    Raises:
        ValueError: another token has such an id.
    """
    if num_embeddings is None:
        return max(vocabulary.values()) + 1
    check_num_embeddings(num_embeddings)
    added = tokenizer.added_tokens_encoder
    size = max((id for token, id in vocabulary.items() if token not in added), default=-1) + 1
    if size > num_embeddings:
        refuse_tokenizer(size, num_embeddings)
    return num_embeddings


def check_num_embeddings(num_embeddings: int) -> None:
    """Raise ValueError unless ``num_embeddings`` is at least 1."""
    if num_embeddings < 1:
        raise ValueError(f"num_embeddings: expected at least 1, got {num_embeddings}")


def refuse_tokenizer(size: int, num_embeddings: int) -> NoReturn:
    """Raise the ValueError of a tokenizer with ids up to ``size - 1`` beside a smaller table."""
    raise ValueError(
        f"tokenizer: expected ids below the table's {num_embeddings} rows, got ids up to {size - 1}; "
        "it belongs to another model"
    )


def _batches(texts: Iterable[str], chars: int) -> Iterator[list[str]]:
    """Yield lists of texts that together have ``chars`` characters or more; skip texts of white space."""
    batch: list[str] = []
    size = 0
    for text in texts:
        if text.strip():
            batch.append(text)
            size += len(text)
            if size >= chars:
                yield batch
                batch, size = [], 0
    if batch:
        yield batch


def _exact_sum(counts: Tensor) -> int:
    """Return the sum of counts without int64 overflow."""
    return (int((counts >> 32).sum()) << 32) + int((counts & 0xFFFFFFFF).sum())
