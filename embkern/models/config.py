"""The description of a compressed table in a saved model's ``config.json``."""

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
_READABLE_VERSIONS = (1, 2)  # version 1 has no checksum of the description


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
    """

    kind: str
    shapes: dict[str, list[int]]
    settings: dict[str, Any]
    scales: dict[str, float]
    head: str | None
    dtype: str
    checksums: dict[str, str] = field(default_factory=dict)

    def describe(self, table: Table) -> None:
        """Set shapes, dtype and checksums to those of a table as it is stored."""
        self.shapes = {name: list(tensor.shape) for name, tensor in table.tensors().items()}
        self.dtype = dtype_name(table.dtype)
        self.checksums = {name: checksum(tensor) for name, tensor in table.tensors().items()}

    @property
    def stored_dtype(self) -> torch.dtype:
        """``dtype`` as a torch.dtype."""
        return getattr(torch, self.dtype)

    def skeleton(self, dtype: torch.dtype) -> Table:
        """Return a table of these shapes on the meta device; it is not validated."""
        layer = KINDS[self.kind]
        tensors: dict[str, Any] = {
            name: torch.empty(shape, dtype=layer.code_dtypes.get(name, dtype), device="meta")
            for name, shape in self.shapes.items()
        }
        return layer.table_type(**tensors, **self.settings, check=False)


def dtype_name(dtype: torch.dtype) -> str:
    """Return a dtype's name without ``torch.``."""
    return str(dtype).removeprefix("torch.")


class EmbkernConfig(QuantizationConfigMixin):
    """Quantisation config of transformers for a compressed embedding table.

    Args:
        method, ratio, rank, lm_head, options, calibrate: as in ``embkern.Recipe``. While a model is loaded
            there is no tokenizer and no text. A causal language model is calibrated on samples of its own;
            for others the frequencies of tokens are estimated from the order of the ids. ``embkern.compress``
            can read text.
        table, checksum, format_version, quant_method: written by embkern when a model is saved; not for
            callers.

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
        table: dict[str, Any] | None = None,
        quant_method: str = "embkern",
        format_version: int = FORMAT_VERSION,
        checksum: str | None = None,
        **unknown: Any,
    ) -> None:
        if quant_method != "embkern":
            raise ValueError(f"quantization_config: expected quant_method 'embkern', got {quant_method!r}")
        if type(format_version) is not int or format_version not in _READABLE_VERSIONS:
            raise ValueError(
                f"quantization_config.format_version: expected {' or '.join(map(str, _READABLE_VERSIONS))}, "
                f"got {format_version!r}; install the version of embkern that saved the model, or a newer one"
            )
        if unknown:
            raise ValueError(f"quantization_config: unknown field(s) {', '.join(sorted(unknown))}")
        self.quant_method = quant_method
        self.format_version = FORMAT_VERSION  # the version in which the model will be saved
        self.recipe = Recipe.parse(
            method=method, ratio=ratio, rank=rank, lm_head=lm_head, options=options or {}, calibrate=calibrate
        )
        self.table = None if table is None else _parse_state(table)
        if table is not None and (checksum is not None or format_version > 1):
            described = {
                "method": method,
                "ratio": ratio,
                "rank": rank,
                "lm_head": lm_head,
                "options": options,
                **_calibrate(calibrate),
            }
            if (got := _checksum_of({**described, "table": table})) != checksum:
                raise ValueError(
                    f"quantization_config was changed after it was saved (expected {checksum}, got {got}); "
                    "config.json is damaged or edited"
                )

    def to_dict(self) -> dict[str, Any]:
        """Return the config as in ``config.json``."""
        described = {
            **self.recipe.model_dump(exclude={"calibrate"}),
            **_calibrate(self.recipe.calibrate),
            "table": None if self.table is None else asdict(self.table),
        }
        form = {"quant_method": self.quant_method, "format_version": self.format_version, **described}
        return form if self.table is None else {**form, "checksum": _checksum_of(described)}


def _calibrate(value: bool | None) -> dict[str, bool]:
    """Return the recipe's field if it has a value; models saved by earlier versions lack it."""
    return {} if value is None else {"calibrate": value}


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
        if isinstance(described, dict) and described.get("quant_method") == "embkern":
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
        state.skeleton(dtype).validate()
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
