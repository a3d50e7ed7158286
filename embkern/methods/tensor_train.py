"""Tensor-train (matrix product operator) tables."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from ..tables.tensor_train import TensorTrainTable
from .base import Options, byte_budget, check_table, parse_options, ratio_error
from .storage import Storage, rounded, storage_dtype


class TensorTrainOptions(Options):
    """Options of ``tensor_train``."""

    cores: Literal[2, 3] = Field(3, description="cores, which is the number of factors of V and of H")
    scales: bool = Field(
        True, description="factorise directions and store a scale per row; False: factorise the table"
    )
    storage: Storage = Field("table", description="dtype of cores and scales: the table's, or float16")
    share_core: bool = Field(
        False, description="tables that a recipe names together share one central core, which is stored once"
    )
    rows: list[int] | None = Field(
        None, description="factors of the rows, one per core, with a product of at least V; None: balanced"
    )
    columns: list[int] | None = Field(None, description="factors of H, one per core; None: balanced")


@torch.no_grad()
def tensor_train(
    table: Tensor, *, ratio: float, counts: Tensor | None = None, **options: Any
) -> TensorTrainTable:
    """Factorise a table into a chain of small tensors by TT-SVD in fp64.

    V, padded with rows of zeros, is ``v1 * v2 * v3`` and H is ``h1 * h2 * h3``. By default the factors of V
    are those with the least ``(v1 + v2 + v3) * v1 * v2 * v3``, which are balanced and pad little: 29, 31, 34
    for 30522 rows, 63, 63, 63 for 250002. Those of H are the most balanced ones: 8, 8, 6 for 384. With the
    cores ``G1`` (v1, h1, r1), ``G2`` (r1, v2, h2, r2) and ``G3`` (r2, v3, h3), the value in row ``(i1, i2,
    i3)`` and column ``(j1, j2, j3)`` is::

        y = G1[i1, j1] @ G2[:, i2, j2] @ G3[:, i3, j3]

    Of the ranks that fit the ratio, those with the least squared error are chosen. With ``scales`` that is
    the error of the rows' directions, and a row is ``(x @ y) / (y @ y) * y``.

    Args:
        table: (V, H).
        ratio: bytes of the table as stored over bytes of cores and scales.
        counts: ignored, as all rows share the cores.
        options: the fields of ``TensorTrainOptions``.

    Raises:
        ValueError, TypeError: the ratio cannot be reached (the message names the highest that can), or an
            argument is not usable.

    Source: I. Oseledets, Tensor-train decomposition (2011); O. Hrinchuk et al., Tensorized
        embedding layers (2020).
    """
    chosen = parse_options(TensorTrainOptions, options, "tensor_train")
    check_table(table)
    dtype = storage_dtype(table, chosen.storage)
    budget = byte_budget(table, ratio)
    V, H = table.shape
    rows, columns = shape_of(V, H, chosen)
    of_scales = dtype.itemsize * V if chosen.scales else 0
    least = sum(v * h for v, h in zip(rows, columns, strict=True)) * dtype.itemsize + of_scales
    if least > budget:
        raise ratio_error(table, ratio, least)
    target = table.double()
    if chosen.scales:
        target = F.normalize(target, eps=1e-30)
    values = (budget - of_scales) // dtype.itemsize
    cores = [rounded(core, dtype) for core in tt_svd(interleaved(target, rows, columns), values)]
    return table_of_cores(table, cores, rows, columns, scales=chosen.scales)


def table_of_cores(
    table: Tensor, cores: list[Tensor], rows: list[int], columns: list[int], *, scales: bool
) -> TensorTrainTable:
    """Return the table of two or three cores that were found for ``table``, with its scales if asked."""
    made = TensorTrainTable(
        cores[0].contiguous(),
        cores[-1].contiguous(),
        cores[1].flatten(1) if len(cores) > 2 else None,
        rows=rows,
        columns=columns,
        num_embeddings=table.shape[0],
        embedding_dim=table.shape[1],
        facts={"ranks": [len(core) for core in cores[1:]], "rows": rows, "columns": columns},
        check=False,
    )
    return dataclasses.replace(made, scales=_scales(table, made), check=False) if scales else made


def shape_of(V: int, H: int, chosen: TensorTrainOptions) -> tuple[list[int], list[int]]:
    """Return the factors of the rows and of the columns that the options give, or balanced ones.

    Raises:
        ValueError: the given ones are not one per core, or have other products.
    """
    for name, factors in (("rows", chosen.rows), ("columns", chosen.columns)):
        if factors is not None and (len(factors) != chosen.cores or min(factors) < 1):
            raise ValueError(f"{name}: expected {chosen.cores} factors, one per core, got {factors}")
    rows = chosen.rows or padded_factors(V, chosen.cores)
    columns = chosen.columns or exact_factors(H, chosen.cores)[::-1]
    if math.prod(rows) < V:
        raise ValueError(f"rows: expected a product of at least V = {V}, got {rows}")
    if math.prod(columns) != H:
        raise ValueError(f"columns: expected a product of H = {H}, got {columns}")
    return rows, columns


def _scales(table: Tensor, made: TensorTrainTable) -> Tensor:
    """Return the scales (V,) of the rows that are nearest to a table's, in the dtype of the cores."""
    wide, found = made.to(torch.promote_types(made.dtype, torch.float32)), []
    for first, last in made.pieces():
        rows, copies = table[first:last].to(wide.dtype), wide.row_range(first, last)
        found.append((rows * copies).sum(1) / copies.square().sum(1).clamp_min(1e-30))
    return rounded(torch.cat(found), made.dtype)


