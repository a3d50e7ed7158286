"""Describe a model's table, and compare a compressed model with the dense one."""

from __future__ import annotations

import functools
import os
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from .fidelity import compare_tables, embed_sentences, read_sentences, sentence_fidelity
from .fidelity.sentences import pooling_of
from .io.atomic import check_writable
from .models.body_config import is_compressed
from .models.checkpoint import model_bytes, stored_table
from .models.find_table import find_table, input_embeddings, other_tables
from .models.loading import load_model, load_tokenizer
from .models.ngrammer import disable_ngrammer
from .models.ngrammer_hooks import ngrammer_of
from .models.rate_plot import plot_bits
from .models.report import Comparison, Report, read_report
from .models.table_parts import TierUse, rows_kept, tensor_bytes, tier_uses
from .nn.base import CompressedEmbedding, CompressedHead
from .tables import Table
from .tables.packed import PackedTable
from .text.token_names import token_names


class RankSaving(BaseModel):
    """The size of a table after compression to a rank."""

    model_config = ConfigDict(protected_namespaces=())
    rank: int
    compressed_bytes: int = Field(description="bytes of codes and basis")
    ratio: float = Field(description="bytes of the dense table / compressed_bytes")
    model_share: float = Field(description="share of the whole model's bytes that is saved")


class Summary(BaseModel):
    """A model's embedding table, dense or compressed."""

    model_config = ConfigDict(protected_namespaces=())
    architecture: str = Field(description="class of the model")
    num_embeddings: int = Field(description="V")
    embedding_dim: int = Field(description="H")
    dtype: str = Field(description="dtype of the floating-point tensors, as stored")
    compressed: bool
    rank: int | None = Field(None, description="rank of factors")
    tiers: list[TierUse] = Field(default_factory=list, description="tiers of a packed table")
    kept: int | None = Field(None, description="number of rows that are stored, if some are not")
    kind: str | None = Field(None, description="kind of a compressed table")
    parts: dict[str, int] = Field(default_factory=dict, description="bytes of each tensor of other tables")
    table_bytes: int = Field(description="bytes of the table, as stored")
    model_bytes: int = Field(description="bytes of the model, as stored")
    modules: list[str] = Field(description="embedding modules that share the table")
    heads: list[str] = Field(description="output heads that are tied to it")
    scales: dict[str, float] = Field(description="constant factor of each embedding's output")
    other_tables: dict[str, int] = Field(description="bytes of other large embedding tables")
    ngrammer_bytes: int | None = Field(None, description="bytes of the N-Grammer at the input, if any")
    ranks: list[RankSaving] = Field(default_factory=list, description="sizes at several ranks, if dense")
    report: Report | None = Field(None, description="that of embkern.compress, if the directory has one")

    def facts(self) -> dict[str, str]:
        """Return the rows of the printed table by name."""
        stored = f"rank {self.rank}" if self.rank else f"{len(self.tiers)} tiers" if self.tiers else self.kind
        scaled = {name: scale for name, scale in self.scales.items() if scale != 1.0}
        facts = {
            "architecture": self.architecture,
            "table": f"{self.num_embeddings} x {self.embedding_dim}, {self.dtype}, {stored or 'dense'}",
            "bytes": f"{self.table_bytes:,} of the model's {self.model_bytes:,} "
            f"({self.table_bytes / self.model_bytes:.1%})",
            **({} if self.kept is None else {"rows kept": self._kept()}),
            **{f"rows at {tier.name}": f"{tier.rows:,} ({tier.bytes:,} bytes)" for tier in self.tiers},
            **{f"bytes of {name}": f"{size:,}" for name, size in self.parts.items()},
            "modules": ", ".join(self.modules),
            "tied heads": ", ".join(self.heads) or "none",
            "scale": ", ".join(f"{name}: {scale:g}" for name, scale in scaled.items()) or "1",
        }
        if self.other_tables:
            facts["other tables, not compressed"] = ", ".join(
                f"{n} ({b:,} B)" for n, b in self.other_tables.items()
            )
        if self.ngrammer_bytes is not None:
            facts["N-Grammer"] = f"{self.ngrammer_bytes:,} bytes beside the table"
        return facts

    def _kept(self) -> str:
        unseen = self.num_embeddings - (self.kept or 0)
        return f"{self.kept:,} of {self.num_embeddings:,}; {unseen:,} unseen ones take no codes"


