"""The description of compressed tables in a saved model's ``config.json``."""

from __future__ import annotations

import json
import math
import os
import zlib
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import NoneType
from typing import Any

import torch
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..io.tensor_format import checksum
from ..nn import KINDS, NGrammer
from ..ops.backends import DTYPES
from ..recipe import DEFAULT_METHOD, LMHead, Recipe, Tables
from ..tables import Table
from .body_config import QUANT_METHOD, body_as_json, parse_body

FORMAT_VERSION = (
    4  # that of models with an N-Grammer, shared tensors, or a body that another library quantises
)
_READABLE_VERSIONS = (1, 2, 3, 4)
_ONE_TABLE = 2  # the version of models whose input table alone is compressed; version 1 has no checksum
_TABLES = 3  # that of models with other compressed tables


@dataclass
class TableState:
    """Description of a saved model's table, from which its modules are built before the weights are loaded.

    Attributes:
        kind: ``factors`` or ``packed``.
        shapes: shapes of the table's tensors, by name.
        settings: fields of the table that are not tensors.
        scales: constant factor of each embedding module's output, by name.
        head: ``factorized`` (tied to the compressed table), ``dense``, or None.
        dtype: dtype of the stored floating-point tensors.
        checksums: checksums of the stored tensors, by name.
        segments: number of rows of the table that are a row of the embedding, as in ``SegmentedEmbedding``.
        source: checksum of the dense table, if rows that are not stored were kept in a file; else None.
        shares: names of tensors that are those of another table, and the name of that table.
    """

    kind: str
    shapes: dict[str, list[int]]
    settings: dict[str, Any]
    scales: dict[str, float]
    head: str | None
    dtype: str
    checksums: dict[str, str] = field(default_factory=dict)
    segments: int = 1
    source: str | None = None
    shares: dict[str, str] = field(default_factory=dict)

    def describe(self, table: Table) -> None:
        """Set shapes, dtype and checksums to those of a table as it is stored."""
        self.shapes = {name: list(tensor.shape) for name, tensor in table.tensors().items()}
        self.dtype = dtype_name(table.dtype)
        self.checksums = {name: checksum(tensor) for name, tensor in table.tensors().items()}

    @property
    def stored_dtype(self) -> torch.dtype:
        """``dtype`` as a torch.dtype."""
        return getattr(torch, self.dtype)

    def as_json(self) -> dict[str, Any]:
        """Return the fields as in ``config.json``, without those of the last three that say nothing."""
        lacking: dict[str, Any] = {"segments": 1, "source": None, "shares": {}}
        return {n: value for n, value in asdict(self).items() if n not in lacking or value != lacking[n]}

    def skeleton(self, dtype: torch.dtype) -> Table:
        """Return a table of these shapes on the meta device; it is not validated."""
        layer = KINDS[self.kind]
        tensors: dict[str, Any] = {
            name: torch.empty(shape, dtype=layer.code_dtype(name, tuple(shape)) or dtype, device="meta")
            for name, shape in self.shapes.items()
        }
        return layer.table_type(**tensors, **self.settings, check=False)


def dtype_name(dtype: torch.dtype) -> str:
    """Return a dtype's name without ``torch.``."""
    return str(dtype).removeprefix("torch.")


