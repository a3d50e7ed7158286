"""Options of short runs, and the comparison of their results."""

from __future__ import annotations

import torch

from embkern.tables.factors import Factors

QUICK = dict(epochs=3, batch_size=16, progress=False)


def equal(left: Factors, right: Factors) -> bool:
    """Return whether all tensors have the same bits."""
    return all(torch.equal(tensor, right.tensors()[name]) for name, tensor in left.tensors().items())
