"""Helpers of all methods: options, checks and blocks of a table, row weights, and sizes for a ratio."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any, TypeVar

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor

from ..io.mapped_table import TableFile
from ..io.tensor_format import checksum_of_parts

BLOCK_ROWS = 8192  # rows of a table that are processed at a time: 25 MB in fp32 at H = 768
BLOCK_VALUES = 2**23  # upper bound of a block's values, for wide rows

Rows = Tensor | TableFile


class Options(BaseModel):
    """Base of the options of a method, whose fields define their names, types, ranges and defaults."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


AnyOptions = TypeVar("AnyOptions", bound=BaseModel)


def parse_options(model: type[AnyOptions], options: dict[str, Any], owner: str) -> AnyOptions:
    """Validate the options of a method or setting.

    Raises:
        ValueError: an option is wrong; the message, which begins with ``owner``, names each wrong option,
            what was expected and what it got.
    """
    try:
        return model.model_validate(options)
    except ValidationError as error:
        problems, known = [], ""
        for problem in error.errors():
            message = problem["msg"].removeprefix("Value error, ")
            if place := ".".join(map(str, problem["loc"])):  # a model validator names its fields itself
                message = f"{place}: {message}, got {problem['input']!r}"
            if problem["type"] == "extra_forbidden":
                known = f" (known: {', '.join(model.model_fields)})"
            problems.append(message)
        raise ValueError(f"{owner}: {'; '.join(problems)}{known}") from None


@contextlib.contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Seed torch's default generators of the CPU and ``device`` in the block, and restore them after it."""
    devices = [device.index or 0] if device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would also reseed all other devices
        for index in devices:
            torch.cuda.default_generators[index].manual_seed(seed)
        yield


def check_table(table: Rows) -> None:
    """Check that a table is a floating-point (V, H) matrix with V, H >= 1 and finite values.

    Raises:
        ValueError: the shape or the device is wrong, or a row is not finite; the message names up to 8 rows.
        TypeError: the dtype is not floating-point.
    """
    check_shape(table)
    raise_for_rows(rows_not_finite(table))


def check_shape(table: Rows) -> None:
    """Check everything that ``check_table`` checks, except the values."""
    if not isinstance(table, (Tensor, TableFile)):
        raise TypeError(f"table: expected a tensor (V, H) or a TableFile, got {type(table).__name__}")
    if len(table.shape) != 2 or 0 in table.shape:
        raise ValueError(f"table: expected shape (V, H) with V, H >= 1, got {tuple(table.shape)}")
    if table.device.type == "meta":
        raise ValueError("table: expected data, got a tensor on the meta device (is the model offloaded?)")
    if not table.dtype.is_floating_point:
        raise TypeError(f"table: expected a floating-point dtype, got {table.dtype}")


def rows_not_finite(table: Rows, first: int = 0) -> list[int]:
    """Return the ids of the rows with a NaN or an infinity; the id of the first row is ``first``."""
    bad = []
    for rows in blocks(table):
        finite = torch.isfinite(torch.stack(rows.aminmax(dim=1))).all(0)  # aminmax propagates NaN to both
        bad += (first + torch.nonzero(~finite).flatten()).tolist()
        first += len(rows)
    return bad


def raise_for_rows(bad: list[int]) -> None:
    """Raise ValueError unless the list of rows that are not finite is empty."""
    if bad:
        shown = ", ".join(map(str, bad[:8])) + (", ..." if len(bad) > 8 else "")
        raise ValueError(f"table: expected finite values, got NaN or infinity in {len(bad)} row(s): {shown}")


def table_checksum(table: Rows) -> str:
    """Return the CRC-32 of a table's bytes, which are read block by block."""
    return checksum_of_parts(blocks(table))


def blocks(table: Rows) -> Iterator[Tensor]:
    """Yield the rows of a table in blocks of ``block_rows``, in its dtype."""
    size = block_rows(table)
    if len(table):
        yield from table.split(size) if isinstance(table, Tensor) else table.blocks(size)


