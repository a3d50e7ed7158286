"""Token frequencies: counts of text mixed with a prior."""

from __future__ import annotations

import itertools
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from .counts import TokenCounts, count_tokens
from .prior import normalized, vocabulary_prior
from .reading import read_texts
from .token_classes import adapted_prior, token_classes

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Counts of text, or one number per row.
Counts = TokenCounts | Mapping[Any, int] | Tensor | np.ndarray | Sequence[float] | str | os.PathLike
Source = str | os.PathLike  # of text, as read_texts takes it

STRENGTH = 5000.0  # strength of the prior in tokens, see expected_frequencies

# Strength of the prior for the weights of rows in a compression. It is higher, as a rare token changes a
# sentence embedding more than its probability suggests. Spearman correlation of sentence similarities,
# all-MiniLM-L6-v2 at 16x and 32x: .998 and .993 on text of the kind that was counted, .987 and .930 on
# another kind; with a strength of 10,000 .999 and .995, .980 and .867
# (`python -m benchmarks quality --strength 10000`).
COMPRESSION_STRENGTH = 100_000.0


def expected_frequencies(counts: TokenCounts | None, prior: Tensor, *, strength: float = STRENGTH) -> Tensor:
    """Estimate relative token frequencies from counts and a prior.

    ``(counts + strength * prior) / (tokens + strength)``, the posterior mean under a Dirichlet prior: the
    prior weighs as much as ``strength`` tokens of text. A small strength suits text of the same kind as the
    counted one, a larger strength other text.

    Args:
        counts: counts of texts, or None for the prior alone.
        prior: (V,), non-negative, with any positive sum, such as ``vocabulary_prior`` returns.
        strength: weight of the prior in tokens, at least 0; with 0, tokens without counts get 0.

    Returns:
        (V,) float64 on the CPU with sum 1.

    Raises:
        ValueError: the prior or the strength is out of range, or tokens of V and above were counted.
    """
    if (
        prior.dim() != 1
        or not bool(torch.isfinite(prior).all())
        or not float(prior.sum()) > 0
        or prior.min() < 0
    ):
        raise ValueError("prior: expected shape (V,) of finite numbers, none negative, not all 0")
    if not 0 <= strength < float("inf"):
        raise ValueError(f"strength: expected a finite number of tokens, at least 0, got {strength}")
    expected = normalized(prior.double().cpu())
    if counts is None or counts.tokens + strength == 0:
        return expected
    return normalized(counts.resized(len(prior)).counts + strength * expected)


def token_frequencies(
    num_embeddings: int,
    counts: Counts | None,
    count_text: Source | Sequence[Source] | None,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    progress: bool | None = None,
) -> tuple[Tensor, str]:
    """Estimate token frequencies for the weights of rows in a compression, and say where they come from.

    ``frequencies_of(gathered_counts(...), num_embeddings, tokenizer)``

    Args:
        num_embeddings: V.
        counts: frequencies, a tensor, an array or a list of V numbers, which are only normalised; or counts
            of text: ``TokenCounts``, a file of them, or a mapping of ids or tokens to integers. None for no
            counts.
        count_text: sources of text to count in addition, as ``read_texts`` takes them.
        tokenizer: the tokenizer of the model, or None.
        progress: whether to show a progress bar on stderr; None shows it on a terminal.

    Returns:
        The frequencies, (V,) float64 on the CPU with sum 1, and a phrase on their origin for the report.

    Raises:
        ValueError: the counts, the text or the tokenizer belong to another model, or are not usable.
        FileNotFoundError: a file does not exist.
    """
    known = gathered_counts(num_embeddings, counts, count_text, tokenizer, progress=progress)
    return frequencies_of(known, num_embeddings, tokenizer)


