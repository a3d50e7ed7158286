"""What every method shares: options, checks on a table, weights of its rows, and what fits a ratio."""

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

BLOCK_ROWS = 8192  # rows of a table worked on at a time: 25 MB in fp32 at H = 768
BLOCK_VALUES = 2**23  # and fewer where a row is wide

Rows = Tensor | TableFile


class Options(BaseModel):
    """Base of a method's options: the one place of their names, types, ranges and defaults."""

    model_config = ConfigDict(extra="forbid", frozen=True)


AnyOptions = TypeVar("AnyOptions", bound=BaseModel)


def parse_options(model: type[AnyOptions], options: dict[str, Any], owner: str) -> AnyOptions:
    """Validate options; a ValueError names each option that is wrong, what was expected and what came."""
    try:
        return model.model_validate(options)
    except ValidationError as error:
        known = ", ".join(model.model_fields)
        problems = []
        for problem in error.errors():
            message = problem["msg"].removeprefix("Value error, ")
            if place := ".".join(map(str, problem["loc"])):  # a check of the whole names its field itself
                message = f"{place}: {message}, got {problem['input']!r}"
            problems.append(message)
        raise ValueError(f"{owner}: {'; '.join(problems)} (known: {known})") from None


@contextlib.contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Draw from torch's default generators of the CPU and ``device`` with a seed, and put them back."""
    devices = [device.index or 0] if device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would reseed every other device too
        for index in devices:
            torch.cuda.default_generators[index].manual_seed(seed)
        yield


def check_table(table: Rows) -> None:
    """Raise unless ``table`` is a floating-point (V, H) matrix with V, H >= 1 and finite rows."""
    check_shape(table)
    refuse_rows(not_finite(table))


def check_shape(table: Rows) -> None:
    """Raise unless ``table`` is a floating-point (V, H) matrix with V, H >= 1."""
    if len(table.shape) != 2 or 0 in table.shape:
        raise ValueError(f"table: expected shape (V, H) with V, H >= 1, got {tuple(table.shape)}")
    if table.device.type == "meta":
        raise ValueError("table: expected data, got a tensor on the meta device (is the model offloaded?)")
    if not table.dtype.is_floating_point:
        raise TypeError(f"table: expected a floating-point dtype, got {table.dtype}")


def not_finite(table: Rows, first: int = 0) -> list[int]:
    """Ids of the rows with a NaN or an infinity, the first row having the id ``first``."""
    bad = []
    for rows in blocks(table):
        finite = torch.isfinite(torch.stack(rows.aminmax(dim=1))).all(0)  # a NaN is both least and largest
        bad += (first + torch.nonzero(~finite).flatten()).tolist()
        first += len(rows)
    return bad


def refuse_rows(bad: list[int]) -> None:
    """Raise if there are rows that are not finite."""
    if bad:
        shown = ", ".join(map(str, bad[:8])) + (", ..." if len(bad) > 8 else "")
        raise ValueError(f"table: expected finite values, got NaN or infinity in {len(bad)} row(s): {shown}")


def table_checksum(table: Rows) -> str:
    """Return the CRC-32 of a table's bytes, read by blocks."""
    return checksum_of_parts(blocks(table))


def blocks(table: Rows) -> Iterator[Tensor]:
    """Yield the rows of a table, some thousand at a time, in its dtype."""
    size = block_rows(table)
    if len(table):
        yield from table.split(size) if isinstance(table, Tensor) else table.blocks(size)


