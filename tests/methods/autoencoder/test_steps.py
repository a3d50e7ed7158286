"""The training steps: the flat weights, the objective, and every engine against a plain torch loop."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

from embkern.methods.autoencoder import AutoencoderOptions, autoencoder
from embkern.methods.autoencoder.engines import ENGINES, TorchSteps, select_engine
from embkern.methods.autoencoder.objective import Objective
from embkern.methods.autoencoder.summed_steps import SummedSteps
from embkern.methods.autoencoder.weights import Weights
from embkern.methods.base import BLOCK_ROWS
from embkern.methods.sharded import World
from embkern.ops.reference import MEAN, SUM
from tests.conftest import seed_of

AUTHORS = Objective(0.9975 / 5, 0.0, 0.0, 0.0025, 1e-6)
EVERY_TERM = Objective(0.7, 0.5, 0.3, 0.2, 1e-6)


@pytest.fixture(params=ENGINES)
def engine(request) -> str:
    """Every engine that can serve here."""
    if reason := ENGINES[request.param].unavailable(weights_of(3, 5)):
        pytest.skip(reason)
    return request.param


def weights_of(rank: int, width: int, activation: str | None = None, dtype=torch.float32) -> Weights:
    return Weights.random(rank, width, activation).to(torch.device("cpu"), dtype)


def formula(objective: Objective, x, y, alpha, reduction=MEAN):
    cw, mw, rw, pw = objective.term_weights
    rows = (
        cw * (1 - F.cosine_similarity(x, y, eps=objective.eps))
        + mw * (x - y).square().mean(1)
        + pw * ((x - y).abs() + 1e-10).pow(alpha).mean(1)
    )
    if reduction == SUM:
        return (rows + rw * (x - y).square().mean(1).sqrt()).sum()
    return rows.mean() + rw * F.mse_loss(x, y).sqrt()


def plain_loop(rows, rank, order, batch_size, objective, alpha, lr, activation=None):
    """The loop as one would write it; returns its losses and its modules."""
    torch.manual_seed(seed_of(7))
    encoder, decoder = nn.Linear(rows.shape[1], rank), nn.Linear(rank, rows.shape[1])
    encoder.to(rows.dtype), decoder.to(rows.dtype)
    bend = F.elu if activation else nn.Identity()
    optimizer = torch.optim.Adam([*encoder.parameters(), *decoder.parameters()], lr=lr)
    losses = []
    for ids in order.split(batch_size):
        batch = rows[ids]
        loss = formula(objective, batch, bend(decoder(bend(encoder(batch)))), alpha)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses), encoder, decoder


def test_the_weights_start_like_nn_linear():
    torch.manual_seed(seed_of(3))
    weights = Weights.random(4, 10)
    torch.manual_seed(seed_of(3))
    encoder, decoder = nn.Linear(10, 4), nn.Linear(4, 10)
    expected = (encoder.weight, encoder.bias, decoder.weight.t(), decoder.bias)
    assert all(torch.equal(part, e) for part, e in zip(weights.parts(), expected, strict=True))


@pytest.mark.parametrize("activation", [None, "elu"])
def test_encode_and_decode(activation):
    weights, rows = weights_of(4, 10, activation), torch.randn(7, 10)
    encoder_weight, encoder_bias, basis, offset = weights.parts()
    bend = F.elu if activation else nn.Identity()
    codes = bend(rows @ encoder_weight.t() + encoder_bias)
    assert_close(weights.encode(rows), codes)
    assert_close(weights.decode(codes), bend(codes @ basis + offset))


@pytest.mark.parametrize("activation", [None, "elu"])
@pytest.mark.parametrize("reduction", [MEAN, SUM], ids=["mean", "sum"])
def test_gradients_are_those_of_the_papers_formula(activation, reduction):
    weights, x = weights_of(3, 10, activation, torch.float64), torch.randn(9, 10, dtype=torch.float64)
    loss, gradients = EVERY_TERM.gradients(weights, x, 0.4, reduction)
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
    sums = EVERY_TERM.term_sums(weights, x, 0.4) / 9
    assert_close(sums[0], (1 - F.cosine_similarity(x, y)).mean())
    assert_close(sums[1], F.mse_loss(x, y))
    assert_close(sums[2], ((x - y).abs() + 1e-10).pow(0.4).mean())
    assert EVERY_TERM.value(*sums.tolist()) == pytest.approx(float(formula(EVERY_TERM, x, y, 0.4)))


@pytest.mark.parametrize(
    "objective", [AUTHORS, Objective(0.7, 0.5, 0.3, 0.0025, 1e-6)], ids=["authors", "every term"]
)
def test_a_thousand_steps_have_the_losses_of_a_plain_loop(engine, objective):
    torch.manual_seed(seed_of(1))
    rows = torch.randn(997, 16) @ torch.randn(16, 40) / 4 + 0.1 * torch.randn(997, 40)
    order = torch.cat([torch.randperm(997) for _ in range(33)])[: 32 * 1000 - 5]  # the last step is short
    plain, *modules = plain_loop(rows, 8, order, 32, objective, 0.7, 1e-3)
    torch.manual_seed(seed_of(7))
    weights = Weights.random(8, 40)
    losses = ENGINES[engine](weights, objective).run(rows, order, 32, 0.7, 1e-3)
    assert (len(losses), weights.step) == (1000, 1000)
    assert_close(losses[:300], plain[:300], rtol=1e-6, atol=0)
    # Later an error passes 0, where the slope of the power term jumps, a step apart in any two fp32 runs:
    # plain torch is 3e-5 from its own float64 run there.
    assert_close(losses, plain, rtol=1e-4, atol=0)
    encoder, decoder = modules
    expected = (encoder.weight, encoder.bias, decoder.weight.t(), decoder.bias)
    for part, wanted in zip(weights.parts(), expected, strict=True):
        assert_close(part, wanted.detach(), rtol=1e-2, atol=1e-3)


def test_elu_steps_have_the_losses_of_a_plain_loop():
    rows, order = torch.randn(50, 12), torch.arange(50).repeat(4)
    plain = plain_loop(rows, 5, order, 16, EVERY_TERM, 0.7, 1e-2, "elu")[0]
    torch.manual_seed(seed_of(7))
    losses = TorchSteps(Weights.random(5, 12, "elu"), EVERY_TERM).run(rows, order, 16, 0.7, 1e-2)
    assert_close(losses, plain, rtol=1e-5, atol=0)


def test_cutting_an_order_into_runs_changes_no_bit(engine):
    rows, order = torch.randn(60, 12), torch.randperm(60)
    whole, cut = weights_of(5, 12), weights_of(5, 12)
    cut.parameters.copy_(whole.parameters)
    losses = ENGINES[engine](whole, AUTHORS).run(rows, order, 8, 0.7, 1e-2)
    steps = ENGINES[engine](cut, AUTHORS)
    parts = [steps.run(rows, ids, 8, 0.7, 1e-2) for ids in (order[:8], order[8:32], order[32:])]
    assert torch.equal(losses, torch.cat(parts))
    assert all(torch.equal(torch.as_tensor(cut.state()[name]), torch.as_tensor(each))
               for name, each in whole.state().items())  # fmt: skip


@pytest.mark.parametrize("activation", [None, "elu"])
@pytest.mark.parametrize("shards", [1, 3])
def test_summed_steps_are_the_steps_of_the_whole_batch(activation, shards):
    torch.manual_seed(seed_of(7))
    rows, order = torch.randn(50, 12, dtype=torch.float64), torch.randperm(50)
    expected, weights = (weights_of(5, 12, activation, torch.float64) for _ in range(2))
    weights.parameters.copy_(expected.parameters)
    losses = TorchSteps(expected, EVERY_TERM).run(rows, order, 20, 0.7, 1e-2)
    world = World(shards)
    summed = SummedSteps(weights, EVERY_TERM, world).run(world.sections(rows), order, 20, 0.7, 1e-2)
    assert_close(summed, losses)
    assert_close(weights.parameters, expected.parameters)


def test_a_perfect_fit_has_a_finite_gradient_with_a_root():
    rows = torch.eye(4, 6)
    weights = weights_of(4, 6)
    weights.set_projection(torch.eye(4, 6))
    only_root = Objective(0.0, 0.0, 1.0, 0.0, 1e-6)
    world = World()
    SummedSteps(weights, only_root, world).run(world.sections(rows), torch.arange(4), 4, 1.0, 1e-2)
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
        TorchSteps(weights, AUTHORS).run(rows, order, min(V, batch_size), options.alpha(epoch), 1e-2)
    assert_close(factors.basis, weights.basis, rtol=1e-3, atol=1e-4)
    assert_close(factors.codes, weights.encode(rows), rtol=1e-3, atol=1e-3)


def test_an_engine_that_cannot_serve_says_why():
    with pytest.raises(ValueError, match="engine: expected one of native, graph, torch, got 'eager'"):
        select_engine("eager", weights_of(3, 5))
    with pytest.raises(RuntimeError, match="engine: 'native' cannot serve this run: .* no activation"):
        select_engine("native", weights_of(3, 5, "elu"))
    assert select_engine(None, weights_of(3, 5, "elu")) == "torch"
