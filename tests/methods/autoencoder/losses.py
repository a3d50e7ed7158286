"""The loss of the autoencoder as the paper writes it, and objectives and weights to compare it on."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from embkern.methods.autoencoder.objective import Objective
from embkern.methods.autoencoder.weights import Weights
from embkern.ops.reference import MEAN, SUM

AUTHORS = Objective(0.9975 / 5, 0.0, 0.0, 0.0025, 1e-6)
EVERY_TERM = Objective(0.7, 0.5, 0.3, 0.2, 1e-6)


def weights_of(rank: int, width: int, activation: str | None = None, dtype=torch.float32) -> Weights:
    return Weights.random(rank, width, activation).to(torch.device("cpu"), dtype)


def formula(objective: Objective, x, y, alpha, reduction=MEAN):
    """Return the loss of reconstructions y of rows x."""
    cw, mw, rw, pw = objective.term_weights
    rows = (
        cw * (1 - F.cosine_similarity(x, y, eps=objective.eps))
        + mw * (x - y).square().mean(1)
        + pw * ((x - y).abs() + 1e-10).pow(alpha).mean(1)
    )
    if reduction == SUM:
        return (rows + rw * (x - y).square().mean(1).sqrt()).sum()
    return rows.mean() + rw * F.mse_loss(x, y).sqrt()