def padded_factors(count: int, cores: int) -> list[int]:
    """Return ascending factors whose product is at least ``count``, with the least sum times product."""
    return min(_factors(count, cores), key=lambda each: (sum(each) * math.prod(each), each))


def exact_factors(count: int, cores: int) -> list[int]:
    """Return the most balanced ascending factors of ``count``."""
    exact = (each for each in _factors(count, cores) if math.prod(each) == count)
    return min(exact, key=lambda each: (sum(each), each))


def _factors(count: int, cores: int) -> Iterator[list[int]]:
    """Yield ascending factors with a product of at least ``count``, each with the smallest last factor."""
    least = range(1, math.isqrt(count) + 2)
    for first in itertools.combinations_with_replacement(least, cores - 1):
        last = -(-count // math.prod(first))
        if last >= first[-1]:
            yield [*first, last]


def interleaved(table: Tensor, rows: list[int], columns: list[int]) -> Tensor:
    """Pad a table (V, H) and reshape it to (v1 * h1, v2 * h2, ...)."""
    padded = table.new_zeros(math.prod(rows), table.shape[1])
    padded[: len(table)] = table
    count = len(rows)
    order = [axis for i in range(count) for axis in (i, count + i)]
    modes = [v * h for v, h in zip(rows, columns, strict=True)]
    return padded.view(*rows, *columns).permute(order).reshape(modes)


def tt_svd(tensor: Tensor, values: int, ends: tuple[int, int] | None = None) -> list[Tensor]:
    """Return cores (n1, r1), (r1, n2, r2), (r2, n3), or two, with the least error for at most ``values``.

    ``ends`` are the values that a rank costs in the first and in the last core: n1 and n3 by default.
    """
    modes = tensor.shape
    of_first, of_last = ends or (modes[0], modes[-1])
    unfolded = tensor.reshape(modes[0], -1)
    left = _left_vectors(unfolded)
    rest = left.t() @ unfolded
    if len(modes) == 2:
        rank = values // sum(modes)
        return [left[:, :rank], rest[:rank]]
    rest = rest.view(-1, modes[1], modes[2])
    most, gram = -1.0, tensor.new_zeros(modes[2], modes[2])
    best = (1, tensor.new_zeros(modes[2], 1))
    for first, part in enumerate(rest, 1):
        second = min((values - of_first * first) // (modes[1] * first + of_last), modes[1] * first, modes[2])
        if second < 1:
            break
        gram += part.t() @ part  # Gram matrix of the remainder after the first cut
        energies, vectors = torch.linalg.eigh(gram)
        if (kept := float(energies[-second:].sum())) > most:
            most, best = kept, (first, vectors[:, -second:])
    first, right = best
    return [left[:, :first], rest[:first] @ right, right.t()]


def _left_vectors(matrix: Tensor) -> Tensor:
    """Return left singular vectors in descending order; those of a wide matrix from its Gram matrix."""
    if matrix.shape[0] > matrix.shape[1]:
        return torch.linalg.svd(matrix, full_matrices=False)[0]
    return torch.linalg.eigh(matrix @ matrix.t())[1].flip(1)
