"""What a study measures of a model, and of every table that a method makes for it."""

from __future__ import annotations

import copy
import functools
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..api import model_bytes, save
from ..evaluate import compare_tables, embed_sentences, sentence_fidelity
from ..evaluate.perplexity import PerplexityReport, TableSwap, evaluate_perplexity, kind_of
from ..evaluate.sentences import pooling_of
from ..experiments.timing import paired_ratio, paired_rounds, quantiles, sampler, side_stream
from ..layer import layer_of
from ..methods import METHODS
from ..model_table import UnsupportedModelError, find_table
from ..report import tier_uses
from ..text import read_texts
from ..transformers import check_installable, install

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ..recipe import Recipe

NEIGHBORS = 6  # of a word, listed
LOOKUP_SIZES = (1, 128, 4096)
LOOKUP_BATCHES = 8  # of distinct ids, in turn, so that no timing is of rows that stay in cache
LOOKUP_ROUNDS = 31
# Where the default words stand among all words, the most frequent first.
TYPICAL = (0.001, 0.01, 0.1, 0.3, 0.6, 0.95)

_WORD = re.compile(r"[Ġ▁]?[^\W\d_]{3,}")  # BPE and SentencePiece mark the start of a word


@dataclass
class Subject:
    """The dense model of a study, and what is read of it.

    Attributes:
        source: its directory or hub name.
        frequencies: (V,) float64, how often each token is expected to be read.
        counted: in words, where they come from.
        words: ids whose neighbours are listed.
        sentences: to embed, if any.
        dataset: text to measure perplexity on, as ``embkern.text.read_texts`` takes it, if any.
        protocol: settings of ``evaluate_perplexity``.
        models: directory to save compressed models in, if any.
        seed: of everything drawn.
    """

    source: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None
    frequencies: Tensor
    counted: str
    words: list[int]
    sentences: list[str] | None = None
    dataset: str | None = None
    protocol: dict[str, Any] = field(default_factory=dict)
    models: Path | None = None
    seed: int = 0

    @functools.cached_property
    def weight(self) -> Tensor:
        """The dense table, (V, H)."""
        return find_table(self.model).weight.detach()

    @functools.cached_property
    def nearest(self) -> list[tuple[list[int], list[float]]]:
        """Ids and cosines of the dense rows nearest to each word."""
        return _nearest(self.weight, self.words)

    @functools.cached_property
    def bytes(self) -> int:
        """Of the dense model."""
        return model_bytes(self.model)

    @functools.cached_property
    def embedded(self) -> Tensor:
        """The sentences, by the dense model."""
        return self.embed()

    def embed(self) -> Tensor:
        """Embed the sentences with the model as it is now."""
        assert self.sentences is not None
        return embed_sentences(self.model, self.tokenizer, self.sentences, pooling=pooling_of(self.source))

    def texts(self) -> Iterator[str]:
        """Read the data set."""
        assert self.dataset is not None
        return read_texts(self.dataset)

    def token(self, index: int) -> str:
        """Name a token; by its id where the tokenizer has none."""
        return self.tokens([index])[0]

    def tokens(self, ids: list[int]) -> list[str]:
        """Name tokens."""
        names: Sequence[str | None] = (
            [None] * len(ids) if self.tokenizer is None else self.tokenizer.convert_ids_to_tokens(ids)
        )
        return [name if name is not None else f"#{i}" for i, name in zip(ids, names, strict=True)]


