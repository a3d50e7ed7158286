"""Perplexity of saved models: of one, or of a dense model and those that were compressed from it."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from pydantic import Field

from ..models.checkpoint import stored_table
from ..models.find_table import find_table, input_embeddings
from ..models.loading import load_model, load_tokenizer
from ..nn.base import CompressedEmbedding
from ..text.reading import read_texts
from .language_model import kind_of, usable_device
from .perplexity import Perplexity, PerplexityReport, evaluate_perplexity

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class PerplexityRun(PerplexityReport):
    """The result of ``embkern evaluate perplexity``, with the models and the text it is of."""

    model: Perplexity
    source: str = Field(description="directory or hub name of the model")
    reference_source: str | None = Field(None, description="directory or hub name of the reference")
    dataset: str
    nbytes: dict[str, int] = Field(description="bytes of every table as stored, by its model's name")
    command: str | None = None

    @property
    def columns(self) -> list[str]:
        """Titles of what ``rows`` has after the name and the bytes of the table."""
        return [
            *(["x", "used in"] if self.tables else []),
            "perplexity",
            *(_DIVERGENCE if self._compared else []),
        ]

    @property
    def _compared(self) -> bool:
        return bool(self.tables) or self.reference is not None

    def rows(self) -> Iterator[list[str]]:
        """Yield the printed cells of each model, with a row for each way in which its table is used."""
        if self.reference is not None:
            dense = str(self.reference_source)
            yield [dense, f"{self.nbytes[dense]:,}", *_figures(self.reference, True)]
        own = self.nbytes[self.source]
        measured: list[tuple[str, str, Perplexity]] = [(self.source, "-", self.model)]
        for each in self.tables:
            measured.append((each.name, "input only", each.input_only))
            if each.tied is not None:
                measured.append((each.name, "input and tied head", each.tied))
        for name, used_in, figure in measured:
            nbytes = self.nbytes[name]
            used = [f"{own / nbytes:.2f}", used_in] if self.tables else []
            yield [name, f"{nbytes:,}", *used, *_figures(figure, self._compared)]


_DIVERGENCE = ["mean KL", "99 % of KL", "same top 1"]


def _figures(measured: Perplexity, compared: bool) -> list[str]:
    """Return the printed figures of a model, with those of its divergence if there are any in the table."""
    shown = [f"{measured.perplexity:.2f}"]
    if compared and (found := measured.divergence) is not None:
        shown += [f"{found.mean:.4f}", f"{found.p99:.3f}", f"{found.top1:.1%}"]
    elif compared:
        shown += ["-"] * len(_DIVERGENCE)
    return shown


def measure_perplexity(
    models: Sequence[str],
    dataset: str | os.PathLike,
    *,
    against: str | None = None,
    reference: str | None = None,
    errors: str = "strict",
    device: str | None = None,
    dtype: str | None = None,
    progress: bool | None = None,
    command: str | None = None,
    **settings: Any,
) -> PerplexityRun:
    """Measure a saved model, or a dense one and those that were compressed from it.

    Args:
        models: a directory or hub name, dense or compressed; with ``against`` one or more compressed ones.
        dataset: text, as ``embkern.text.read_texts`` takes it.
        against: the dense model, in whose input and tied head each compressed table is measured.
        reference: with one model and without ``against``: the dense model from whose predictions its own
            diverge. The two may differ in more than their tables, and are in memory together.
        errors: what to do with bytes that are not UTF-8 text: ``strict`` or ``replace``.
        device: device to run on, such as ``cuda``; default: the CPU.
        dtype: dtype to run in, such as ``bfloat16``; default: that of the dense model's weights.
        progress: show a bar on stderr; None shows it on a terminal.
        command: command line to record in the result.
        settings: see ``PerplexitySettings``.

    Raises:
        ValueError: as ``evaluate_perplexity`` does; or a model is not compressed, or differs from the dense
            one in more than its table, so that the difference is not that of the table.
        FileNotFoundError: a model or the text does not exist.
    """
    usable_device(device)  # before a model is loaded
    if against is None and len(models) != 1:
        raise ValueError(f"against: expected the dense model with {len(models)} models, got none")
    if against is not None and reference is not None:
        raise ValueError("reference: expected without against, which measures the divergence as well")
    chosen = getattr(torch, dtype or "float32", None)
    if not isinstance(chosen, torch.dtype) or not chosen.is_floating_point:
        raise ValueError(f"dtype: expected a floating-point dtype of torch, got {dtype!r}")
    source = models[0] if against is None else against
    model = load_model(source)
    kind_of(model)
    tokenizer = load_tokenizer(source) or load_tokenizer(models[0])
    if tokenizer is None:
        raise ValueError(f"tokenizer: expected one beside {source}, found none")
    nbytes = {source: _table_bytes(model)}
    dense = None
    if reference is not None:
        dense = load_model(reference)
        nbytes[reference] = _table_bytes(dense)
    tables: dict[str, Any] = {}
    dense_heads = set()
    for name in models if against is not None else ():
        compressed: Any = load_model(name)
        _check_same_but_table(name, compressed, model)
        tables[name], nbytes[name] = input_embeddings(compressed).table, _table_bytes(compressed)
        if compressed.config.quantization_config.table.head == "dense":
            dense_heads.add(name)
        del compressed
    if dtype is not None:
        model.to(chosen)
        if dense is not None:
            dense.to(chosen)
    report = evaluate_perplexity(
        model, tokenizer, read_texts(dataset, errors=errors), tables,
        reference=dense, device=device, progress=progress, **settings,
    )  # fmt: skip
    for each in report.tables:
        if each.name in dense_heads:  # the saved model's head is dense, so there is no tied figure
            each.tied = None
    return PerplexityRun(
        **dict(report), source=source, reference_source=reference, dataset=os.fspath(dataset), nbytes=nbytes,
        command=command,
    )  # fmt: skip


def _table_bytes(model: PreTrainedModel) -> int:
    embedding: Any = input_embeddings(model)
    if isinstance(embedding, CompressedEmbedding):
        return stored_table(model).nbytes
    return embedding.weight.nbytes


def _check_same_but_table(name: str, compressed: PreTrainedModel, dense: PreTrainedModel) -> None:
    """Raise ValueError unless a compressed model is the dense one with another table."""
    if not isinstance(input_embeddings(compressed), CompressedEmbedding):
        raise ValueError(f"model: expected one compressed by embkern with against, got a dense one: {name}")
    found = find_table(dense)
    table = {f"{module}.weight" for module in [*found.embeddings, *found.heads]}
    has = compressed.state_dict()
    other = [
        key
        for key, value in dense.state_dict().items()
        if key not in table and not (key in has and torch.equal(value, has[key]))
    ]
    if other:
        raise ValueError(
            f"against: expected the model that {name} was compressed from; {len(other)} of its other tensors "
            f"differ, such as {other[0]}. Measure a model that was trained after compression without against"
        )
