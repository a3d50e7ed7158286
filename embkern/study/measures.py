"""What a study measures: figures of the dense model, and of every compressed table."""

from __future__ import annotations

import copy
import functools
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from ..evaluate import evaluate_perplexity
from ..evaluate.batches import Batch
from ..evaluate.language_model import SplitModel
from ..evaluate.perplexity import PerplexityReport
from ..evaluate.windows import Window
from ..experiments.dependencies import code_hash
from ..experiments.timing import paired_ratio, paired_rounds, quantiles, sampler, side_stream
from ..fidelity import compare_tables, embed_sentences, sentence_fidelity
from ..models.checkpoint import model_bytes
from ..models.find_table import find_table
from ..models.inference import language_kind
from ..models.quantizer import install
from ..models.saving import save
from ..models.swap import check_installable
from ..models.table_parts import tier_uses
from ..models.table_swap import TableSwap
from ..nn import layer_of
from .subject import Candidate, Subject, nearest_rows

LOOKUP_SIZES = (1, 128, 4096)
HEAD_SIZES = (1, 32)
LOOKUP_BATCHES = 8  # of distinct ids, in turn, so that no timing is of rows that stay in cache
LOOKUP_ROUNDS = 31


def describe_model(subject: Subject) -> dict[str, Any]:
    """Describe the dense model."""
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
        "kind": language_kind(subject.model),
        "frequencies": subject.counted,
    }


def measure_table(subject: Subject, candidate: Candidate) -> dict[str, Any]:
    """Compare the table with the dense one row by row, and count the bytes of both."""
    comparison = compare_tables(
        subject.weight, candidate.rows, counts=subject.frequencies, tokens=subject.names, seed=subject.seed
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
        "model_saved": (before - nbytes) / subject.bytes if candidate.fits else None,
        "compress_seconds": round(candidate.seconds, 3),
        **comparison.model_dump(),
    }


def measure_neighbors(subject: Subject, candidate: Candidate | None) -> dict[str, Any]:
    """List the rows nearest to the chosen words by cosine, in the compressed table or in the dense one."""
    found = subject.nearest if candidate is None else nearest_rows(candidate.rows, subject.words)
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


def measure_sentences(subject: Subject, candidate: Candidate) -> dict[str, Any]:
    """Compare sentence embeddings before and after compression."""
    before = subject.embedded
    with TableSwap(subject.model, candidate.table).inputs():
        after = subject.embed()
    return sentence_fidelity(before, after).model_dump()


def measure_dense_perplexity(subject: Subject) -> dict[str, Any]:
    """Measure the perplexity of the dense model."""
    report = _perplexity(subject)
    assert report.model is not None
    return {"settings": report.settings.model_dump(), **report.model.model_dump()}


def measure_perplexity(subject: Subject, candidate: Candidate) -> dict[str, Any]:
    """Measure perplexity with the table in the input only, and in a tied head as well."""
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
            dense = [functools.partial(F.embedding, ids, subject.weight) for ids in batches]
            compressed = [functools.partial(layer, ids) for ids in batches]
            sizes.append({"ids": size, **_timed(device.type, dense, compressed)})
    return {"rounds": LOOKUP_ROUNDS, "sizes": sizes}


def measure_head(subject: Subject, candidate: Candidate) -> dict[str, Any]:
    """Time the logits of a tied head for normal hidden states, over the dense table and the compressed one.

    Rounds and figures are those of ``measure_lookup``.
    """
    check_installable(find_table(subject.model), candidate.recipe)
    head = layer_of(candidate.live).from_table(candidate.live).head()
    weight, generator = subject.weight, torch.Generator().manual_seed(subject.seed)
    sizes = []
    with torch.inference_mode(), side_stream(weight.device.type):
        for size in HEAD_SIZES:
            hidden = torch.randn(size, weight.shape[1], generator=generator).to(weight)
            dense, compressed = functools.partial(F.linear, hidden, weight), functools.partial(head, hidden)
            sizes.append({"states": size, **_timed(weight.device.type, [dense], [compressed])})
    return {"rounds": LOOKUP_ROUNDS, "sizes": sizes}


def _timed(
    device_type: str, dense: Sequence[Callable[[], Any]], compressed: Sequence[Callable[[], Any]]
) -> dict[str, float]:
    """Return median microseconds of calls on both tables, and the median of their ratios within a round."""
    calls = {"dense": list(dense), "compressed": list(compressed)}
    samples = {name: sampler(device_type, each)[0] for name, each in calls.items()}
    times = paired_rounds(samples, repeats=(LOOKUP_ROUNDS, LOOKUP_ROUNDS))
    return {
        "dense_us": quantiles(times["dense"])["median"],
        "compressed_us": quantiles(times["compressed"])["median"],
        "times_as_fast": paired_ratio(times, "dense", "compressed"),
    }


def save_model(subject: Subject, candidate: Candidate) -> dict[str, Any]:
    """Save the model with the compressed table, which a tied head shares."""
    assert subject.models is not None
    model = copy.deepcopy(subject.model)
    install(model, find_table(model), candidate.table, candidate.recipe)
    directory = subject.models / re.sub(r"[^\w.=-]", "-", candidate.name)
    save(model, directory, source=subject.source, tokenizer=subject.tokenizer)
    files = {each.name: each.stat().st_size for each in sorted(directory.iterdir()) if each.is_file()}
    return {"directory": f"{subject.models.name}/{directory.name}", "files": files}


class Measure(NamedTuple):
    """A kind of row, and how it is measured.

    Attributes:
        of_dense: measures the dense model; None if there is no such row.
        of_candidate: measures a compressed table; None if there is no such row.
        parts: functions and classes that the figures follow from, besides the method and those of this module
            and of ``subject``.
    """

    of_dense: Callable[[Subject], dict[str, Any]] | None = None
    of_candidate: Callable[[Subject, Candidate], dict[str, Any]] | None = None
    parts: tuple[Any, ...] = ()

    def code(self) -> str:
        """Return a hash of the modules that measure this, without what they import."""
        modules = {__name__, Subject.__module__, *(part.__module__ for part in self.parts)}
        return code_hash(*sorted(modules), follow=False)


MEASURES = {
    "model": Measure(of_dense=describe_model, parts=(model_bytes,)),
    "table": Measure(of_candidate=measure_table, parts=(compare_tables, model_bytes)),
    "neighbors": Measure(functools.partial(measure_neighbors, candidate=None), measure_neighbors),
    "lookup": Measure(of_candidate=measure_lookup, parts=(layer_of, paired_rounds)),
    "head": Measure(of_candidate=measure_head, parts=(layer_of, paired_rounds, check_installable)),
    "sentences": Measure(of_candidate=measure_sentences, parts=(embed_sentences, TableSwap, layer_of)),
    "perplexity": Measure(
        measure_dense_perplexity,
        measure_perplexity,
        (evaluate_perplexity, SplitModel, Batch, Window, TableSwap, layer_of),
    ),
    "saved": Measure(of_candidate=save_model, parts=(install, save)),
}
