"""What stands for the rows that a table leaves out: their mean, or for each the nearest row that is kept."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .base import Rows, block_rows, take_rows

ID_BYTES = 4  # of an id that is kept, and of the number of a nearest row
_OTHERS, _KEPT = 1024, 2048  # rows of a product of cosines, 8 MB in fp32; 256 x 8192 take 7 % longer


def weighted_mean(table: Rows, ids: Tensor, weights: Tensor) -> Tensor:
    """Return the mean of rows ids (n,) with weights (n,) float64, (H,) float64; equal ones if all are 0."""
    share = weights if weights.any() else torch.ones_like(weights)
    share = share / share.sum()
    total = torch.zeros(table.shape[1], dtype=torch.float64, device=table.device)
    size = block_rows(table)
    for some, weight in zip(ids.split(size), share.split(size), strict=True):
        total += weight @ take_rows(table, some).double()
    return total


def nearest_rows(table: Rows, kept: Tensor, others: Tensor) -> Tensor:
    """Return for each of the other rows the number of the kept row of the largest cosine, int32.

    The product of all other with all kept rows is most of the time; memory holds a block of it.
    """
    known = F.normalize(take_rows(table, kept), eps=1e-30)
    found = []
    for some in others.split(_OTHERS) if len(others) else ():
        best = torch.full((len(some),), -2.0, dtype=known.dtype, device=table.device)
        place = torch.zeros(len(some), dtype=torch.int64, device=table.device)
        rows, first = F.normalize(take_rows(table, some), eps=1e-30), 0
        for part in known.split(_KEPT):
            value, near = (rows @ part.t()).max(1)
            better = value > best
            best, place = torch.where(better, value, best), torch.where(better, near + first, place)
            first += len(part)
        found.append(place.int())
    return torch.cat(found) if found else kept.new_zeros(1, dtype=torch.int32)
