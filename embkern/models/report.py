"""The report of a compression: as data, as a table and as a model card."""

from __future__ import annotations

import datetime
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pydantic import AliasChoices, BaseModel, ConfigDict, Field, PrivateAttr

from ..fidelity import HeldOutDivergence, SentenceFidelity, TableComparison, compare_tables
from ..io.checked_json import read_checked_json
from ..methods.metric_allocation import predicted_divergence
from ..recipe import Recipe
from ..tables import Table
from ..text.token_names import TokenName
from .plan import Knowledge, TablePlan
from .swap import head_kind
from .table_parts import TierUse, stored_bytes, tensor_bytes, tier_uses

if TYPE_CHECKING:
    from transformers import PreTrainedModel

REPORT_NAME = "embkern_report.json"


class Size(NamedTuple):
    """Bytes of something before and after the compression."""

    name: str
    before: int
    after: int

    @property
    def change(self) -> str:
        """What became of it: ``41.2% smaller`` of the whole, or the ratio from twice on."""
        if self.after and self.before >= 2 * self.after:
            return f"{self.before / self.after:.2f}x smaller"
        share = 1 - self.after / self.before
        return f"{abs(share):.1%} {'smaller' if share >= 0 else 'larger'}"

    def __str__(self) -> str:
        """Return both sizes and the change."""
        return f"{self.before:,} -> {self.after:,} ({self.change})"


class Comparison(BaseModel):
    """A compressed model compared with the dense one. Bytes are those of tensors, as stored."""

    model_config = ConfigDict(protected_namespaces=())

    table_bytes: int = Field(description="bytes of the dense table")
    compressed_bytes: int = Field(
        description="bytes of everything that replaces it",
        validation_alias=AliasChoices("compressed_bytes", "factors_bytes"),  # the latter in older reports
    )
    ratio: float = Field(description="table_bytes / compressed_bytes")
    model_bytes_before: int = Field(description="bytes of the dense model")
    model_bytes_after: int = Field(description="bytes of the compressed model")
    table: TableComparison = Field(description="comparison of the tables")
    sentences: SentenceFidelity | None = Field(default=None, description="comparison of sentence embeddings")

    def sizes(self) -> list[Size]:
        """Return the sizes of the model and of its table."""
        return [self._model_size(), Size("table", self.table_bytes, self.compressed_bytes)]

    def _model_size(self) -> Size:
        return Size("model", self.model_bytes_before, self.model_bytes_after)

    def rows(self) -> dict[str, str]:
        """Return the rows of the model card by name: sizes, tiers and figures."""
        sizes = {f"{size.name}, bytes": str(size) for size in self.sizes()}
        return sizes | self.tier_rows() | self.figures()

    def tier_rows(self) -> dict[str, str]:
        """Return the rows and bytes of each tier by name; none where it is not known."""
        return {}

    def figures(self) -> dict[str, str]:
        """Return everything but the sizes, by name."""
        weighted = self.table.weighted_direction_error
        rows = {
            "direction error (1 - cos), mean": f"{self.table.direction_error:.4f}",
            **({} if weighted is None else {"direction error, by frequency": f"{weighted:.5f}"}),
            "direction error, 99th percentile": f"{self.table.direction_error_p99:.4f}",
            "RMSE": f"{self.table.rmse:.5f}",
            "nearest neighbours kept": f"{self.table.neighbor_overlap:.1%}",
        }
        if self.sentences:
            rows["sentences compared"] = str(self.sentences.sentences)
            rows["sentence embeddings, mean cos"] = f"{self.sentences.mean_cosine:.4f}"
            if self.sentences.spearman is not None:
                rows["sentence similarities, Spearman"] = f"{self.sentences.spearman:.4f}"
        return rows