class EmbkernConfig(QuantizationConfigMixin):
    """Quantisation config of transformers for compressed embedding tables.

    Attributes:
        recipe: how the tables are compressed.
        table: description of the input table, or None if it is dense.
        named_tables: descriptions of the other compressed tables, by the name of their first module.
        body: how another library quantises the linear layers, or None if they are dense.
        quantizes_body: whether it does so while the model is loaded; False for a body that is stored so.
        ngrammer: description of the N-Grammer at the input embedding, or None.

    Args:
        method, ratio, rank, lm_head, options, calibrate, calibration, tables: as in ``embkern.Recipe``.
            While a model is loaded there is no tokenizer and no text. ``calibration`` is a file that was
            measured on the model before. Without it, a causal language model is calibrated on samples of its
            own; for others the frequencies of tokens are estimated from the order of the ids.
            ``embkern.compress`` can read text.
        body: a config of transformers for the linear layers, such as ``TorchAoConfig`` or
            ``BitsAndBytesConfig``; None leaves them dense.
        table, named_tables, ngrammer, checksum, format_version, quant_method: written by embkern when a model
            is saved; not for callers.

    Raises:
        ValueError: a field is unknown, out of range, or damaged.
    """

    def __init__(
        self,
        method: str = DEFAULT_METHOD,
        ratio: float | None = None,
        rank: int | None = None,
        lm_head: LMHead = "factorized",
        options: dict[str, Any] | None = None,
        calibrate: bool | None = None,
        calibration: str | os.PathLike | None = None,
        tables: Tables | None = None,
        body: QuantizationConfigMixin | dict[str, Any] | None = None,
        table: dict[str, Any] | None = None,
        named_tables: dict[str, dict[str, Any]] | None = None,
        ngrammer: dict[str, Any] | None = None,
        quant_method: str = QUANT_METHOD,
        format_version: int = FORMAT_VERSION,
        checksum: str | None = None,
        **unknown: Any,
    ) -> None:
        if quant_method != QUANT_METHOD:
            raise ValueError(f"quantization_config: expected quant_method 'embkern', got {quant_method!r}")
        if type(format_version) is not int or format_version not in _READABLE_VERSIONS:
            raise ValueError(
                f"quantization_config.format_version: expected {' or '.join(map(str, _READABLE_VERSIONS))}, "
                f"got {format_version!r}; install the version of embkern that saved the model, or a newer one"
            )
        if unknown:
            raise ValueError(f"quantization_config: unknown field(s) {', '.join(sorted(unknown))}")
        self.quant_method = quant_method
        self.recipe = Recipe.parse(
            method=method, ratio=ratio, rank=rank, lm_head=lm_head, options=options or {},
            calibrate=calibrate, calibration=calibration, tables=tables,
        )  # fmt: skip
        self.body = parse_body(body)
        self.quantizes_body = body is not None and body is self.body
        self.table = None if table is None else _parse_state(table)
        if not isinstance(named_tables, (dict, NoneType)):
            raise ValueError(f"quantization_config.named_tables: expected a mapping, got {named_tables!r}")
        self.named_tables = {name: _parse_state(each) for name, each in (named_tables or {}).items()}
        self.ngrammer = ngrammer
        if ngrammer is not None:
            NGrammer.from_description(ngrammer, device="meta")
        if (self.states or ngrammer) and (checksum is not None or format_version > 1):
            described = {
                "method": method,
                "ratio": ratio,
                "rank": rank,
                "lm_head": lm_head,
                "options": options,
                **_given(calibrate=calibrate, tables=tables, named_tables=named_tables, ngrammer=ngrammer),
                **_given(body=None if self.quantizes_body else body),
            }
            if (got := _checksum_of({**described, "table": table})) != checksum:
                raise ValueError(
                    f"quantization_config was changed after it was saved (expected {checksum}, got {got}); "
                    "config.json is damaged or edited"
                )

    @property
    def states(self) -> dict[str, TableState]:
        """Descriptions of all compressed tables, by name; the name of the input table is empty."""
        return self.named_tables if self.table is None else {"": self.table, **self.named_tables}

    @property
    def format_version(self) -> int:
        """The version in which the model will be saved: the oldest that describes it."""
        if self.body is not None or self.ngrammer or any(state.shares for state in self.states.values()):
            return FORMAT_VERSION
        return _TABLES if self.recipe.tables or self.named_tables else _ONE_TABLE

    def to_dict(self) -> dict[str, Any]:
        """Return the config as in ``config.json``."""
        named = {name: state.as_json() for name, state in self.named_tables.items()}
        described = {
            **self.recipe.model_dump(exclude={"calibrate", "tables"}),
            **_given(calibrate=self.recipe.calibrate, tables=self.recipe.tables, named_tables=named or None),
            **_given(ngrammer=self.ngrammer, body=body_as_json(self.body)),
            "table": None if self.table is None else self.table.as_json(),
        }
        form = {"quant_method": self.quant_method, "format_version": self.format_version, **described}
        return {**form, "checksum": _checksum_of(described)} if self.states or self.ngrammer else form