def block_rows(table: Rows) -> int:
    """Return the number of rows in a block of a table."""
    return max(1, min(BLOCK_ROWS, BLOCK_VALUES // table.shape[1]))


def training_blocks(table: Rows) -> Iterator[Tensor]:
    """Yield the rows of a table in blocks, in the dtype of training."""
    for rows in blocks(table):
        yield rows.to(training_dtype(table))


def row_blocks(table: Rows, ids: Tensor) -> Iterator[Tensor]:
    """Yield the rows of distinct, sorted ids in blocks, in the dtype of training."""
    if not len(ids):
        return
    if len(ids) == len(table):  # all rows of a tensor are not copied
        yield from training_blocks(table)
    else:
        for some in ids.split(block_rows(table)):
            yield take_rows(table, some)


def take_rows(table: Rows, ids: Tensor) -> Tensor:
    """Return the rows of ids (n,), (n, H) in the dtype of training."""
    if isinstance(table, TableFile):
        return table.gather(ids)
    return table.index_select(0, ids.to(table.device)).to(training_dtype(table))


def training_dtype(table: Rows) -> torch.dtype:
    """Return fp32, or float64 for a float64 table."""
    return torch.promote_types(table.dtype, torch.float32)


def row_weights(
    counts: Tensor | None, num_embeddings: int, exponent: float = 1.0, *, name: str = "counts"
) -> Tensor:
    """Return ``counts ** exponent``, or equal weights without counts, with a sum of 1: (V,) float64, CPU.

    Raises:
        ValueError: ``counts``, which the message calls ``name``, is not (V,), not finite, negative or all
            zero.
        TypeError: it is no tensor.
    """
    if counts is None:
        return torch.full((num_embeddings,), 1 / num_embeddings, dtype=torch.float64)
    if not isinstance(counts, Tensor):
        raise TypeError(f"{name}: expected a tensor ({num_embeddings},), got {type(counts).__name__}")
    if counts.shape != (num_embeddings,):
        raise ValueError(
            f"{name}: expected shape ({num_embeddings},), one per row, got {tuple(counts.shape)}"
        )
    weights = counts.detach().double().cpu()
    wrong = ~(torch.isfinite(weights) & (weights >= 0))
    if bool(wrong.any()):
        raise ValueError(f"{name}: expected finite values of at least 0, got {float(weights[wrong][0])}")
    if not weights.any():
        raise ValueError(f"{name}: expected one above 0, got none")
    weights = (weights / weights.max()) ** exponent
    return weights / weights.sum()


def byte_budget(table: Rows, ratio: float) -> int:
    """Return the bytes of ``1 / ratio`` of a table as stored; ValueError unless the ratio is at least 1."""
    _check_ratio(ratio)
    budget = int(table.nbytes / ratio)
    # The division may have rounded down a budget that fits exactly.
    return budget + ((budget + 1) * ratio <= table.nbytes * (1 + 1e-12))


def ratio_error(table: Rows, ratio: float, least: float, condition: str = "") -> ValueError:
    """Return the error for a ratio whose budget is below ``least``, the fewest bytes that a method needs."""
    what = f"a {table.shape[0]} x {table.shape[1]} table{condition}"
    return _too_high(what, ratio, table.nbytes / least, "made smaller by this method")


def rank_for_ratio(num_embeddings: int, embedding_dim: int, ratio: float, *, offset: bool) -> int:
    """Return the largest rank whose factors take at most 1/ratio of the table's bytes.

    ``r = floor((V * H / ratio - offset * H) / (V + H))``. Codes, basis and offset have the table's dtype, so
    the ratio of parameters is the ratio of bytes.

    Args:
        num_embeddings: V.
        embedding_dim: H.
        ratio: bytes of the table over bytes of the factors.
        offset: whether the factors have an offset (H,).

    Raises:
        ValueError: ratio is below 1 or too high for rank 1; the message names the highest that works.
    """
    _check_ratio(ratio)
    table, per_rank = num_embeddings * embedding_dim, num_embeddings + embedding_dim
    fixed = embedding_dim if offset else 0
    rank = int((table / ratio - fixed) // per_rank)
    if (per_rank * (rank + 1) + fixed) * ratio <= table * (1 + 1e-12):
        rank += 1  # the division rounded down a rank that fits exactly
    if rank < 1:
        what = f"rank 1 of a {num_embeddings} x {embedding_dim} table"
        raise _too_high(what, ratio, table / (per_rank + fixed), "factorised smaller")
    return min(rank, embedding_dim)


def _check_ratio(ratio: float) -> None:
    if not (ratio >= 1 and math.isfinite(ratio)):
        raise ValueError(f"ratio: expected at least 1 (bytes before over bytes after), got {ratio}")


def _too_high(what: str, ratio: float, highest: float, impossible: str) -> ValueError:
    highest = math.floor(highest * 1000) / 1000
    return ValueError(
        f"ratio: {ratio:g} leaves no room for {what}; the highest that fits is {highest:g}"
        + ("" if highest >= 1 else f", so it cannot be {impossible}")
    )
