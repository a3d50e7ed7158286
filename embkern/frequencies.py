"""How often each token is read: counted in texts, guessed from the order of a vocabulary, or both mixed."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import BaseModel, Field
from torch import Tensor
from tqdm import tqdm

from .files import check_writable
from .tensor_file import TensorFormat
from .text import read_texts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FORMAT = TensorFormat("embkern.counts/1", "token counts", required=("counts",), settings=("facts",))
BATCH_CHARS = 1 << 18  # per call of the tokenizer, which holds some 100 bytes for each

# vocabulary_prior: token frequencies of running text, as ranks in the order of a vocabulary.
ZIPF_SHIFT = 2.0
PROSE_RANK, PROSE = 3.0, frozenset(".,-'\"():;?!")
ASCII_RANK = 40.0  # other ASCII characters
SPECIAL_RANK = 1000.0  # in no text, but few, and read by those who mask, pad or chat
UNREAD = 0.01  # of the last rank's frequency
TEXT_TOKENS = 26  # of one text: a sentence
STRENGTH = 5000.0  # of the prior, in tokens; see expected_frequencies
# The same where rows are weighed to compress a table: a rare token moves a sentence more than its likelihood
# says. Spearman of sentence similarities, all-MiniLM-L6-v2 at 16x and 32x: .998 and .993 on text of the kind
# that was counted, .987 and .930 on another; with 10,000 (`python -m benchmarks quality --strength 10000`)
# .999 and .995, .980 and .867.
COMPRESSION_STRENGTH = 100_000.0

_UNUSED = re.compile(r"[\[<]\|?(unused_?|extra_id_|reserved_(special_token_)?)\d+\|?[\]>]|madeupword\d+")
_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")
_CHARACTER = re.compile(r"(##|▁)?(.)(</w>)?", re.DOTALL)
_WHITESPACE = frozenset(("▁", "Ġ", "Ċ", "<0x0A>"))  # ASCII in disguise
_SHORTEST_ALPHABET = 16  # by chance, one run in 16! is in order


class TopToken(BaseModel):
    """A token and how often it was read."""

    id: int
    token: str
    count: int


class CountSummary(BaseModel):
    """What ``embkern count`` prints."""

    texts: int
    tokens: int
    distinct: int = Field(description="tokens read at least once")
    vocabulary_size: int
    seen: float = Field(description="distinct over vocabulary size")
    fingerprint: str
    top: list[TopToken] = Field(description="the most frequent, the first first")

    def rows(self) -> dict[str, str]:
        """Return the rows of the printed table."""
        return {
            "texts": f"{self.texts:,}",
            "tokens": f"{self.tokens:,}",
            "distinct": f"{self.distinct:,} of the vocabulary's {self.vocabulary_size:,} ({self.seen:.1%})",
            "most frequent": "  ".join(f"{each.token} {each.count / self.tokens:.1%}" for each in self.top),
        }


@dataclass(frozen=True, eq=False)
class TokenCounts:
    """How often each token was read.

    Attributes:
        counts: (V,) int64 on the CPU; V may be larger than the vocabulary, as padded tables are.
        texts: how many texts were read.
        fingerprint: of the tokenizer's vocabulary, see ``fingerprint``.
        vocabulary_size: tokens of the tokenizer, added ones included.

    Raises:
        ValueError: the counts are not (V,) with V >= 1, or something is negative.
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
        if (total := _sum(self.counts)) >= 2**63:
            raise ValueError(f"counts: expected fewer than 2^63 tokens all together, got {total:,}")

    @property
    def tokens(self) -> int:
        """Tokens read, all together."""
        return int(self.counts.sum())

    def __add__(self, other: TokenCounts) -> TokenCounts:
        """Counts of the texts of both; the longer of two sizes V.

        Raises:
            ValueError: they are of different tokenizers.
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
        """Return the counts for a table of another size.

        Raises:
            ValueError: a token was read that the table does not have.
        """
        if bool(self.counts[num_embeddings:].any()):
            _refuse_tokenizer(int(self.counts.nonzero().max()) + 1, num_embeddings)
        counts = F.pad(self.counts[:num_embeddings], (0, max(0, num_embeddings - len(self.counts))))
        return TokenCounts(counts, self.texts, self.fingerprint, self.vocabulary_size)

    def check_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Raise ValueError if the counts are of another tokenizer."""
        if (got := fingerprint(tokenizer)) != self.fingerprint:
            raise ValueError(
                f"counts: expected those of the model's tokenizer ({got}, {len(tokenizer)} tokens), "
                f"got those of {self.fingerprint} ({self.vocabulary_size} tokens)"
            )

    def summary(self, tokenizer: PreTrainedTokenizerBase, top: int = 10) -> CountSummary:
        """Describe the counts, with the most frequent tokens by name."""
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
        """Write one safetensors file; a file already there is replaced whole or not at all."""
        facts = {
            "texts": self.texts,
            "fingerprint": self.fingerprint,
            "vocabulary_size": self.vocabulary_size,
        }
        FORMAT.save(path, {"counts": self.counts}, facts=facts)

    @classmethod
    def load(cls, path: str | os.PathLike) -> TokenCounts:
        """Read what ``save`` wrote.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is truncated, edited, or not a file of counts.
        """

        def build(tensors: dict[str, Any], settings: dict[str, Any]) -> TokenCounts:
            facts = settings["facts"]
            texts, fingerprint, size = (facts[name] for name in ("texts", "fingerprint", "vocabulary_size"))
            if type(texts) is not int or type(size) is not int or type(fingerprint) is not str:
                raise TypeError(f"facts: expected whole numbers and a fingerprint, got {facts!r}")
            return cls(tensors["counts"], texts, fingerprint, size)

        return FORMAT.load(path, build)


