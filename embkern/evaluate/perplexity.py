"""Perplexity of a language model, masked or causal, with its own embedding table and with others.

Only the table is replaced; nothing is trained. *Input only* means that the input embedding uses the
compressed table while a tied head keeps the dense one, as in the paper. *Tied* means that the head uses the
compressed table as well, as in a model that embkern saves.
"""

from __future__ import annotations

import contextlib
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor
from tqdm import tqdm

from .._version import __version__
from ..fidelity import Divergence
from ..methods.base import Options, parse_options
from ..models.find_table import find_table
from ..models.inference import evaluating, longest_input
from ..models.table_swap import Decodable, TableSwap
from ..tables import Table
from .batches import Batch, grouped
from .divergence import Prediction, Scores, compare
from .language_model import Kind, SplitModel, check_causal, kind_of, usable_device
from .windows import Beginning, LineFilter, Masking, Separator, Window, causal_windows, masked_windows

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DEFAULT_LENGTH = {"masked": 512, "causal": 1024}  # for models that can read more


class PerplexitySettings(Options):
    """The protocol of a measurement."""

    seed: int = Field(0, ge=0, description="masked models: random seed of the masks")
    batch_size: int = Field(8, ge=1, description="windows per batch; it does not change the figures")
    max_length: int | None = Field(
        None, ge=4, description="tokens per window; default: the model's limit, at most 512 (masked) or 1024"
    )
    stride: int | None = Field(
        None,
        ge=1,
        description="causal models: tokens between the starts of windows; default: half of max_length",
    )
    separator: Separator | None = Field(
        None,
        description="causal models: newline between texts (default), or eos, which ends each text with the "
        "end-of-text token",
    )
    beginning: Beginning | None = Field(
        None,
        description="causal models: the special tokens that begin a text begin the first window alone (text, "
        "default), or every window, as a model with a beginning-of-text token has always seen it",
    )
    mask_probability: float = Field(0.15, gt=0, lt=1, description="masked models: share of masked tokens")
    masking: Masking = Field(
        "80-10-10",
        description="masked models: 80-10-10 replaces 80 % of the chosen tokens by the mask and 10 % by "
        "random tokens and leaves 10 %, as in the paper; mask replaces all of them by the mask",
    )
    line_filter: LineFilter | None = Field(
        None,
        description="masked models: authors removes '=', then drops texts below 20 tokens, as in the paper",
    )
    max_tokens: int | None = Field(None, ge=1, description="stop reading texts at this number of tokens")


class Perplexity(BaseModel):
    """How well a model predicts tokens."""

    model_config = ConfigDict(ser_json_inf_nan="strings")

    kind: Kind
    perplexity: float = Field(description="exp(loss)")
    loss: float = Field(description="mean over all scored tokens of -log p(token), in nats")
    tokens: int = Field(description="number of scored tokens")
    divergence: Divergence | None = Field(
        None, description="from the dense model; null of that model itself, and if it was not run"
    )


class TablePerplexity(BaseModel):
    """Figures of a model with another table in place of its own."""

    name: str
    input_only: Perplexity = Field(description="the input embedding uses the table, a tied head does not")
    tied: Perplexity | None = Field(None, description="a tied head uses it as well; null without such a head")


class PerplexityReport(BaseModel):
    """Figures of a model, and of the same model with other tables, on the same windows."""

    architecture: str
    settings: PerplexitySettings = Field(description="with the model's values in place of null")
    model: Perplexity | None = Field(description="with its own table; null if that was not measured")
    reference: Perplexity | None = Field(None, description="of the dense model, if one was given")
    tables: list[TablePerplexity]
    windows: int = Field(description="number of windows with a scored token")
    read: int = Field(description="tokens of text in these windows, special ones included")
    device: str
    dtype: str
    seconds: float
    versions: dict[str, str]


def perplexity(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Iterable[str],
    *,
    device: str | torch.device | None = None,
    progress: bool | None = None,
    **settings: Any,
) -> Perplexity:
    """Return the perplexity of a model, dense or compressed: ``evaluate_perplexity`` without other tables."""
    report = evaluate_perplexity(model, tokenizer, texts, device=device, progress=progress, **settings)
    assert report.model is not None, "own is True"
    return report.model