class TableReport(BaseModel):
    """One compressed table of a model."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())

    name: str = Field(description="the table's first module")
    num_embeddings: int = Field(description="V")
    embedding_dim: int = Field(description="H")
    segments: int = Field(1, description="parts of a row that are stored as rows, one per layer")
    rank: int | None = Field(None, description="rank of factors")
    tiers: list[TierUse] = Field(default_factory=list, description="tiers of a packed table")
    parts: dict[str, int] = Field(default_factory=dict, description="bytes of each tensor of other tables")
    dtype: str = Field(description="dtype of the floating-point tensors, as stored")
    counts: str | None = Field(None, description="origin of the token frequencies")
    calibration: str | None = Field(None, description="what the table was calibrated on")
    predicted_kl: float | None = Field(None, description="KL divergence per token that it predicts, in nats")
    facts: dict[str, Any] = Field(default_factory=dict, description="what the method reports")
    head: str | None = Field(description="head over the table: factorized (compressed), dense, or null")
    table_bytes: int = Field(description="bytes of the dense table")
    compressed_bytes: int = Field(description="bytes of everything that replaces it")
    ratio: float = Field(description="table_bytes / compressed_bytes")
    table: TableComparison = Field(description="comparison of the tables")
    seconds: float = Field(description="time to compress the table")

    @classmethod
    def of(
        cls,
        plan: TablePlan,
        compressed: Table,
        known: Knowledge,
        tokens: Callable[[list[int]], Sequence[TokenName]] | None = None,
        **described: Any,
    ) -> TableReport:
        """Compare the rows of a table with the compressed ones.

        Args:
            plan: the plan of the table, which is still dense.
            compressed: its compressed rows.
            known: what was known of the rows.
            tokens: maps ids of rows to names for the report.
            described: the fields ``counts``, ``calibration`` and ``seconds``.
        """
        table, rows, predicted = plan.table, plan.table.rows, None
        comparison = compare_tables(
            rows,
            compressed.to(rows.dtype),
            counts=known.frequencies,
            tokens=tokens and (lambda ids: tokens([each // table.segments for each in ids])),
        )
        if known.calibration is not None and known.frequencies is not None:
            tied = plan.recipe.compresses_head(table.tied)
            predicted = predicted_divergence(
                rows, compressed, known.calibration, known.frequencies, tied=tied
            )
        return cls(
            name=table.root,
            num_embeddings=table.weight.shape[0],
            embedding_dim=table.weight.shape[1],
            segments=table.segments,
            rank=getattr(compressed, "rank", None),
            tiers=tier_uses(compressed),
            parts=tensor_bytes(compressed),
            dtype=str(compressed.dtype).removeprefix("torch."),
            predicted_kl=predicted,
            facts=compressed.facts,
            head=head_kind(table, plan.recipe),
            table_bytes=rows.nbytes,
            compressed_bytes=stored_bytes(compressed),
            ratio=rows.nbytes / stored_bytes(compressed),
            table=comparison,
            **described,
        )

    @property
    def size(self) -> Size:
        """The bytes of the table before and after."""
        return Size(self.name, self.table_bytes, self.compressed_bytes)

    def figures(self) -> dict[str, str]:
        """Return rows of the printed table by name."""
        shape = f"{self.num_embeddings:,} x {self.embedding_dim:,}"
        return {
            self.name: f"{shape}, direction error {self.table.direction_error:.4f}",
            **({} if self.calibration is None else {f"{self.name}, calibration": self.calibration}),
        }


class Report(Comparison):
    """The result of ``embkern.compress``: the recipe, the size and the fidelity of the compressed model.

    Of several tables the bytes, the time and the predicted divergence are sums, and the rest describes the
    first one.
    """

    model_config = ConfigDict(extra="forbid", protected_namespaces=())

    source: str = Field(description="the dense model: its name on the hub, or the name of its directory")
    architecture: str = Field(description="class of the model")
    recipe: Recipe = Field(description="the method and its options")
    num_embeddings: int = Field(description="V")
    embedding_dim: int = Field(description="H")
    rank: int | None = Field(None, description="rank of factors")
    tiers: list[TierUse] = Field(default_factory=list, description="tiers of a packed table")
    parts: dict[str, int] = Field(default_factory=dict, description="bytes of each tensor of other tables")
    dtype: str = Field(description="dtype of the floating-point tensors, as stored")
    counts: str | None = Field(None, description="origin of the token frequencies")
    calibration: str | None = Field(
        None, description="what the model was calibrated on; null with methods that take no calibration"
    )
    predicted_kl: float | None = Field(
        None, description="KL divergence per token, in nats, that the calibration predicts to second order"
    )
    divergence: HeldOutDivergence | None = Field(
        None,
        description="of the predictions from those of the dense model, on text or samples that the "
        "calibration did not see",
    )
    facts: dict[str, Any] = Field(
        default_factory=dict, description="what the method reports about its result"
    )
    head: str | None = Field(description="output head: factorized (tied), dense, or null for none")
    tables: list[TableReport] = Field(
        default_factory=list, description="each table that was named; empty if only the input was compressed"
    )
    other_tables: dict[str, int] = Field(
        default_factory=dict, description="bytes of other large embedding tables, which are left alone"
    )
    seconds: float = Field(description="time to compress the table, without loading, comparing and saving")
    created: str = Field(
        default_factory=lambda: datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        description="date and time in UTC, ISO 8601",
    )
    versions: dict[str, str] = Field(description="versions of embkern, torch and transformers")

    _model: Any = PrivateAttr(None)

    @classmethod
    def of_tables(cls, tables: list[TableReport], **fields: Any) -> Report:
        """Return the report of a model whose tables were compressed; ``fields`` are those of the model."""
        first = {
            name: getattr(tables[0], name) for name in TableReport.model_fields if name in cls.model_fields
        }
        predicted = [each.predicted_kl for each in tables if each.predicted_kl is not None]
        before, after = (
            sum(getattr(t, name) for t in tables) for name in ("table_bytes", "compressed_bytes")
        )
        first |= {
            "predicted_kl": sum(predicted) if predicted else None,
            "table_bytes": before,
            "compressed_bytes": after,
            "ratio": before / after,
            "seconds": sum(each.seconds for each in tables),
            "tables": tables if fields["recipe"].tables else [],
        }
        return cls(**first, **fields)

    def sizes(self) -> list[Size]:
        """Return the sizes of the model and of each table that was compressed."""
        if len(self.tables) > 1:
            return [self._model_size(), *(table.size for table in self.tables)]
        return super().sizes()

    def tier_rows(self) -> dict[str, str]:
        """Return the rows and bytes of each tier, or the bytes of each tensor; none of several tables."""
        if len(self.tables) > 1:
            return {}
        tiers = {f"rows at {tier.name}": f"{tier.rows:,} ({tier.bytes:,} bytes)" for tier in self.tiers}
        return tiers | {f"{name}, bytes": f"{size:,}" for name, size in self.parts.items()}

    def figures(self) -> dict[str, str]:
        """Return everything but sizes and tiers, by name."""
        if len(self.tables) > 1:
            made, of_tables = f"{len(self.tables)} tables", [each.figures() for each in self.tables]
            facts = {name: text for each in of_tables for name, text in each.items()}
            compared = {name: text for name, text in super().figures().items() if name.startswith("sentence")}
        else:
            made = f"rank {self.rank} of {self.embedding_dim}" if self.rank else ""
            made = f"{len(self.tiers)} tiers" if self.tiers else made
            facts = {name: f"{x:.6g}" if isinstance(x, float) else str(x) for name, x in self.facts.items()}
            facts |= {} if self.calibration is None else {"calibration": self.calibration}
            compared = {"output head": self.head or "none", **super().figures()}
        return {
            "method": f"{self.recipe.method}, {made}".removesuffix(", "),
            **facts,
            "token frequencies": self.counts or "not used",
            **self._divergences(),
            **compared,
            "seconds": f"{self.seconds:.1f}",
        }

    def _divergences(self) -> dict[str, str]:
        """Return the rows on the divergence from the dense model."""
        rows = {}
        if self.predicted_kl is not None:
            rows["KL divergence, predicted"] = f"{self.predicted_kl:.4f}"
        if (found := self.divergence) is not None:
            rows["KL divergence, measured"] = f"{found.mean:.4f} ({found.tokens:,} tokens not calibrated on)"
            rows["same likeliest token"] = f"{found.top1:.1%}"
        return rows

    @property
    def library(self) -> str:
        """The library that loads the model."""
        return "sentence_transformers" if self.architecture == "SentenceTransformer" else "transformers"

    def usage(self, place: str) -> tuple[str, str]:
        """Return two lines of Python that load the model from a directory or name."""
        load = self.architecture + ("" if self.library != "transformers" else ".from_pretrained")
        quoted = json.dumps(place, ensure_ascii=False)
        return f"from {self.library} import {self.architecture}", f"model = {load}({quoted})"

    @property
    def model(self) -> PreTrainedModel:
        """The compressed model; it is not part of the JSON."""
        return self._model


def model_card(report: Report) -> str:
    """Return a model card in Markdown, which tells that loading fails where embkern is not installed."""
    from huggingface_hub import ModelCard, ModelCardData

    library, (imported, loaded) = report.library, report.usage("path/or/name/of/this/model")
    data = ModelCardData(
        library_name=library.replace("_", "-"),
        tags=["embkern", "compressed-embeddings"],
        base_model=report.source if _is_hub_name(report.source) else None,
    )
    table = "\n".join(f"| {name} | {value} |" for name, value in report.rows().items())
    return str(
        ModelCard(
            f"""---
{data.to_yaml()}
---