def gathered_counts(
    num_embeddings: int,
    counts: Counts | None,
    count_text: Source | Sequence[Source] | None,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    progress: bool | None = None,
) -> TokenCounts | Tensor | None:
    """Return the counts of text that the arguments of ``token_frequencies`` name, in one.

    Returns:
        ``TokenCounts``; frequencies (V,) float64 that were given as numbers; or None for no counts.
    """
    if isinstance(counts, (list, tuple, np.ndarray)):
        try:
            counts = torch.as_tensor(np.asarray(counts, np.float64))
        except (TypeError, ValueError) as error:
            raise TypeError(f"counts: expected {num_embeddings} numbers, got {error}") from None
    if isinstance(counts, Tensor):
        if count_text is not None:
            raise ValueError("counts, count_text: expected frequencies or text to count, got both")
        wide = counts.detach().to("cpu", torch.float64)
        if counts.shape != (num_embeddings,) or not (
            torch.isfinite(wide).all() and wide.min() >= 0 < wide.sum()
        ):
            raise ValueError(
                f"counts: expected {num_embeddings} finite numbers, none negative and not all 0, "
                f"got shape {tuple(counts.shape)} with values from {wide.min()} to {wide.max()}"
            )
        return wide / wide.sum()
    if isinstance(counts, (str, os.PathLike)):
        counts = TokenCounts.load(counts)
    elif isinstance(counts, Mapping):
        counts = TokenCounts.from_mapping(counts, num_embeddings, tokenizer)
    elif counts is not None and not isinstance(counts, TokenCounts):
        raise TypeError(
            "counts: expected TokenCounts, a file of them, a mapping or one number per row, "
            f"got {type(counts).__name__}"
        )
    if counts is not None and tokenizer is not None:
        counts.check_tokenizer(tokenizer)
    if count_text is not None:
        if tokenizer is None:
            raise ValueError("count_text: expected a tokenizer with it (the model has none)")
        sources = [count_text] if isinstance(count_text, (str, os.PathLike)) else count_text
        texts = itertools.chain.from_iterable(map(read_texts, sources))
        counted = count_tokens(texts, tokenizer, num_embeddings=num_embeddings, progress=progress)
        counts = counted if counts is None else counts + counted
    return counts


def frequencies_of(
    known: TokenCounts | Tensor | None,
    num_embeddings: int,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    by_class: bool = False,
) -> tuple[Tensor, str]:
    """Return the frequencies (V,) that follow from gathered counts, and a phrase on their origin.

    Args:
        known: what ``gathered_counts`` returned.
        num_embeddings: V.
        tokenizer: the tokenizer of the model, or None.
        by_class: whether classes of tokens share what the prior gives to rare ones by the counted text, see
            ``adapted_prior``; it needs the tokenizer.
    """
    if isinstance(known, Tensor):
        return known, "as given"
    prior = vocabulary_prior(tokenizer, num_embeddings)
    order = "the order of the vocabulary" if tokenizer is not None else "the order of the ids (no tokenizer)"
    if known is not None:
        if by_class and tokenizer is not None:
            classes = token_classes(tokenizer, num_embeddings)
            prior = adapted_prior(known.resized(num_embeddings).counts, prior, classes)
            order += " within classes of rare ones"
        read = f" of {known.texts:,} texts" if known.texts else ""
        order = f"{known.tokens:,} tokens{read}, and {order}"
    return expected_frequencies(known, prior, strength=COMPRESSION_STRENGTH), order


def read_tokens(
    known: TokenCounts | Tensor | None, num_embeddings: int, tokenizer: PreTrainedTokenizerBase | None
) -> Tensor | None:
    """Return which tokens occur in gathered counts, and the tokenizer's special ones: (V,) bool, or None."""
    if known is None:
        return None
    read = (known if isinstance(known, Tensor) else known.resized(num_embeddings).counts) > 0
    special = torch.tensor([] if tokenizer is None else tokenizer.all_special_ids, dtype=torch.int64)
    return read.index_fill(0, special[special < num_embeddings], True)
