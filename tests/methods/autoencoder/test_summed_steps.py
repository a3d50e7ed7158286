"""``SummedSteps``: the steps of whole batches, for any number of shards and blocks."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from embkern.methods.autoencoder import AutoencoderOptions, autoencoder
from embkern.methods.autoencoder.engines import TorchSteps
from embkern.methods.autoencoder.objective import Objective
from embkern.methods.autoencoder.summed_steps import SummedSteps
from embkern.methods.autoencoder.targets import Targets, TargetSection
from embkern.methods.autoencoder.weights import Weights
from embkern.methods.base import BLOCK_ROWS
from embkern.methods.sharded import World
from tests.conftest import seed_of
from tests.methods.autoencoder.losses import AUTHORS, EVERY_TERM, weights_of


def sections_of(world, rows):
    return [TargetSection.of(section) for section in world.sections(rows)]


@pytest.mark.parametrize("activation", [None, "elu"])
@pytest.mark.parametrize("shards", [1, 3])
def test_summed_steps_are_the_steps_of_the_whole_batch(activation, shards):
    torch.manual_seed(seed_of(7))
    rows, order = torch.randn(50, 12, dtype=torch.float64), torch.randperm(50)
    expected, weights = (weights_of(5, 12, activation, torch.float64) for _ in range(2))
    weights.parameters.copy_(expected.parameters)
    losses = TorchSteps(expected, EVERY_TERM).run(Targets.of(rows), order, 20, 0.7, 1e-2)
    world = World(shards)
    summed = SummedSteps(weights, EVERY_TERM, world).run(sections_of(world, rows), order, 20, 0.7, 1e-2)
    assert_close(summed, losses)
    assert_close(weights.parameters, expected.parameters)


def test_a_perfect_fit_has_a_finite_gradient_with_a_root():
    rows = torch.eye(4, 6)
    weights = weights_of(4, 6)
    weights.set_projection(torch.eye(4, 6))
    only_root = Objective(0.0, 0.0, 1.0, 0.0, 1e-6)
    world = World()
    SummedSteps(weights, only_root, world).run(sections_of(world, rows), torch.arange(4), 4, 1.0, 1e-2)
    assert torch.isfinite(weights.parameters).all()


@pytest.mark.parametrize("batch_size", [BLOCK_ROWS + 1000, 10**6], ids=["large", "whole table"])
def test_large_batches_are_steps_on_as_many_rows(batch_size):
    V, options = BLOCK_ROWS + 1500, AutoencoderOptions(lr=1e-2)
    rows = torch.randn(V, 4) @ torch.randn(4, 6)
    factors = autoencoder(rows, 2, batch_size=batch_size, epochs=2, lr=1e-2, progress=False)
    torch.manual_seed(options.seed)
    weights = Weights.random(2, 6)
    for epoch in range(2):
        generator = torch.Generator().manual_seed(options.seed * 1_000_003 + epoch)
        order = torch.randperm(V, generator=generator)
        alpha = options.alpha(epoch)
        TorchSteps(weights, AUTHORS).run(Targets.of(rows), order, min(V, batch_size), alpha, 1e-2)
    assert_close(factors.basis, weights.basis, rtol=1e-3, atol=1e-4)
    assert_close(factors.codes, weights.encode(rows), rtol=1e-3, atol=1e-3)
