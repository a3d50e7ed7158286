"""A row table of every kind, made of random tensors without a method."""

from __future__ import annotations

import math

import torch

from embkern.tables import (
    NonlinearTable,
    ProductTable,
    PrunedPackedTable,
    PrunedTable,
    RowTable,
    ScalarTable,
    TensorTrainTable,
)
from embkern.tables.bit_codes import pack_codes
from tests.example_tables import packed_of

NAMES = [
    "scalar", "scalar with points", "product", "product, plain", "tensor train", "two cores", "nonlinear",
    "pruned, mean", "pruned, nearest", "pruned, error", "pruned packed, mean", "pruned packed, nearest",
]  # fmt: skip


def row_table(name: str, V: int = 13, H: int = 8) -> RowTable:
    """Return a table of a kind; H is a multiple of 4."""
    sizes = {"num_embeddings": V, "embedding_dim": H}
    if name == "scalar":
        codes = pack_codes(torch.randint(32, (V, H), dtype=torch.uint8), 5)
        return ScalarTable(torch.rand(V, 1) + 0.5, codes, bits=5, group=H, **sizes)
    if name == "scalar with points":
        codes, groups = pack_codes(torch.randint(8, (V, H), dtype=torch.uint8), 3), -(-H // 3)
        floats = torch.rand(V, groups) + 0.5, torch.randn(V, groups), torch.randn(8)
        return ScalarTable(floats[0], codes, *floats[1:], bits=3, group=3, **sizes)
    if name.startswith("product"):
        codes = pack_codes(torch.randint(7, (V, 3), dtype=torch.uint8), 3)
        scales, rotation = torch.rand(V) + 0.5, torch.linalg.qr(torch.randn(H, H))[0]
        more = (None, None) if "plain" in name else (scales, rotation)
        return ProductTable(torch.randn(7, H), codes, *more, bits=3, subspaces=3, **sizes)
    if name == "tensor train":
        rows = [2, -(-V // 8), 4]
        cores = torch.randn(2 * 2, 3), torch.randn(2, 4 * (H // 4)), torch.randn(3, rows[1] * 2 * 2)
        return TensorTrainTable(
            *cores, torch.rand(V) + 0.5, rows=rows, columns=[2, 2, H // 4], **sizes,
        )  # fmt: skip
    if name == "two cores":
        rows = [math.isqrt(V) + 1, math.isqrt(V) + 1]
        return TensorTrainTable(
            torch.randn(rows[0] * 2, 3),
            torch.randn(3, rows[1] * (H // 2)),
            rows=rows,
            columns=[2, H // 2],
            **sizes,
        )
    if name == "nonlinear":
        shapes = [(4, 2), (4,), (8, 4), (8,), (H, 8), (H,)]
        layers = [0.5 * torch.randn(shape) for shape in shapes]
        return NonlinearTable(torch.randn(V, 2), *layers, norms=torch.rand(V) + 0.5, **sizes)
    unknown = name.partition(", ")[2]
    ids = torch.arange(0, V, 3, dtype=torch.int32)
    nearest = torch.randint(len(ids), (V - len(ids),), dtype=torch.int32) if unknown == "nearest" else None
    if "packed" in name:
        packed = packed_of(torch.randn(len(ids), H), torch.float32)
        mean = torch.randn(H) if unknown == "mean" else None
        return PrunedPackedTable(
            **packed.tensors(), kept_ids=ids, nearest_kept=nearest, mean_row=mean, unknown=unknown, **sizes
        )
    rows = torch.randn(len(ids) + (unknown == "mean"), H)
    return PrunedTable(rows, ids, nearest, unknown, **sizes)