```python
# embkern has to be installed: without it {library} cannot read the compressed embedding
{imported}

{loaded}
```

`{report.source}` with its token embeddings compressed by embkern {report.versions["embkern"]}.
`embkern export DIR --format dense -o OUT` turns it into an ordinary model that needs no embkern.

| | |
|---|---|
{table}

The figures compare the table with the original one; `embkern_report.json` has all of them.
"""
        )
    )


def name_of(model: Any) -> str:
    """Return the name or the directory that a model was loaded from; empty if it is not known."""
    return str(getattr(getattr(model, "config", None), "_name_or_path", "") or "")


def public_name(source: str) -> str:
    """Return a hub name unchanged, and only the last part of a path, as reports may be published."""
    return source if _is_hub_name(source) else source.rstrip("/").rpartition("/")[2]


def read_report(directory: str | os.PathLike) -> Report | None:
    """Return the report in a saved model's directory; None if there is none.

    Raises:
        ValueError: the report is damaged.
    """
    path = Path(directory) / REPORT_NAME
    if not path.is_file():
        return None
    content = read_checked_json(path)
    try:
        return Report.model_validate(content)
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from None


def _is_hub_name(source: str) -> bool:
    return source.count("/") == 1 and not source.startswith((".", "/", "~")) and not Path(source).exists()