def inspect(name: str | os.PathLike, *, plot: str | os.PathLike | None = None) -> Summary:
    """Load a model and describe its embedding table.

    Args:
        name: a directory, or a name on the hub.
        plot: file to write a picture of the bits per token of a packed table to; its ending says the format.

    Raises:
        FileNotFoundError: there is no such model.
        ValueError: the model cannot be loaded, or its table cannot be compressed, or not drawn.
        ImportError: ``plot`` needs matplotlib.
    """
    if plot is not None:
        check_writable(plot, "plot")
    model = load_model(name)
    embedding = input_embeddings(model)
    layer = ngrammer_of(model)
    common: dict[str, Any] = {
        "ngrammer_bytes": None if layer is None else sum(t.nbytes for t in layer.state_dict().values()),
        "architecture": type(model).__name__,
        "model_bytes": model_bytes(model),
        "other_tables": other_tables(model),
        "report": read_report(name),
    }
    if isinstance(embedding, CompressedEmbedding):
        stored = stored_table(model)
        if plot is not None:
            _plot(stored, plot)
        state = model.config.quantization_config.table
        own = [(n, m) for n, m in model.named_modules() if not getattr(m, "table_name", "")]
        return Summary(
            **common,
            num_embeddings=embedding.num_embeddings,
            embedding_dim=embedding.embedding_dim,
            dtype=state.dtype,
            compressed=True,
            rank=getattr(stored, "rank", None),
            tiers=tier_uses(stored),
            kept=rows_kept(stored),
            kind=state.kind,
            parts=tensor_bytes(stored),
            table_bytes=stored.nbytes,
            modules=[n for n, m in own if isinstance(m, CompressedEmbedding)],
            heads=[n for n, m in own if isinstance(m, CompressedHead)],
            scales=dict(state.scales),
        )
    if plot is not None:
        raise ValueError(f"plot: expected a model with a packed table, got a dense one: {name}")
    if layer is not None:  # whose output is not that of the table
        disable_ngrammer(model)
    table = find_table(model)
    num_embeddings, embedding_dim = table.weight.shape
    element = table.weight.element_size()
    ranks = []
    for divisor in (2, 3, 4, 6, 8, 12, 16, 24):
        if rank := embedding_dim // divisor:
            size = (num_embeddings * rank + rank * embedding_dim) * element
            ranks.append(
                RankSaving(
                    rank=rank,
                    compressed_bytes=size,
                    ratio=table.weight.nbytes / size,
                    model_share=(table.weight.nbytes - size) / common["model_bytes"],
                )
            )
    return Summary(
        **common,
        num_embeddings=num_embeddings,
        embedding_dim=embedding_dim,
        dtype=str(table.weight.dtype).removeprefix("torch."),
        compressed=False,
        table_bytes=table.weight.nbytes,
        modules=table.embeddings,
        heads=table.heads,
        scales=table.scales,
        ranks=ranks,
    )


def _plot(table: Table, path: str | os.PathLike) -> None:
    if not isinstance(table, PackedTable):
        raise ValueError("plot: expected a packed table, got another kind, whose rows all have the same bits")
    plot_bits(table, path)


def evaluate(
    directory: str | os.PathLike, against: str | os.PathLike, *, text: str | os.PathLike | None = None
) -> Comparison:
    """Compare a compressed model with the dense one.

    Args:
        directory: the compressed model.
        against: the dense model, a directory or a name on the hub.
        text: a text file, one sentence per line, whose sentence embeddings are compared.

    Raises:
        FileNotFoundError: a model or the text does not exist.
        ValueError: the first model is not compressed, the second is, or their tables differ in shape.
    """
    sentences = None if text is None else read_sentences(text)
    compressed, dense = load_model(directory), load_model(against)
    embedding, table = input_embeddings(compressed), find_table(dense).weight.detach()
    if not isinstance(embedding, CompressedEmbedding):
        found = "a dense input table" if is_compressed(compressed) else "a dense one"
        raise ValueError(f"model: expected one compressed by embkern, got {found}: {directory}")
    if tuple(table.shape) != (embedding.num_embeddings, embedding.embedding_dim):
        raise ValueError(
            f"against: expected a table of {embedding.num_embeddings} x {embedding.embedding_dim} "
            f"as in {directory}, got {' x '.join(map(str, table.shape))} in {against}"
        )
    tokenizer = load_tokenizer(against) or load_tokenizer(directory)
    tokens = tokenizer and functools.partial(token_names, tokenizer)
    nbytes = stored_table(compressed).nbytes
    result = Comparison(
        table_bytes=table.nbytes,
        compressed_bytes=nbytes,
        ratio=table.nbytes / nbytes,
        model_bytes_before=model_bytes(dense),
        model_bytes_after=model_bytes(compressed),
        table=compare_tables(table, embedding.table, tokens=tokens),
    )
    if sentences is not None:
        if tokenizer is None:
            raise ValueError(f"text: expected a tokenizer beside {against} or {directory}, found none")
        pooling = pooling_of(against)
        embeddings = [
            embed_sentences(each, tokenizer, sentences, pooling=pooling) for each in (dense, compressed)
        ]
        result.sentences = sentence_fidelity(*embeddings)
    return result