class Candidate:
    """What a method made of the table.

    Attributes:
        name: of the method and the ratio, for people.
        table: Factors, a PackedTable, or what a neighbour makes.
        seconds: the method took.
    """

    def __init__(self, subject: Subject, recipe: Recipe, name: str) -> None:
        self.subject, self.recipe, self.name = subject, recipe, name
        started = time.perf_counter()
        quiet = {"progress": False} if recipe.method == "autoencoder" else {}
        self.table: Any = recipe.factorize(subject.weight, subject.frequencies, **quiet)
        self.seconds = time.perf_counter() - started

    @property
    def installable(self) -> bool:
        """Whether the table is of a kind that models hold."""
        return METHODS[self.recipe.method].installable

    @property
    def fits(self) -> bool:
        """Whether the model can hold the table, a tied head's place included."""
        try:
            check_installable(find_table(self.subject.model), self.recipe)
        except UnsupportedModelError:
            return False
        return True

    @functools.cached_property
    def live(self) -> Any:
        """The table on the device and in the dtype in which a model computes with it."""
        weight = self.subject.weight
        return self.table.to(device=weight.device, dtype=weight.dtype) if self.installable else self.table

    @functools.cached_property
    def rows(self) -> Tensor:
        """The table decoded, (V, H)."""
        return self.live.to_dense()


def describe_model(subject: Subject) -> dict[str, Any]:
    """What the dense model is."""
    table = find_table(subject.model)
    V, H = subject.weight.shape
    return {
        "architecture": type(subject.model).__name__,
        "num_embeddings": V,
        "embedding_dim": H,
        "dtype": str(subject.weight.dtype).removeprefix("torch."),
        "table_bytes": subject.weight.nbytes,
        "model_bytes": subject.bytes,
        "table_share": subject.weight.nbytes / subject.bytes,
        "tied_heads": table.heads,
        "frequencies": subject.counted,
    }


def measure_table(subject: Subject, candidate: Candidate) -> dict[str, Any]:
    """Compare the table row by row, and count its bytes."""
    comparison = compare_tables(
        subject.weight, candidate.rows, counts=subject.frequencies, tokens=subject.tokens, seed=subject.seed
    )
    nbytes, before = candidate.table.nbytes, subject.weight.nbytes
    return {
        "rank": getattr(candidate.table, "rank", None),
        "tiers": [tier.model_dump() for tier in tier_uses(candidate.table)],
        "facts": candidate.table.facts,
        "table_bytes": before,
        "compressed_bytes": nbytes,
        "ratio": before / nbytes,
        "model_bytes": subject.bytes,
        "compressed_model_bytes": subject.bytes - before + nbytes if candidate.fits else None,
        "compress_seconds": round(candidate.seconds, 3),
        **comparison.model_dump(),
    }


def measure_neighbors(subject: Subject, candidate: Candidate | None) -> dict[str, Any]:
    """List the nearest rows, by cosine, of the chosen words; without a candidate, in the dense table."""
    found = subject.nearest if candidate is None else _nearest(candidate.rows, subject.words)
    words = []
    for word, (before, _), (ids, cosines) in zip(subject.words, subject.nearest, found, strict=True):
        named = zip(ids, subject.tokens(ids), cosines, strict=True)
        words.append(
            {
                "id": word,
                "token": subject.token(word),
                "kept": len({*ids} & {*before}),
                "neighbors": [
                    {"id": i, "token": name, "cosine": cosine, "kept": i in before}
                    for i, name, cosine in named
                ],
            }
        )
    return {"words": words}


def _nearest(table: Tensor, ids: list[int]) -> list[tuple[list[int], list[float]]]:
    normal = F.normalize(table.float(), dim=1)
    similarity = normal[ids] @ normal.t()
    similarity[range(len(ids)), ids] = -2.0  # a row is no neighbour of its own
    best = similarity.topk(min(NEIGHBORS, len(table) - 1), dim=1)
    cosines = [[round(each, 6) for each in row] for row in best.values.tolist()]
    return list(zip(best.indices.tolist(), cosines, strict=True))


def measure_sentences(subject: Subject, candidate: Candidate) -> dict[str, Any]:
    """Compare sentence embeddings with those of the dense model."""
    before = subject.embedded
    with TableSwap(subject.model, candidate.table).inputs():
        after = subject.embed()
    return sentence_fidelity(before, after).model_dump()


def no_perplexity(model: PreTrainedModel) -> str | None:
    """Say why a model has no perplexity; None of a language model."""
    try:
        kind_of(model)
    except ValueError as error:
        return str(error)
    return None


