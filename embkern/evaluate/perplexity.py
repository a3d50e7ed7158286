"""Perplexity of a language model, masked or causal, and what compressing its embedding table makes of it.

Only the table is replaced, nothing is trained. *Input only* means that tokens are looked up in the compressed
table while a tied head keeps the dense one, as in the paper; *tied* that the head decodes through the
compressed table as well, as a model that embkern saves does.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import os
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn
from tqdm import tqdm

from .._version import __version__
from ..methods.base import Options, parse_options
from ..models.find_table import ModelTable, find_table, input_embeddings
from ..nn import layer_of
from ..nn.base import CompressedEmbedding
from ..tables import Table
from ..tables.factors import Factors
from ..tables.packed import PackedTable
from ..text.reading import read_texts
from .windows import LineFilter, Masking, Separator, Window, causal_windows, masked_windows

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Kind = Literal["masked", "causal"]
DEFAULT_LENGTH = {"masked": 512, "causal": 1024}  # where the model can read more

SORTED_BATCHES = 32  # windows of so many batches are sorted by length, which saves padding
LOGITS_AT_ONCE = 1 << 24  # 64 MB in fp32


class Decodable(Protocol):
    """What a method for comparison makes: a table that can be decoded and no model can hold."""

    def to_dense(self) -> Tensor:
        """Return the table (V, H)."""


class PerplexitySettings(Options):
    """The protocol of a measurement."""

    seed: int = Field(0, ge=0, description="masked: of the masks")
    batch_size: int = Field(8, ge=1, description="windows that are run at once; changes no figure")
    max_length: int | None = Field(
        None, ge=4, description="tokens of a window; by default the model's own, 512 (masked) or 1024 at most"
    )
    stride: int | None = Field(
        None, ge=1, description="causal: tokens by which windows slide; by default half of max_length"
    )
    separator: Separator | None = Field(
        None,
        description="causal: newline between texts, the default, or eos, the end-of-text token, behind each",
    )
    mask_probability: float = Field(0.15, gt=0, lt=1, description="masked: share of the tokens")
    masking: Masking = Field(
        "80-10-10",
        description="masked: of the masked tokens, 80 % are the mask, 10 % random, 10 % as they were, as in "
        "the paper; or all are the mask",
    )
    line_filter: LineFilter | None = Field(
        None, description="masked: authors: leave '=' out, and then texts below 20 tokens, as in the paper"
    )
    max_tokens: int | None = Field(None, ge=1, description="texts are read until there are so many")


class Perplexity(BaseModel):
    """How well a model predicts tokens."""

    model_config = ConfigDict(ser_json_inf_nan="strings")

    kind: Kind
    perplexity: float = Field(description="exp(loss)")
    loss: float = Field(description="mean over all scored tokens of -log p(token), in nats")
    tokens: int = Field(description="that were scored")


class TablePerplexity(BaseModel):
    """A model with another table in the place of its own."""

    name: str
    input_only: Perplexity = Field(description="tokens are looked up in it; a tied head keeps its own")
    tied: Perplexity | None = Field(None, description="a tied head uses it as well; null without one")


class PerplexityReport(BaseModel):
    """A model, and the same with other tables, asked the same."""

    architecture: str
    settings: PerplexitySettings = Field(description="with the values that stood for null")
    model: Perplexity | None = Field(description="of the model as it is; null if that was not asked")
    tables: list[TablePerplexity]
    windows: int = Field(description="in which something was scored")
    read: int = Field(description="tokens of text in them, special ones included")
    device: str
    dtype: str
    seconds: float
    versions: dict[str, str]


class PerplexityRun(PerplexityReport):
    """What ``embkern evaluate perplexity`` measured, and of what."""

    model: Perplexity
    source: str = Field(description="where the model is from")
    dataset: str
    nbytes: dict[str, int] = Field(description="of every table as stored, by its model's name")
    command: str | None = None

    @property
    def columns(self) -> list[str]:
        """What ``rows`` has behind the name and the bytes of the table."""
        if not self.tables:
            return ["perplexity"]
        return ["x", "input only", *(["tied head"] if any(each.tied for each in self.tables) else [])]

    def rows(self) -> Iterator[list[str]]:
        """Yield what is printed of each model."""
        own = self.nbytes[self.source]
        figures = [(each.name, each.input_only, each.tied) for each in self.tables]
        for name, *measured in [(self.source, self.model, self.model), *figures]:
            nbytes = self.nbytes[name]
            shown = [f"{each.perplexity:.2f}" if each else "-" for each in measured]
            row = [f"{own / nbytes:.2f}", *shown] if self.tables else shown
            yield [name, f"{nbytes:,}", *row[: len(self.columns)]]


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
    assert report.model is not None, "as own is True"
    return report.model


@torch.no_grad()
def evaluate_perplexity(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Iterable[str],
    tables: Mapping[str, Table | Tensor | Decodable] | None = None,
    *,
    own: bool = True,
    device: str | torch.device | None = None,
    progress: bool | None = None,
    **settings: Any,
) -> PerplexityReport:
    """Measure a language model, and the same with other tables in the place of its own, in one pass.

    ``perplexity = exp(sum of F.cross_entropy(logits[scored], targets, reduction="sum") / number of scored)``,
    in fp32. Every scored token weighs the same; ``exp(mean of the losses of batches)``, as transformers'
    Trainer gives, weighs a token by how few others its batch has, and changes with the batch size.

    A masked model fills in 15 % of the tokens of every text, whole words, drawn with the seed and the number
    of the window: every table, batch size and run is asked the same. The paper's authors batch without an
    attention mask, so that their model reads the padding; here it does not. A causal model reads all texts
    as one, in windows that overlap. Its figure is that of ``model(input_ids, labels=labels).loss`` of
    transformers over the same windows, weighted by their tokens.

    The body runs once per table for both heads, and heads at scored positions alone, where the model can be
    taken apart so (which is tried out on the model at hand); otherwise the whole model runs for each figure.

    Args:
        model: a masked or causal language model of transformers. It is as it was afterwards.
        tokenizer: of the model.
        texts: any iterable, such as ``embkern.text.read_texts`` returns; it is read once and not kept.
        tables: compressed tables, dense (V, H) tensors or anything with ``to_dense()``, by name; a dense
            model takes them. All are in memory together.
        own: measure the model as it is as well; without tables there is nothing else.
        device: the model is moved there, and stays.
        progress: show a bar on stderr; None shows it on a terminal.
        settings: see ``PerplexitySettings``.

    Raises:
        ValueError: the model is no such language model, the tokenizer is not its own, a table has another
            shape, a setting is out of range, or there is nothing to score.
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
        raise ValueError("tables: expected some to measure without the model's own, got none")
    found = find_table(model) if tables else None
    swaps = {name: TableSwap(model, table, found) for name, table in (tables or {}).items()}

    started, windows, tokens, read = time.perf_counter(), 0, 0, 0
    losses: dict[tuple[str, str], float] = defaultdict(float)
    bar = tqdm(
        desc="perplexity", unit="token", unit_scale=True, disable=None if progress is None else not progress
    )
    with _evaluating(model), bar:
        if kind == "causal":
            _check_causal(model)
        parts = _Parts(model)
        for batch in _batches(_windows(texts, tokenizer, model, protocol, kind), protocol.batch_size):
            inputs = _Inputs.of(batch, model)
            for figure, loss in _losses(parts, swaps, inputs, own):
                losses[figure] += loss
            windows, tokens = windows + len(batch), tokens + len(inputs.targets)
            new = sum(window.read for window in batch)
            read += new
            bar.update(new)
    if not tokens:
        raise ValueError("texts: expected tokens to predict, found none")

    def measured(name: str, column: str) -> Perplexity:
        loss = losses[name, column] / tokens
        with np.errstate(over="ignore"):
            return Perplexity(kind=kind, perplexity=float(np.exp(loss)), loss=loss, tokens=tokens)

    return PerplexityReport(
        architecture=type(model).__name__,
        settings=protocol,
        model=measured(*_OWN) if own else None,
        tables=[
            TablePerplexity(
                name=name,
                input_only=measured(name, "input_only"),
                tied=measured(name, "tied") if (name, "tied") in losses else None,
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


_OWN = ("", "model")


def _losses(
    parts: _Parts, swaps: Mapping[str, TableSwap], inputs: _Inputs, own: bool
) -> Iterator[tuple[tuple[str, str], float]]:
    """Yield the summed loss of every figure on a batch."""
    if own:
        yield _OWN, parts.loss(parts.hidden(inputs), inputs.targets)
    for name, swap in swaps.items():
        with swap.inputs():
            hidden = parts.hidden(inputs)
        yield (name, "input_only"), parts.loss(hidden, inputs.targets)
        if swap.heads:
            with swap.inputs_and_heads():
                tied = hidden if parts.body is not None else parts.hidden(inputs)
                yield (name, "tied"), parts.loss(tied, inputs.targets)


# ---- the model -------------------------------------------------------------------------------------------


def usable_device(name: str | torch.device | None) -> torch.device | None:
    """Return a device that can be used here, or raise ValueError."""
    try:
        return None if name is None else torch.empty(0, device=name).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # torch without CUDA asserts
        reason = str(error).split("\n")[0]
        raise ValueError(f"device: expected one that is there, got {str(name)!r} ({reason})") from error


def kind_of(model: PreTrainedModel) -> Kind:
    """Tell by its class whether a model is a masked or a causal language model.

    Raises:
        ValueError: it is neither: an encoder without a head, an encoder-decoder, a classifier.
    """
    from transformers.models.auto import modeling_auto as auto

    name = type(model).__name__
    if model.config.is_encoder_decoder:
        raise ValueError(
            f"model: {name} is an encoder-decoder; perplexity is of masked and causal language models"
        )
    masked = name.endswith("ForMaskedLM") or name in auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES.values()
    causal = name.endswith("ForCausalLM") or name in auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
    if masked and causal:  # XLM, which its config makes the one or the other
        masked = not getattr(model.config, "causal", False)
    if not (masked or causal):
        raise ValueError(
            f"model: {name} has no language-model head, so it has no perplexity; expected a masked or causal "
            "language model, such as BertForMaskedLM or GPT2LMHeadModel"
        )
    return "masked" if masked else "causal"


def _resolved(
    settings: PerplexitySettings, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, kind: Kind
) -> PerplexitySettings:
    """Fill in what the model decides, and refuse what it cannot do."""
    longest = longest_input(model)
    length = settings.max_length or min(longest, tokenizer.model_max_length, DEFAULT_LENGTH[kind])
    if length > longest:
        raise ValueError(f"max_length: expected at most the model's {longest}, got {length}")
    if kind == "masked":
        for name in ("stride", "separator"):
            if getattr(settings, name) is not None:
                raise ValueError(f"{name}: expected with causal models only; a masked one reads text by text")
        return settings.model_copy(update={"max_length": length})
    if settings.line_filter is not None:
        raise ValueError("line_filter: expected with masked models only; a causal one reads all texts as one")
    stride = settings.stride or max(1, length // 2)
    if stride > length:
        raise ValueError(f"stride: expected at most max_length ({length}), got {stride}")
    separator = settings.separator or "newline"
    return settings.model_copy(update={"max_length": length, "stride": stride, "separator": separator})


def longest_input(model: PreTrainedModel) -> int:
    """Return how many tokens a model can read at once; 2^30 where nothing limits them."""
    limits = [getattr(model.config.get_text_config(), "max_position_embeddings", None) or -1]
    for name, module in model.named_modules():
        # RoBERTa and its kin count positions from behind the padding token's.
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            limits.append(module.num_embeddings - module.padding_idx - 1)
    return min((limit for limit in limits if limit > 0), default=1 << 30)


def _check_causal(model: PreTrainedModel) -> None:
    """Raise if tokens change what is predicted from those before them: XLNet, or BERT with a causal head."""
    ids = torch.zeros(2, 6, dtype=torch.long, device=model.device)
    ids[1, 1:] = 1
    first, second = model(input_ids=ids).logits[:, 0]
    if not _same(first, second):
        raise ValueError(
            f"model: {type(model).__name__} looks ahead as it is configured; its loss would be no perplexity"
        )


class _Parts:
    """A language model taken apart: a body that runs once, and a head for any of its hidden states.

    Attributes:
        body: the module whose hidden states the head reads one by one; None if the model has no such parts.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.body, self._output = _body_of(model)
        if self.body is None:
            return
        probe = torch.arange(6, device=model.device)[None] % model.config.get_text_config().vocab_size
        whole, parts = model(input_ids=probe).logits[0], self.logits(self.body(input_ids=probe)[0][0])
        if not _same(whole, parts):
            self.body = None

    def hidden(self, inputs: _Inputs) -> Tensor:
        """Return the hidden states of the scored positions, (n, H); their logits if there is no body."""
        output = self.model(**inputs.read).logits if self.body is None else self.body(**inputs.read)[0]
        return output.flatten(0, 1)[inputs.positions]

    def logits(self, hidden: Tensor) -> Tensor:
        """Return (n, V) for what ``hidden`` gives."""
        if self.body is None:
            return hidden
        with _returning(self.body, self._output(last_hidden_state=hidden[None])):
            return self.model(input_ids=hidden.new_zeros((1, len(hidden)), dtype=torch.long)).logits[0]

    def loss(self, hidden: Tensor, targets: Tensor) -> float:
        """Return ``F.cross_entropy(self.logits(hidden), targets, reduction="sum")``, a block at a time."""
        rows = max(1, LOGITS_AT_ONCE // self.model.config.get_text_config().vocab_size)
        return sum(
            float(F.cross_entropy(self.logits(some).float(), wanted, reduction="sum"))
            for some, wanted in zip(hidden.split(rows), targets.split(rows), strict=True)
        )


def _same(one: Tensor, other: Tensor) -> bool:
    """Whether two logits differ by rounding at most."""
    tolerance = 16 * torch.finfo(one.dtype).eps * float(one.abs().nan_to_num().max())
    return one.shape == other.shape and torch.allclose(one, other, rtol=0, atol=tolerance, equal_nan=True)


def _body_of(model: PreTrainedModel) -> tuple[nn.Module | None, Any]:
    """Return the outermost module inside a model that gives a last hidden state, and the type it gives."""
    ended: list[tuple[nn.Module | None, Any]] = [(None, None)]

    def note(module: nn.Module, _: Any, output: Any) -> None:
        if getattr(output, "last_hidden_state", None) is not None:
            ended.append((module, type(output)))

    hooks = [each.register_forward_hook(note) for each in model.modules() if each is not model]
    try:
        model(input_ids=torch.zeros(1, 2, dtype=torch.long, device=model.device))
    finally:
        for hook in hooks:
            hook.remove()
    return ended[-1]  # the outermost ends last


@contextlib.contextmanager
def _returning(module: nn.Module, output: Any) -> Iterator[None]:
    """Let a module return this without running."""
    own = {"forward": module.__dict__["forward"]} if "forward" in module.__dict__ else {}
    module.forward = lambda *args, **kwargs: output
    try:
        yield
    finally:
        del module.forward
        module.__dict__.update(own)


@contextlib.contextmanager
def _evaluating(model: PreTrainedModel) -> Iterator[None]:
    """Without dropout, and without a cache of keys and values, which nothing reads."""
    config = model.config.get_text_config()
    training, cached = model.training, getattr(config, "use_cache", None)
    model.eval()
    if cached is not None:
        config.use_cache = False
    try:
        yield
    finally:
        model.train(training)
        if cached is not None:
            config.use_cache = cached


# ---- its table -------------------------------------------------------------------------------------------


class TableSwap:
    """Another table for a dense model, that it uses within ``with`` and at no other time.

    ``with swap.inputs():`` replaces what tokens are looked up in, ``with swap.inputs_and_heads():`` a tied
    head's table as well. Afterwards the model has the very modules it had. A compressed table is used by
    the layers that ``embkern.compress`` puts in their place, anything else is decoded.

    Attributes:
        heads: by name, of the tied heads; empty if there is none, or if none can use the table (an
            activation after its product).

    Args:
        model: a dense one.
        table: of its table's shape.
        found: where the model has it; looked up if not given.

    Raises:
        ValueError: the table has another shape, or the model's cannot be replaced.
    """

    def __init__(
        self, model: PreTrainedModel, table: Table | Tensor | Decodable, found: ModelTable | None = None
    ) -> None:
        found = found or find_table(model)
        dense = {name: model.get_submodule(name) for name in [*found.embeddings, *found.heads]}
        self.model = model
        self.embeddings: dict[str, nn.Module] = {}
        self.heads: dict[str, nn.Module] = {}
        if isinstance(table, (Factors, PackedTable)):
            _check_shape((table.num_embeddings, table.embedding_dim), found)
            live = table.to(device=found.weight.device, dtype=found.weight.dtype)
            for name in found.embeddings:
                layer = layer_of(live).from_table(
                    live, padding_idx=dense[name].padding_idx, scale=found.scales[name]
                )
                self.embeddings[name] = layer.eval()
            if getattr(table, "activation", None) is None:
                root: Any = self.embeddings[found.root]
                self.heads = {name: root.head(dense[name].bias).eval() for name in found.heads}
        else:
            rows = table if isinstance(table, Tensor) else table.to_dense()
            _check_shape(tuple(rows.shape), found)
            weight = nn.Parameter(rows.detach().to(found.weight), requires_grad=False)
            self.embeddings = {name: _with_weight(dense[name], weight) for name in found.embeddings}
            self.heads = {name: _with_weight(dense[name], weight) for name in found.heads}

    def inputs(self) -> contextlib.AbstractContextManager[None]:
        """Look tokens up in the table."""
        return _replaced(self.model, self.embeddings)

    def inputs_and_heads(self) -> contextlib.AbstractContextManager[None]:
        """Look tokens up in the table, and let tied heads use it."""
        return _replaced(self.model, {**self.embeddings, **self.heads})


def _check_shape(shape: tuple[int, ...], found: ModelTable) -> None:
    if shape != tuple(found.weight.shape):
        raise ValueError(f"tables: expected the model's {tuple(found.weight.shape)}, got {shape}")


def _with_weight(module: nn.Module, weight: nn.Parameter) -> nn.Module:
    """Return a copy of an embedding or a head that shares everything but its weight."""
    clone = copy.copy(module)
    clone._parameters = {**module._parameters, "weight": weight}
    return clone


@contextlib.contextmanager
def _replaced(model: nn.Module, modules: Mapping[str, nn.Module]) -> Iterator[None]:
    before = {name: model.get_submodule(name) for name in modules}
    for name, module in modules.items():
        model.set_submodule(name, module)
    try:
        yield
    finally:
        for name, module in before.items():
            model.set_submodule(name, module)


# ---- the windows -----------------------------------------------------------------------------------------


class _Inputs(NamedTuple):
    """A batch as the model reads it; which of its outputs, flattened, are scored; and their targets."""

    read: dict[str, Tensor]
    positions: Tensor
    targets: Tensor

    @classmethod
    def of(cls, windows: Sequence[Window], model: PreTrainedModel) -> _Inputs:
        """Pad windows on the right; the ids of padding do not matter, as no token attends to them."""
        length = max(len(window.ids) for window in windows)
        ids = np.zeros((len(windows), length), np.int64)
        real = np.zeros_like(ids)
        for row, window in enumerate(windows):
            ids[row, : len(window.ids)], real[row, : len(window.ids)] = window.ids, 1
        inputs = {"input_ids": ids} if real.all() else {"input_ids": ids, "attention_mask": real}
        positions = np.concatenate([row * length + window.positions for row, window in enumerate(windows)])
        targets = np.concatenate([window.targets for window in windows])
        V = model.config.get_text_config().vocab_size
        if max(ids.max(), targets.max()) >= V:
            raise ValueError(f"tokenizer: has ids beyond the model's {V} tokens; it belongs to another model")
        on = model.device
        return cls(
            {name: torch.from_numpy(array).to(on) for name, array in inputs.items()},
            torch.from_numpy(positions).to(on),
            torch.from_numpy(targets).to(on),
        )


def _windows(
    texts: Iterable[str],
    tokenizer: PreTrainedTokenizerBase,
    model: PreTrainedModel,
    settings: PerplexitySettings,
    kind: Kind,
) -> Iterator[Window]:
    length, stride, V = settings.max_length, settings.stride, model.config.get_text_config().vocab_size
    assert length is not None, "filled in by _resolved"
    if kind == "causal":
        assert stride is not None, "as above"
        assert settings.separator is not None, "as above"
        return causal_windows(
            texts,
            tokenizer,
            max_length=length,
            stride=stride,
            separator=settings.separator,
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


def _batches(windows: Iterator[Window], size: int) -> Iterator[list[Window]]:
    """Yield windows that score something, some thousand sorted by length at a time."""
    scored = (window for window in windows if len(window.positions))
    while some := sorted(itertools.islice(scored, SORTED_BATCHES * size), key=lambda each: len(each.ids)):
        for start in range(0, len(some), size):
            yield some[start : start + size]


# ---- saved models ----------------------------------------------------------------------------------------


def measure_perplexity(
    models: Sequence[str],
    dataset: str | os.PathLike,
    *,
    against: str | None = None,
    errors: str = "strict",
    device: str | None = None,
    dtype: str | None = None,
    progress: bool | None = None,
    command: str | None = None,
    **settings: Any,
) -> PerplexityRun:
    """Measure a saved model, or a dense one beside those that were compressed from it.

    Args:
        models: a directory or hub name, dense or compressed; with ``against`` one or more compressed ones.
        dataset: text, as ``embkern.text.read_texts`` takes it.
        against: the dense model.
        errors: of bytes that are not UTF-8 text: ``strict`` or ``replace``.
        device: to run on, such as ``cuda``; the CPU by default.
        dtype: to run in, such as ``bfloat16``; by default that of the dense model's weights.
        progress: show a bar on stderr; None shows it on a terminal.
        command: kept in the result, to trace it.
        settings: see ``PerplexitySettings``.

    Raises:
        ValueError: as ``evaluate_perplexity`` does; or a model is not compressed, or differs from the dense
            one in more than its table, so that there is no telling what the table cost.
        FileNotFoundError: a model or the text does not exist.
    """
    from ..models.loading import load_model, load_tokenizer

    usable_device(device)  # before a model is loaded
    if against is None and len(models) != 1:
        raise ValueError(f"against: expected the dense model with {len(models)} models, got none")
    kept = getattr(torch, dtype or "float32", None)
    if not isinstance(kept, torch.dtype) or not kept.is_floating_point:
        raise ValueError(f"dtype: expected a floating-point dtype of torch, got {dtype!r}")
    source = models[0] if against is None else against
    model = load_model(source)
    kind_of(model)
    tokenizer = load_tokenizer(source) or load_tokenizer(models[0])
    if tokenizer is None:
        raise ValueError(f"tokenizer: expected one beside {source}, found none")
    nbytes = {source: _table_bytes(model)}
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
        model.to(kept)
    report = evaluate_perplexity(
        model, tokenizer, read_texts(dataset, errors=errors), tables,
        device=device, progress=progress, **settings,
    )  # fmt: skip
    for each in report.tables:
        if each.name in dense_heads:  # saved so: there is no model with the other figure
            each.tied = None
    return PerplexityRun(
        **dict(report), source=source, dataset=os.fspath(dataset), nbytes=nbytes, command=command
    )


def _table_bytes(model: PreTrainedModel) -> int:
    embedding: Any = input_embeddings(model)
    if isinstance(embedding, CompressedEmbedding):
        from ..models.checkpoint import stored_table

        return stored_table(model).nbytes
    return embedding.weight.nbytes


def _check_same_but_table(name: str, compressed: PreTrainedModel, dense: PreTrainedModel) -> None:
    """Raise unless a compressed model is the dense one with another table."""
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
            f"differ, such as {other[0]}. A model that was trained since has a figure of its own: leave "
            "against out"
        )