@torch.no_grad()
def evaluate_perplexity(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Iterable[str],
    tables: Mapping[str, Table | Tensor | Decodable] | None = None,
    *,
    own: bool = True,
    reference: PreTrainedModel | None = None,
    device: str | torch.device | None = None,
    progress: bool | None = None,
    **settings: Any,
) -> PerplexityReport:
    """Measure a language model, and the same model with other tables in place of its own, in one pass.

    ``perplexity = exp(sum of F.cross_entropy(logits[scored], targets, reduction="sum") / number of scored)``,
    in fp32. Every scored token has the same weight. In ``exp(mean of the losses of batches)``, which
    transformers' Trainer reports, a token of a batch with fewer scored tokens weighs more, so that the figure
    changes with the batch size.

    A masked model predicts 15 % of the tokens of every text, in whole words. The words are drawn with the
    seed and the number of the window, so that every table, batch size and run has the same masks. The paper's
    authors batch without an attention mask, so that their model attends to padding; here it does not. A
    causal model reads all texts as one, in overlapping windows. Its figure is that of transformers'
    ``model(input_ids, labels=labels).loss`` on the same windows, weighted by their scored tokens.

    With each table's perplexity comes its divergence from the model with its own table: for every scored
    token ``KL(dense || table) = (dense.exp() * (dense - table)).sum(-1)``, of the log-softmax of both logits
    in fp32, as mean and 99th percentile, and the share of tokens with the same likeliest prediction. A block
    of logits is in memory at a time, and one number per scored token is kept.

    The body runs once per table for both heads, and heads run at scored positions only, if the model can be
    split in this way, which is tested on the given model. Otherwise the whole model runs for each figure.

    Args:
        model: a masked or causal language model of transformers, unchanged afterwards.
        tokenizer: the model's tokenizer.
        texts: any iterable, such as the result of ``embkern.text.read_texts``; it is read once and not kept.
        tables: compressed tables, dense (V, H) tensors or anything with ``to_dense()``, by name. They need a
            dense model, and are all in memory together.
        own: measure the model with its own table as well; required without ``tables``. Without it there is
            nothing that tables diverge from, and their divergence is None.
        reference: the dense model that ``model`` was compressed from, for its divergence; without ``tables``.
        device: the device to move the model to; it stays there.
        progress: show a bar on stderr; None shows it on a terminal.
        settings: see ``PerplexitySettings``.

    Raises:
        ValueError: the model is no such language model, the tokenizer is not its own, a table has another
            shape, the reference has another vocabulary or comes with tables, a setting is out of range, or
            there is nothing to score.
        TypeError: ``texts`` is one string.
    """
    import transformers

    if isinstance(texts, (str, bytes)):
        raise TypeError(f"texts: expected an iterable of str (read_texts reads a file), got {type(texts)}")
    if tokenizer is None:
        raise ValueError("tokenizer: expected the model's, got None")
    kind = kind_of(model)
    protocol = _resolved(parse_options(PerplexitySettings, settings, "perplexity"), model, tokenizer, kind)
    if device is not None:
        model.to(usable_device(device))
    if not (own or tables):
        raise ValueError("tables: expected at least one without the model's own, got none")
    if reference is not None:
        _check_reference(reference, model, kind, bool(tables))
        reference.to(model.device)
    found = find_table(model) if tables else None
    swaps = {name: TableSwap(model, table, found) for name, table in (tables or {}).items()}

    started, windows, tokens, read = time.perf_counter(), 0, 0, 0
    scores: dict[_Figure, Scores] = defaultdict(Scores)
    bar = tqdm(
        desc="perplexity", unit="token", unit_scale=True, disable=None if progress is None else not progress
    )
    with evaluating(model), contextlib.nullcontext() if reference is None else evaluating(reference), bar:
        if kind == "causal":
            check_causal(model)
        split = SplitModel(model)
        dense = None if reference is None else SplitModel(reference)
        for group in grouped(_windows(texts, tokenizer, model, protocol, kind), protocol.batch_size):
            _score(split, swaps, dense, Batch.of(group, model), own, scores)
            windows, tokens = windows + len(group), tokens + sum(len(window.targets) for window in group)
            new = sum(window.read for window in group)
            read += new
            bar.update(new)
    if not tokens:
        raise ValueError("texts: expected tokens to predict, found none")

    def measured(figure: _Figure) -> Perplexity:
        loss = scores[figure].loss / tokens
        with np.errstate(over="ignore"):
            perplexity = float(np.exp(loss))
        return Perplexity(
            kind=kind,
            perplexity=perplexity,
            loss=loss,
            tokens=tokens,
            divergence=scores[figure].divergences.total(),
        )

    return PerplexityReport(
        architecture=type(model).__name__,
        settings=protocol,
        model=measured(_OWN) if own else None,
        reference=None if reference is None else measured(_REFERENCE),
        tables=[
            TablePerplexity(
                name=name,
                input_only=measured((name, "input_only")),
                tied=measured((name, "tied")) if (name, "tied") in scores else None,
            )
            for name in swaps
        ],
        windows=windows,
        read=read,
        device=str(model.device),
        dtype=str(model.dtype).removeprefix("torch."),
        seconds=round(time.perf_counter() - started, 3),
        versions={
            "embkern": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    )


_Figure = tuple[str, str]
_OWN, _REFERENCE = ("", "model"), ("", "reference")


def _check_reference(reference: PreTrainedModel, model: PreTrainedModel, kind: Kind, tables: bool) -> None:
    """Raise ValueError unless the predictions of both models can be compared."""
    if tables:
        raise ValueError("reference: expected none with tables; they diverge from the model's own table")
    sizes = [each.config.get_text_config().vocab_size for each in (model, reference)]
    if kind_of(reference) != kind or sizes[0] != sizes[1]:
        raise ValueError(
            f"reference: expected a {kind} language model with {sizes[0]} tokens, "
            f"got a {kind_of(reference)} one with {sizes[1]}"
        )


def _score(
    split: SplitModel,
    swaps: Mapping[str, TableSwap],
    dense: SplitModel | None,
    batch: Batch,
    own: bool,
    scores: dict[_Figure, Scores],
) -> None:
    """Add the scores of every figure on a batch."""
    targets, figures = batch.targets, _predictions(split, swaps, batch, own and not swaps)
    if dense is not None:
        base, of_base = Prediction(dense, dense.hidden(batch)), scores[_REFERENCE]
    elif own and swaps:
        base, of_base = Prediction(split, split.hidden(batch)), scores[_OWN]
    else:
        for figure, prediction in figures:
            with prediction.head():
                scores[figure].loss += split.loss(prediction.hidden, targets)
        return
    # Without a body, hidden states are logits, so that those of a single figure are in memory at a time.
    groups = [dict(figures)] if split.body is not None else ({name: each} for name, each in figures)
    for number, group in enumerate(groups):
        own_scores = of_base if number == 0 else Scores()
        compare(base, group, targets, own_scores, {figure: scores[figure] for figure in group})


def _predictions(
    split: SplitModel, swaps: Mapping[str, TableSwap], batch: Batch, own: bool
) -> Iterator[tuple[_Figure, Prediction]]:
    """Yield the predictions of the model with its own table, if asked for, and with every other table."""
    if own:
        yield _OWN, Prediction(split, split.hidden(batch))
    for name, swap in swaps.items():
        with swap.inputs():
            hidden = split.hidden(batch)
        yield (name, "input_only"), Prediction(split, hidden)
        if swap.heads:
            if split.body is None:
                with swap.inputs_and_heads():
                    hidden = split.hidden(batch)
            yield (name, "tied"), Prediction(split, hidden, swap.inputs_and_heads)


def _resolved(
    settings: PerplexitySettings, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, kind: Kind
) -> PerplexitySettings:
    """Fill in the defaults that depend on the model, and raise ValueError for settings it cannot use."""
    longest = longest_input(model)
    length = settings.max_length or min(longest, tokenizer.model_max_length, DEFAULT_LENGTH[kind])
    if length > longest:
        raise ValueError(f"max_length: expected at most the model's {longest}, got {length}")
    if kind == "masked":
        for name in ("stride", "separator", "beginning"):
            if getattr(settings, name) is not None:
                raise ValueError(f"{name}: expected with causal models only; a masked one reads text by text")
        return settings.model_copy(update={"max_length": length})
    if settings.line_filter is not None:
        raise ValueError("line_filter: expected with masked models only; a causal one reads all texts as one")
    stride = settings.stride or max(1, length // 2)
    if stride > length:
        raise ValueError(f"stride: expected at most max_length ({length}), got {stride}")
    separator = settings.separator or "newline"
    beginning = settings.beginning or "text"
    return settings.model_copy(
        update={"max_length": length, "stride": stride, "separator": separator, "beginning": beginning}
    )


def _windows(
    texts: Iterable[str],
    tokenizer: PreTrainedTokenizerBase,
    model: PreTrainedModel,
    settings: PerplexitySettings,
    kind: Kind,
) -> Iterator[Window]:
    length, stride, V = settings.max_length, settings.stride, model.config.get_text_config().vocab_size
    assert length is not None, "_resolved fills it in"
    if kind == "causal":
        assert stride is not None, "_resolved fills it in"
        assert settings.separator is not None, "_resolved fills it in"
        assert settings.beginning is not None, "_resolved fills it in"
        return causal_windows(
            texts,
            tokenizer,
            max_length=length,
            stride=stride,
            separator=settings.separator,
            beginning=settings.beginning,
            max_tokens=settings.max_tokens,
        )
    return masked_windows(
        texts,
        tokenizer,
        vocabulary_size=min(len(tokenizer), V),
        max_length=length,
        seed=settings.seed,
        probability=settings.mask_probability,
        masking=settings.masking,
        line_filter=settings.line_filter,
        max_tokens=settings.max_tokens,
    )
