"""How far a compressed language model's predictions are from those of the dense one."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor


class Divergence(BaseModel):
    """How far predictions are from those of the dense model, over all scored tokens."""

    model_config = ConfigDict(ser_json_inf_nan="strings")

    mean: float = Field(description="mean of KL(dense || model) over scored tokens, in nats")
    p99: float = Field(description="99th percentile of it, interpolated linearly")
    top1: float = Field(description="share of scored tokens for which both find the same token likeliest")


class HeldOutDivergence(Divergence):
    """The same, measured on inputs that were kept out of a calibration."""

    tokens: int = Field(description="number of scored tokens")


class DenseBlock(NamedTuple):
    """What the dense model predicts for a block of tokens, computed once for all models compared with it.

    Attributes:
        log_probabilities: (n, V).
        probabilities: (n, V).
        likeliest: (n,) ids of the likeliest tokens.
    """

    log_probabilities: Tensor
    probabilities: Tensor
    likeliest: Tensor

    @classmethod
    def of(cls, log_probabilities: Tensor) -> DenseBlock:
        """Return the block of these log-probabilities."""
        return cls(log_probabilities, log_probabilities.exp(), log_probabilities.argmax(-1))


class Divergences:
    """The divergence from the dense model, added up over blocks of tokens; one number per token is kept."""

    def __init__(self) -> None:
        self._each: list[np.ndarray] = []
        self._agreeing = 0

    def add(self, dense: DenseBlock, other: Tensor) -> None:
        """Add the tokens of a block, whose log-probabilities ``other`` (n, V) are overwritten."""
        self._agreeing += int((dense.likeliest == other.argmax(-1)).sum())
        divergences = kl_divergence(dense.log_probabilities, dense.probabilities, other)
        self._each.append(divergences.float().cpu().numpy())

    @property
    def tokens(self) -> int:
        """Number of tokens that were added."""
        return sum(map(len, self._each))

    def total(self) -> Divergence | None:
        """Return the divergence over all tokens; None where none was added."""
        if not self.tokens:
            return None
        each = np.concatenate(self._each)
        return Divergence(
            mean=float(each.mean(dtype=np.float64)),
            p99=float(np.quantile(each, 0.99)),
            top1=self._agreeing / len(each),
        )


def kl_divergence(dense: Tensor, probabilities: Tensor, other: Tensor) -> Tensor:
    """Return ``F.kl_div(other, dense, log_target=True, reduction="none").sum(-1)``, overwriting ``other``.

    A token that both exclude with a logit of -inf adds nothing, where ``F.kl_div`` returns NaN.

    Args:
        dense: (n, V) log-probabilities.
        probabilities: ``dense.exp()``.
        other: (n, V) log-probabilities.
    """
    difference = other.neg_().add_(dense).masked_fill_(probabilities == 0, 0)
    return torch.linalg.vecdot(probabilities, difference)
