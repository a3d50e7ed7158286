"""SVD and PCA, exact through the Gram matrix in fp64, or randomised."""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from ..tables.factors import Factors, check_rank
from .base import Options, Rows, blocks, check_table, parse_options, seeded


class SVDOptions(Options):
    """Options of ``svd``."""

    center: bool = Field(False, description="PCA: subtract the mean row and keep it as the offset")
    algorithm: Literal["exact", "randomized"] = Field("exact", description="exact (Gram) or randomized")
    n_iter: int = Field(29, ge=0, description="power iterations of the randomised algorithm")
    seed: int = Field(42, ge=0, lt=2**32, description="seed of the randomised algorithm")


@torch.no_grad()
def svd(table: Tensor, rank: int, **options: Any) -> Factors:
    """Best rank-r approximation in the Frobenius norm.

    ``U, S, Vh = torch.linalg.svd(table); codes = U[:, :r] * S[:r]; basis = Vh[:r]``

    The exact algorithm computes the eigenvectors of the H x H Gram matrix, which is accumulated and solved in
    fp64. Squaring the spectrum loses singular values below 1e-8 of the largest, which contribute nothing. The
    randomised algorithm is ``torch.svd_lowrank`` with 10 columns of oversampling, in fp32 (float64 for a
    float64 table).

    Args:
        table: (V, H).
        rank: r, 1 to H.
        options: the fields of ``SVDOptions``. The defaults of the randomised algorithm are those of the
            paper's authors. ``center=True`` is the linear baseline for an autoencoder with biases.

    Returns:
        Factors in the table's dtype, with the columns of the codes in order of decreasing energy.

    Raises:
        ValueError, TypeError: the rank or an option is out of range, or the table is not usable.

    Source: arXiv 2106.08181, the SVD baseline of its section 4.
    """
    chosen = parse_options(SVDOptions, options, "svd")
    check_table(table)
    check_rank(rank, table.shape[1])
    offset = None
    if chosen.center:
        offset = torch.stack([rows.double().sum(0) for rows in blocks(table)]).sum(0) / len(table)
    if chosen.algorithm == "exact":
        basis = principal_vectors(gram(table, offset), rank)
    else:
        basis = _randomized_vectors(table, offset, rank, chosen.n_iter, chosen.seed)
    return project(table, basis, offset)


def project(table: Tensor, basis: Tensor, offset: Tensor | None = None) -> Factors:
    """Project ``table - offset`` onto the columns of an orthonormal basis (H, r) and return the factors."""
    codes = torch.cat([_centered(rows, offset) @ basis for rows in blocks(table)]).to(table.dtype)
    return Factors(
        codes, basis.t().to(table.dtype).contiguous(), None if offset is None else offset.to(table.dtype)
    )


def _centered(rows: Tensor, offset: Tensor | None) -> Tensor:
    return rows.double() if offset is None else rows.double() - offset


def gram(table: Rows, offset: Tensor | None = None) -> Tensor:
    """Return the Gram matrix (H, H) of ``table - offset`` in fp64."""
    total = torch.zeros(table.shape[1], table.shape[1], dtype=torch.float64, device=table.device)
    for rows in blocks(table):
        for part in rows.split(1024):  # bounds the memory of the fp64 copy
            wide = _centered(part, offset)
            total.addmm_(wide.t(), wide)
    return total


def principal_vectors(gram: Tensor, rank: int) -> Tensor:
    """Return the eigenvectors (H, r) of the r largest eigenvalues of a Gram matrix, in descending order."""
    return torch.linalg.eigh(gram).eigenvectors[:, -rank:].flip(1)


def _randomized_vectors(table: Tensor, offset: Tensor | None, rank: int, n_iter: int, seed: int) -> Tensor:
    wide = table.to(torch.promote_types(table.dtype, torch.float32))
    centered = wide if offset is None else wide - offset.to(wide.dtype)
    with seeded(seed, table.device):  # svd_lowrank draws from the default generator
        vectors = torch.svd_lowrank(centered, q=min(rank + 10, *table.shape), niter=n_iter)[2][:, :rank]
    if vectors.shape[1] < rank:  # fewer rows than the rank: any orthonormal completion is exact
        vectors = torch.linalg.qr(
            torch.cat([vectors, torch.eye(len(vectors), dtype=vectors.dtype, device=table.device)], 1)
        )[0]
    return vectors[:, :rank].double()