def _sum(counts: Tensor) -> int:
    """The sum of counts, which int64 need not hold."""
    return (int((counts >> 32).sum()) << 32) + int((counts & 0xFFFFFFFF).sum())


def fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a hash of a tokenizer's vocabulary, token to id, that does not depend on the process."""
    vocabulary = json.dumps(sorted(tokenizer.get_vocab().items()))
    return f"sha256:{hashlib.sha256(vocabulary.encode()).hexdigest()[:32]}"


def count_tokens(
    texts: Iterable[str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    num_embeddings: int | None = None,
    progress: bool | None = None,
    batch_chars: int = BATCH_CHARS,
) -> TokenCounts:
    """Count the tokens of texts, as ``tokenizer(text)`` reads them, without truncation.

    ``sum(torch.bincount(torch.tensor(tokenizer(text).input_ids), minlength=V) for text in texts)``

    Tokens that the tokenizer adds (CLS, SEP, BOS) count once per text. Texts of white space are left out.

    Args:
        texts: any iterable, such as ``read_texts`` returns; it is read once and not kept.
        tokenizer: of transformers; a fast one.
        num_embeddings: V, the rows of the model's table; by default one per token of the tokenizer.
        progress: show a bar on stderr; None shows it on a terminal.
        batch_chars: characters that are given to the tokenizer at once.

    Raises:
        ValueError: there is no text, or the tokenizer belongs to another model: its ids do not fit V.
        TypeError: ``texts`` is one string.
    """
    if isinstance(texts, (str, bytes)):
        raise TypeError(f"texts: expected an iterable of str (read_texts reads a file), got {type(texts)}")
    vocabulary = tokenizer.get_vocab()
    V = _check_size(tokenizer, vocabulary, num_embeddings)
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
                _refuse_tokenizer(len(found), V)
            counts += found
            read += len(batch)
            bar.update(len(ids))
    if not counts.any():
        raise ValueError("texts: expected some text, got none")
    return TokenCounts(torch.from_numpy(counts), read, fingerprint(tokenizer), len(vocabulary))


def count_files(
    model: str | os.PathLike,
    sources: Iterable[str | os.PathLike],
    output: str | os.PathLike,
    *,
    errors: str = "strict",
    overwrite: bool = False,
    progress: bool | None = None,
) -> CountSummary:
    """Count the tokens of some sources of ``read_texts`` with a model's tokenizer, and save the counts.

    Args:
        model: a directory with a tokenizer, or a name on the hub.
        sources: as ``read_texts`` takes them.
        output: file to write, with ``TokenCounts.save``.
        errors: of bytes that are not UTF-8 text: ``strict`` or ``replace``.
        overwrite: replace a file that is there.
        progress: show a bar on stderr; None shows it on a terminal.

    Raises:
        ValueError: a source is not text or has none, or the tokenizer is damaged; it names what.
        FileNotFoundError: the tokenizer, a source, or the directory of ``output`` does not exist.
        FileExistsError: ``output`` exists and may not be replaced.
        OSError: ``output`` cannot be written.
    """
    from .api import load_tokenizer  # loads transformers

    sources, path = list(sources), Path(output).resolve()
    if any(path == Path(source).resolve() for source in sources):
        raise FileExistsError(f"output: {output} is the text to read; choose another name")
    check_writable(output, "output")
    if path.exists() and not overwrite:
        raise FileExistsError(f"output: {output} exists; choose another name, or pass --overwrite")
    tokenizer = load_tokenizer(model)
    if tokenizer is None:
        raise FileNotFoundError(
            f"tokenizer: expected a directory with one, or a name on the hub, found none at {model}"
        )
    texts = itertools.chain.from_iterable(read_texts(source, errors=errors) for source in sources)
    counts = count_tokens(texts, tokenizer, progress=progress)
    counts.save(path)
    return counts.summary(tokenizer)


def _batches(texts: Iterable[str], chars: int) -> Iterator[list[str]]:
    """Yield texts together until they have so many characters; those of white space are left out."""
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


def _check_size(
    tokenizer: PreTrainedTokenizerBase, vocabulary: dict[str, int], num_embeddings: int | None
) -> int:
    """Return V. Tokens added to a tokenizer may be beyond the table, as long as no text has them."""
    if num_embeddings is None:
        return max(vocabulary.values()) + 1
    _check_rows(num_embeddings)
    added = tokenizer.added_tokens_encoder
    size = max((id for token, id in vocabulary.items() if token not in added), default=-1) + 1
    if size > num_embeddings:
        _refuse_tokenizer(size, num_embeddings)
    return num_embeddings


def _check_rows(num_embeddings: int) -> None:
    if num_embeddings < 1:
        raise ValueError(f"num_embeddings: expected at least 1, got {num_embeddings}")


def _refuse_tokenizer(size: int, num_embeddings: int) -> None:
    raise ValueError(
        f"tokenizer: expected ids below the table's {num_embeddings} rows, got ids up to {size - 1}; "
        "it belongs to another model"
    )


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
        _check_rows(V)
        return _normalized(_zipf(torch.arange(V)))
    vocabulary = tokenizer.get_vocab()
    _check_size(tokenizer, vocabulary, V)
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
    frequencies = _normalized(frequencies) * (1 - len(once_per_text) / TEXT_TOKENS)
    frequencies[once_per_text] = 1 / TEXT_TOKENS
    return _normalized(frequencies)


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


def expected_frequencies(counts: TokenCounts | None, prior: Tensor, *, strength: float = STRENGTH) -> Tensor:
    """Mix counts with a prior: the relative frequencies to expect of the text to come.

    ``(counts + strength * prior) / (tokens + strength)``, the mean under a Dirichlet prior: the prior counts
    as much as ``strength`` tokens of text. Few suit text of the same kind as the counts, more text of another
    kind.

    Args:
        counts: of texts, or None for the prior alone.
        prior: (V,), not negative, of any sum, such as ``vocabulary_prior`` gives.
        strength: at least 0; with 0, tokens that no text has get 0.

    Returns:
        (V,) float64 with sum 1.

    Raises:
        ValueError: the prior or the strength is not usable, or tokens beyond V were counted.
    """
    if (
        prior.dim() != 1
        or not bool(torch.isfinite(prior).all())
        or not float(prior.sum()) > 0
        or prior.min() < 0
    ):
        raise ValueError("prior: expected (V,) finite numbers, none negative, not all 0")
    if not 0 <= strength < float("inf"):
        raise ValueError(f"strength: expected a finite number of tokens, at least 0, got {strength}")
    expected = _normalized(prior.double().cpu())
    if counts is None or counts.tokens + strength == 0:
        return expected
    return _normalized(counts.resized(len(prior)).counts + strength * expected)


def _zipf(ranks: Tensor) -> Tensor:
    return 1 / (ranks.double() + ZIPF_SHIFT)


def _normalized(weights: Tensor) -> Tensor:
    return weights / weights.sum().clamp_min(1e-300)