def _given(**fields: Any) -> dict[str, Any]:
    """Return the fields that have a value; models saved by earlier versions lack these."""
    return {name: value for name, value in fields.items() if value is not None}


def check_config(directory: str | os.PathLike) -> None:
    """Raise ValueError if the description of a compressed table in a model directory is damaged.

    It is called before transformers reads the config, which would fail with a less clear error.
    """
    path = Path(directory) / "config.json"
    if not path.is_file():
        return
    try:
        described = json.loads(path.read_text(encoding="utf-8"))
        described = described.get("quantization_config") if isinstance(described, dict) else None
        if isinstance(described, dict) and described.get("quant_method") == QUANT_METHOD:
            EmbkernConfig(**described)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: {error}") from None
    except RecursionError:
        raise ValueError(f"{path} is damaged: nested too deep") from None


def _checksum_of(described: dict[str, Any]) -> str:
    text = json.dumps(described, sort_keys=True, default=str)
    return f"crc32:{zlib.crc32(text.encode()):08x}"


def _parse_state(table: dict[str, Any]) -> TableState:
    """Return a state after checking all of its fields; raise ValueError if one is damaged."""
    try:
        state = TableState(**(_upgraded(**table) if "rank" in table else table))
        if state.head not in (None, "factorized", "dense"):
            raise ValueError(f"head: expected factorized, dense or null, got {state.head!r}")
        dtype = next((each for each in DTYPES if dtype_name(each) == state.dtype), None)
        if dtype is None:
            known = ", ".join(map(dtype_name, DTYPES))
            raise ValueError(f"dtype: expected a floating-point torch dtype ({known}), got {state.dtype!r}")
        if not all(type(scale) in (int, float) and math.isfinite(scale) for scale in state.scales.values()):
            raise ValueError(f"scales: expected finite numbers, got {state.scales!r}")
        if state.kind not in KINDS:
            raise ValueError(f"kind: expected one of {', '.join(KINDS)}, got {state.kind!r}")
        for name, shape in state.shapes.items():
            if not isinstance(shape, list) or not all(type(size) is int and size > 0 for size in shape):
                raise ValueError(f"shapes: expected positive integers, got {shape} of {name}")
            if len(shape) > 2 or math.prod(shape) >= 2**60:
                raise ValueError(f"shapes: expected those of a vector or a matrix, got {shape} of {name}")
        texts = all(type(value) is str for value in state.checksums.values())
        if not set(state.checksums) <= set(state.shapes) or not texts:
            raise ValueError(
                f"checksums: expected those of {', '.join(state.shapes)}, got {state.checksums!r}"
            )
        if type(state.source) not in (str, NoneType):
            raise ValueError(f"source: expected a checksum or null, got {state.source!r}")
        owners = all(type(value) is str for value in state.shares.values())
        if not set(state.shares) <= set(state.shapes) or not owners:
            raise ValueError(f"shares: expected those of {', '.join(state.shapes)}, got {state.shares!r}")
        skeleton = state.skeleton(dtype)
        skeleton.validate()
        if type(state.segments) is not int or state.segments < 1 or skeleton.num_embeddings % state.segments:
            raise ValueError(
                f"segments: expected a divisor of {skeleton.num_embeddings} rows, got {state.segments!r}"
            )
    except (TypeError, ValueError, AttributeError, OverflowError) as error:
        raise ValueError(f"quantization_config.table is damaged: {error}") from None
    except RecursionError:
        raise ValueError("quantization_config.table is damaged: nested too deep") from None
    return state


def _upgraded(
    num_embeddings: int, embedding_dim: int, rank: int, offset: bool, activation: str | None, **common: Any
) -> dict[str, Any]:
    """Return the fields of TableState for the first configs, which described factors only."""
    shapes = {"codes": [num_embeddings, rank], "basis": [rank, embedding_dim]}
    if offset:
        shapes["offset"] = [embedding_dim]
    return {"kind": "factors", "shapes": shapes, "settings": {"activation": activation}, **common}
