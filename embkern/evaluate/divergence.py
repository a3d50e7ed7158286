"""How far a model's predictions are from those of the dense model: KL divergence, token by token."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

from ..fidelity.divergence import DenseBlock, Divergences
from .language_model import SplitModel

# Values of a block of log-probabilities: 64 MB in fp32, 64 tokens of a vocabulary of 262,144. Five tensors of
# this size are in memory at a time.
LOG_PROBABILITIES_AT_ONCE = 1 << 24


class Prediction(NamedTuple):
    """Hidden states of scored tokens, and the model that turns them into logits.

    Attributes:
        split: the model.
        hidden: (n, H), as ``SplitModel.hidden`` returns them.
        head: makes the model use the head of these states within a ``with`` block.
    """

    split: SplitModel
    hidden: Tensor
    head: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext

    def log_probabilities(self, block: slice) -> Tensor:
        """Return those of some tokens, (m, V) fp32."""
        with self.head():
            return F.log_softmax(self.split.logits(self.hidden[block]).float(), dim=-1)


class Scores:
    """The loss of a model, and its divergence from the dense one, summed up over blocks of tokens."""

    def __init__(self) -> None:
        self.loss = 0.0
        self.divergences = Divergences()

    def add_loss(self, log_probabilities: Tensor, targets: Tensor) -> None:
        """Add the summed cross-entropy of (n, V) log-probabilities and (n,) targets."""
        self.loss += float(F.nll_loss(log_probabilities, targets, reduction="sum"))


def compare(
    dense: Prediction,
    others: Mapping[tuple[str, str], Prediction],
    targets: Tensor,
    dense_scores: Scores,
    scores: Mapping[tuple[str, str], Scores],
) -> None:
    """Add the losses of all predictions of a batch, and the divergences of ``others`` from the dense one.

    Logits exist for a block of tokens at a time; those of the dense model are computed once for all others.
    """
    V = dense.split.model.config.get_text_config().vocab_size
    rows = max(1, LOG_PROBABILITIES_AT_ONCE // V)
    for start in range(0, len(targets), rows):
        block = slice(start, start + rows)
        expected, wanted = dense.log_probabilities(block), targets[block]
        dense_scores.add_loss(expected, wanted)
        shared = DenseBlock.of(expected)
        for name, prediction in others.items():
            got = prediction.log_probabilities(block)
            scores[name].add_loss(got, wanted)
            scores[name].divergences.add(shared, got)