def block_rows(table: Rows) -> int:
    """Rows of a block of a table."""
    return max(1, min(BLOCK_ROWS, BLOCK_VALUES // table.shape[1]))


def wide_blocks(table: Rows) -> Iterator[Tensor]:
    """Yield the rows of a table, some thousand at a time, in the dtype of training."""
    for rows in blocks(table):
        yield rows.to(training_dtype(table))


def row_blocks(table: Rows, ids: Tensor) -> Iterator[Tensor]:
    """Yield the rows of distinct, sorted ids like ``wide_blocks``; all rows of a tensor are not copied."""
    if not len(ids):
        return
    if len(ids) == len(table):
        yield from wide_blocks(table)
    else:
        for some in ids.split(block_rows(table)):
            yield take(table, some)


def take(table: Rows, ids: Tensor) -> Tensor:
    """Return the rows of ids, in the dtype of training."""
    if isinstance(table, TableFile):
        return table.gather(ids)
    return table.index_select(0, ids.to(table.device)).to(training_dtype(table))


def training_dtype(table: Rows) -> torch.dtype:
    """Return fp32, or float64 for a float64 table."""
    return torch.promote_types(table.dtype, torch.float32)


def checked_weights(name: str, weight: Tensor, num_embeddings: int) -> Tensor:
    """Return weights (V,) in fp64; ValueError unless they are finite, none negative and one per row."""
    if weight.shape != (num_embeddings,):
        raise ValueError(
            f"{name}: expected shape ({num_embeddings},), one per row, got {tuple(weight.shape)}"
        )
    weight = weight.detach().double()
    wrong = ~(torch.isfinite(weight) & (weight >= 0))
    if bool(wrong.any()):
        raise ValueError(f"{name}: expected finite values of at least 0, got {float(weight[wrong][0])}")
    return weight


def row_weights(
    counts: Tensor | None, num_embeddings: int, exponent: float = 1.0, *, name: str = "counts"
) -> Tensor:
    """Return ``counts ** exponent`` with a sum of 1, (V,) float64 on the CPU; all alike without counts.

    Raises:
        ValueError: counts (called ``name``) are not (V,), negative, not finite, or all zero.
    """
    if counts is None:
        return torch.full((num_embeddings,), 1 / num_embeddings, dtype=torch.float64)
    weights = checked_weights(name, counts, num_embeddings).cpu()
    if not weights.any():
        raise ValueError(f"{name}: expected one above 0, got none")
    weights = (weights / weights.max()) ** exponent
    return weights / weights.sum()


def byte_budget(table: Rows, ratio: float) -> int:
    """Return the bytes that ``1 / ratio`` of a table, as stored, may take; raise if either is not usable."""
    check_table(table)
    _check_ratio(ratio)
    budget = int(table.nbytes / ratio)
    # The division may have rounded down what fits exactly.
    return budget + ((budget + 1) * ratio <= table.nbytes * (1 + 1e-12))


def refuse_ratio(table: Rows, ratio: float, least: float, condition: str = "") -> ValueError:
    """Return the error of a ratio that leaves less than the ``least`` bytes a method can do with."""
    what = f"a {table.shape[0]} x {table.shape[1]} table{condition}"
    return _no_room(what, ratio, table.nbytes / least, "made smaller by this method")


def rank_for_ratio(num_embeddings: int, embedding_dim: int, ratio: float, *, offset: bool) -> int:
    """Return the largest rank whose factors take at most 1/ratio of the table's bytes.

    ``r = floor((V * H / ratio - offset * H) / (V + H))``: codes, basis and offset have the table's dtype, so
    a ratio of parameters is a ratio of bytes.

    Raises:
        ValueError: ratio is below 1 or too high for rank 1; the message names the highest that works.
    """
    _check_ratio(ratio)
    table, per_rank = num_embeddings * embedding_dim, num_embeddings + embedding_dim
    fixed = embedding_dim if offset else 0
    rank = int((table / ratio - fixed) // per_rank)
    if (per_rank * (rank + 1) + fixed) * ratio <= table * (1 + 1e-12):
        rank += 1  # the division above rounded down what fits exactly
    if rank < 1:
        what = f"rank 1 of a {num_embeddings} x {embedding_dim} table"
        raise _no_room(what, ratio, table / (per_rank + fixed), "factorised smaller")
    return min(rank, embedding_dim)


def _check_ratio(ratio: float) -> None:
    if not (ratio >= 1 and math.isfinite(ratio)):
        raise ValueError(f"ratio: expected at least 1 (bytes before over bytes after), got {ratio}")


def _no_room(what: str, ratio: float, highest: float, impossible: str) -> ValueError:
    highest = math.floor(highest * 1000) / 1000
    return ValueError(
        f"ratio: {ratio:g} leaves no room for {what}; the highest that fits is {highest:g}"
        + ("" if highest >= 1 else f", so it cannot be {impossible}")
    )
