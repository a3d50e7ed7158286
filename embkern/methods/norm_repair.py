"""Row lengths for factors that were fitted to directions only."""

from __future__ import annotations

import torch
from torch import Tensor

from ..tables.factors import Factors

ROWS = 2048  # rows of the table that are processed at a time


@torch.no_grad()
def repair_norms(table: Tensor, factors: Factors) -> Factors:
    """Rescale every reconstructed row y to the multiple that is nearest to its original x.

    ``y * (x * y).sum() / (y * y).sum()``, in float64. Directions stay the same, except that a row with
    ``<x, y> < 0`` is negated. The projections of ``svd`` and ``direction`` without an offset already have
    these lengths; the rows of an autoencoder that was trained on directions do not. An offset cannot be
    scaled
    per row, so it becomes one more row of the basis: the result has rank r + 1 and no offset, which costs V
    additional values.

    Args:
        table: (V, H), the original rows.
        factors: their factors, without an activation.

    Returns:
        Factors in the dtype of ``factors``, with the same ``facts``.

    Raises:
        ValueError: the shapes differ, or the factors have an activation.
    """
    if factors.activation is not None:
        raise ValueError(f"factors: expected linear ones, got the activation {factors.activation!r}")
    if table.shape != (factors.num_embeddings, factors.embedding_dim):
        shape = (factors.num_embeddings, factors.embedding_dim)
        raise ValueError(f"table: expected shape {shape}, got {tuple(table.shape)}")
    codes, basis = factors.codes, factors.basis
    if factors.offset is not None:
        codes = torch.cat([codes, codes.new_ones(len(codes), 1)], 1)
        basis = torch.cat([basis, factors.offset.unsqueeze(0)])
    scaled = torch.empty_like(codes)
    for rows, row_codes, out in zip(*(each.split(ROWS) for each in (table, codes, scaled)), strict=True):
        x, y = rows.double(), row_codes.double() @ basis.double()
        squares = y.square().sum(1)
        scale = torch.where(squares > 0, (x * y).sum(1) / squares, 0)
        out.copy_(row_codes.double() * scale.unsqueeze(1))
    return Factors(scaled, basis, facts=factors.facts)