def measure_dense_perplexity(subject: Subject) -> dict[str, Any]:
    """Measure the perplexity of the dense model."""
    report = _perplexity(subject)
    assert report.model is not None
    return {"settings": report.settings.model_dump(), **report.model.model_dump()}


def measure_perplexity(subject: Subject, candidate: Candidate) -> dict[str, Any]:
    """Measure it where the table is looked up compressed, and where a tied head uses it as well."""
    report = _perplexity(subject, {candidate.name: candidate.table}, own=False)
    return {"settings": report.settings.model_dump(), **report.tables[0].model_dump()}


def _perplexity(subject: Subject, tables: Any = None, own: bool = True) -> PerplexityReport:
    assert subject.tokenizer is not None
    return evaluate_perplexity(
        subject.model, subject.tokenizer, subject.texts(), tables, own=own, progress=False, **subject.protocol
    )


def measure_lookup(subject: Subject, candidate: Candidate) -> dict[str, Any]:
    """Time looking up ids drawn by their frequencies, in the dense table and in the compressed one.

    The two are timed in paired rounds: medians of microseconds per call, and the median of the ratios within
    a round.
    """
    layer = layer_of(candidate.live).from_table(candidate.live)
    generator = torch.Generator().manual_seed(subject.seed)
    device = subject.weight.device
    sizes = []
    with torch.inference_mode(), side_stream(device.type):
        for size in LOOKUP_SIZES:
            drawn = torch.multinomial(
                subject.frequencies, LOOKUP_BATCHES * size, replacement=True, generator=generator
            )
            batches = drawn.to(device).view(LOOKUP_BATCHES, size)
            calls: dict[str, list[Callable[[], Any]]] = {
                "dense": [functools.partial(F.embedding, ids, subject.weight) for ids in batches],
                "compressed": [functools.partial(layer, ids) for ids in batches],
            }
            samples = {name: sampler(device.type, each)[0] for name, each in calls.items()}
            times = paired_rounds(samples, repeats=(LOOKUP_ROUNDS, LOOKUP_ROUNDS))
            sizes.append(
                {
                    "ids": size,
                    "dense_us": quantiles(times["dense"])["median"],
                    "compressed_us": quantiles(times["compressed"])["median"],
                    "times_as_fast": paired_ratio(times, "dense", "compressed"),
                }
            )
    return {"rounds": LOOKUP_ROUNDS, "sizes": sizes}


def save_model(subject: Subject, candidate: Candidate) -> dict[str, Any]:
    """Save the model with the table in place of the dense one, in a tied head as well."""
    assert subject.models is not None
    model = copy.deepcopy(subject.model)
    install(model, find_table(model), candidate.table, candidate.recipe)
    directory = subject.models / re.sub(r"[^\w.=-]", "-", candidate.name)
    save(model, directory, source=subject.source, tokenizer=subject.tokenizer)
    files = {each.name: each.stat().st_size for each in sorted(directory.iterdir()) if each.is_file()}
    return {"directory": f"{subject.models.name}/{directory.name}", "files": files}


def typical_words(frequencies: Tensor, tokenizer: PreTrainedTokenizerBase | None) -> list[int]:
    """Return ids of some words: frequent, of middling frequency, and rare."""
    order = frequencies.argsort(descending=True, stable=True).tolist()
    names = [None] * len(order) if tokenizer is None else tokenizer.convert_ids_to_tokens(order)
    words = [i for i, name in zip(order, names, strict=True) if name and _WORD.fullmatch(name)]
    marked = {i for i, name in zip(order, names, strict=True) if name and name[0] in "Ġ▁"}
    words = [i for i in words if i in marked] or words or order
    return list(dict.fromkeys(words[int(place * len(words))] for place in TYPICAL))


def find_words(words: Iterable[str], tokenizer: PreTrainedTokenizerBase | None) -> list[int]:
    """Return the ids of words that are one token each.

    Raises:
        ValueError: there is no tokenizer, or a word is no token of it.
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
