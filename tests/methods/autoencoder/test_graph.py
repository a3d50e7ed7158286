"""``GraphSteps`` against ``TorchSteps``; on the CPU the steps run again instead of a captured graph."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from embkern.methods.autoencoder.engines import TorchSteps, select_engine
from embkern.methods.autoencoder.graph import GRAPH_STEPS, GraphSteps
from embkern.methods.autoencoder.objective import Objective
from embkern.methods.autoencoder.targets import Targets
from embkern.methods.autoencoder.weights import Weights
from tests.conftest import seed_of

OBJECTIVE = Objective(0.2, 0.1, 0.05, 0.01, 1e-6)


def start(device):
    torch.manual_seed(seed_of(1))
    weights = Weights.random(5, 24).to(torch.device(device), torch.float32)
    rows = torch.randn(700, 24, generator=torch.Generator().manual_seed(seed_of(2))).to(device)
    return weights, Targets.of(rows)


def runs():
    """Yield orders of less than one, 1.5 and 2 graphs, other alphas and rates, and a short last batch."""
    generator = torch.Generator().manual_seed(seed_of(3))
    for count, alpha, lr in (
        (50, 1.0, 1e-2),
        (8 * 48, 1.0, 1e-2),
        (8 * 64, 0.7, 5e-3),
        (8 * 40 + 3, 0.7, 1e-3),
    ):
        yield torch.randint(700, (count,), generator=generator), alpha, lr


def compare(device, **options):
    weights, targets = start(device)
    expected_weights, _ = start(device)
    engine, expected = GraphSteps(weights, OBJECTIVE, **options), TorchSteps(expected_weights, OBJECTIVE)
    for order, alpha, lr in runs():
        got = engine.run(targets, order, 8, alpha, lr)
        assert_close(got, expected.run(targets, order, 8, alpha, lr), rtol=1e-5, atol=1e-6)
        assert weights.step == expected_weights.step
        assert_close(weights.parameters, expected_weights.parameters, rtol=1e-4, atol=1e-5)


def test_the_steps_around_a_capture_are_those_of_torch():
    captures = []

    def rerun(function):
        function()  # the run before the capture, whose effect must be undone
        captures.append(function)
        return function

    compare("cpu", capture=rerun)
    assert len(captures) == 2, "one capture per alpha"
    assert GRAPH_STEPS == 32, "the orders above fill one and a half and two graphs"


@pytest.mark.gpu
def test_a_captured_graph_takes_the_steps_of_torch():
    compare("cuda")


def test_only_cuda_has_graphs():
    weights, _ = start("cpu")
    assert select_engine(None, weights) != "graph"
    with pytest.raises(RuntimeError, match="engine: 'graph' cannot serve this run: a CUDA graph needs CUDA"):
        select_engine("graph", weights)
