"""The loss of a linear autoencoder by the formula of its docstring."""

from __future__ import annotations

import torch

from embkern.ops import cosine_mse_loss


def composed(target, basis, offset=None, codes=None, encoder_weight=None, encoder_bias=None, **options):
    """The formula of the docstring."""
    if codes is None:
        codes = torch.nn.functional.linear(target, encoder_weight, encoder_bias)
    output = codes @ basis if offset is None else codes @ basis + offset
    return cosine_mse_loss(output, target, backend="torch", **options)
