"""``Objective``: its gradients and terms against the paper's formula."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from embkern.methods.autoencoder.targets import Targets
from embkern.ops.reference import MEAN, SUM
from tests.methods.autoencoder.losses import EVERY_TERM, formula, weights_of


@pytest.mark.parametrize("activation", [None, "elu"])
@pytest.mark.parametrize("reduction", [MEAN, SUM], ids=["mean", "sum"])
def test_gradients_are_those_of_the_papers_formula(activation, reduction):
    weights, x = weights_of(3, 10, activation, torch.float64), torch.randn(9, 10, dtype=torch.float64)
    loss, gradients = EVERY_TERM.gradients(weights, Targets.of(x), 0.4, reduction)
    parts = [part.clone().requires_grad_() for part in weights.parts()]
    leaf = weights_of(3, 10, activation, torch.float64)
    leaf.parts = lambda flat=None: parts  # the formula's own graph
    expected = formula(EVERY_TERM, x, leaf.decode(leaf.encode(x)), 0.4, reduction)
    assert_close(loss, expected)
    for got, wanted in zip(gradients, torch.autograd.grad(expected, parts), strict=True):
        assert_close(got, wanted)


@pytest.mark.parametrize("activation", [None, "elu"])
def test_sums_are_the_terms_and_make_the_loss(activation):
    weights, x = weights_of(3, 10, activation, torch.float64), torch.randn(9, 10, dtype=torch.float64)
    y = weights.decode(weights.encode(x))
    sums = EVERY_TERM.term_sums(weights, Targets.of(x), 0.4) / 9
    assert_close(sums[0], (1 - F.cosine_similarity(x, y)).mean())
    assert_close(sums[1], F.mse_loss(x, y))
    assert_close(sums[2], ((x - y).abs() + 1e-10).pow(0.4).mean())
    assert EVERY_TERM.value(*sums.tolist()) == pytest.approx(float(formula(EVERY_TERM, x, y, 0.4)))
