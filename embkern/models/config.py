"""What a saved model's ``config.json`` says of its compressed table."""

from __future__ import annotations

import json
import math
import os
import zlib
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..io.tensor_format import checksum
from ..nn import KINDS
from ..ops.backends import DTYPES
from ..recipe import DEFAULT_METHOD, LMHead, Recipe
from ..tables import Table

FORMAT_VERSION = 2


_VERSIONS = (1, 2)  # that are read; the first has no checksum of the description


@dataclass
class TableState:
    """What a saved model's config says of its table: enough to build the modules before weights come.

    Attributes:
        kind: ``factors`` or ``packed``.
        shapes: of the table's tensors.
        settings: what the table is made of besides its tensors.
        scales: constant factor of each embedding module's output.
        head: ``factorized`` (over the same table), ``dense``, or None.
        dtype: of the stored floating-point tensors.
        checksums: of the stored tensors.
    """

    kind: str
    shapes: dict[str, list[int]]
    settings: dict[str, Any]
    scales: dict[str, float]
    head: str | None
    dtype: str
    checksums: dict[str, str] = field(default_factory=dict)

    def describe(self, table: Table) -> None:
        """Describe a table as it is stored."""
        self.shapes = {name: list(tensor.shape) for name, tensor in table.tensors().items()}
        self.dtype = dtype_name(table.dtype)
        self.checksums = {name: checksum(tensor) for name, tensor in table.tensors().items()}

    @property
    def stored_dtype(self) -> torch.dtype:
        """``dtype`` as torch has it."""
        return getattr(torch, self.dtype)

    def skeleton(self, dtype: torch.dtype) -> Table:
        """Return the table without its data, on the meta device; it is not validated."""
        layer = KINDS[self.kind]
        tensors: dict[str, Any] = {
            name: torch.empty(shape, dtype=layer.code_dtypes.get(name, dtype), device="meta")
            for name, shape in self.shapes.items()
        }
        return layer.table_type(**tensors, **self.settings, check=False)


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


class EmbkernConfig(QuantizationConfigMixin):
    """Quantisation config of transformers for a compressed embedding table.

    Args:
        method, ratio, rank, lm_head, options: as in ``embkern.Recipe``. A model that is compressed while it
            is loaded has no tokenizer at hand: methods that weigh rows by how often tokens are read go by
            the order of the ids. ``embkern.compress`` counts text.
        table, checksum: written by embkern when a model is compressed; not for callers.

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
        table: dict[str, Any] | None = None,
        quant_method: str = "embkern",
        format_version: int = FORMAT_VERSION,
        checksum: str | None = None,
        **unknown: Any,
    ) -> None:
        if quant_method != "embkern":
            raise ValueError(f"quantization_config: expected quant_method 'embkern', got {quant_method!r}")
        if type(format_version) is not int or format_version not in _VERSIONS:
            raise ValueError(
                f"quantization_config.format_version: expected {' or '.join(map(str, _VERSIONS))}, "
                f"got {format_version!r}; install the embkern that wrote the model, or a newer one"
            )
        if unknown:
            raise ValueError(f"quantization_config: unknown field(s) {', '.join(sorted(unknown))}")
        self.quant_method = quant_method
        self.format_version = FORMAT_VERSION  # it is saved as
        self.recipe = Recipe.parse(
            method=method, ratio=ratio, rank=rank, lm_head=lm_head, options=options or {}
        )
        self.table = None if table is None else _parse_state(table)
        if table is not None and (checksum is not None or format_version > 1):
            described = {
                "method": method,
                "ratio": ratio,
                "rank": rank,
                "lm_head": lm_head,
                "options": options,
            }
            if (got := _checksum_of({**described, "table": table})) != checksum:
                raise ValueError(
                    f"quantization_config was changed after it was saved (expected {checksum}, got {got}); "
                    "config.json is damaged or edited"
                )

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form, as in ``config.json``."""
        described = {
            **self.recipe.model_dump(),
            "table": None if self.table is None else asdict(self.table),
        }
        form = {"quant_method": self.quant_method, "format_version": self.format_version, **described}
        return form if self.table is None else {**form, "checksum": _checksum_of(described)}


def check_config(directory: str | os.PathLike) -> None:
    """Raise ValueError if what a model directory's config says of a compressed table is damaged.

    transformers prints a config before anyone parses it, and fails there at what it does not expect.
    """
    path = Path(directory) / "config.json"
    if not path.is_file():
        return
    try:
        described = json.loads(path.read_text(encoding="utf-8"))
        described = described.get("quantization_config") if isinstance(described, dict) else None
        if isinstance(described, dict) and described.get("quant_method") == "embkern":
            EmbkernConfig(**described)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: {error}") from error
    except RecursionError as error:
        raise ValueError(f"{path} is damaged: nested too deep") from error


def _checksum_of(described: dict[str, Any]) -> str:
    text = json.dumps(described, sort_keys=True, default=str)
    return f"crc32:{zlib.crc32(text.encode()):08x}"


def _parse_state(table: dict[str, Any]) -> TableState:
    try:
        state = TableState(**(_of_first_models(**table) if "rank" in table else table))
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
                f"checksums: expected them of {', '.join(state.shapes)}, got {state.checksums!r}"
            )
        state.skeleton(dtype).validate()
    except (TypeError, ValueError, AttributeError, OverflowError) as error:
        raise ValueError(f"quantization_config.table is damaged: {error}") from error
    except RecursionError as error:
        raise ValueError("quantization_config.table is damaged: nested too deep") from error
    return state


def _of_first_models(
    num_embeddings: int, embedding_dim: int, rank: int, offset: bool, activation: str | None, **common: Any
) -> dict[str, Any]:
    """Return the fields of TableState for a config from before there were kinds of tables."""
    shapes = {"codes": [num_embeddings, rank], "basis": [rank, embedding_dim]}
    if offset:
        shapes["offset"] = [embedding_dim]
    return {"kind": "factors", "shapes": shapes, "settings": {"activation": activation}, **common}
