"""``fwsvd`` and ``tfwsvd``: closed forms, a search that is never worse, and weights that cannot be used."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from embkern.methods.direction import direction
from embkern.methods.weighted_svd import fwsvd, row_fisher, tfwsvd
from tests.methods.row_tables import embeddings

V, H, R = 300, 24, 4
FEW = {"adam_steps": 60, "sgd_steps": 20}


def weighted_error(table, fisher, factors, smoothing=0.0):
    """Return the weighted squared error over that of zeros, in float64."""
    table, weight = table.double(), fisher.double() + smoothing * fisher.double().mean()
    missed = table - factors.codes.double() @ factors.basis.double()
    return float((weight * missed.square()).sum() / (weight * table.square()).sum())


def closed_form(table, rows, columns):
    """Return the least error for the weights ``rows[:, None] * columns``, by an SVD in float64."""
    scaled = rows.double().sqrt().unsqueeze(1) * table.double() * columns.double().sqrt()
    squares = torch.linalg.svdvals(scaled).square()
    return float(squares[R:].sum() / squares.sum())


def alternating(table, weight, rounds=100):
    """Return the error of alternating weighted least squares in float64, an exact solver for each factor."""
    table, weight = table.double(), weight.double()
    basis = torch.linalg.svd(weight.sum(1, keepdim=True).sqrt() * table, full_matrices=False)[2][:R]

    def solved(weights, values, fixed):
        gram = torch.einsum("vh,rh,sh->vrs", weights, fixed, fixed)
        right = torch.einsum("vh,rh,vh->vr", weights, fixed, values)
        return torch.linalg.lstsq(gram, right.unsqueeze(-1)).solution.squeeze(-1)

    for _ in range(rounds):
        codes = solved(weight, table, basis)
        basis = solved(weight.t(), table.t(), codes.t()).t()
    missed = table - codes @ basis
    return float((weight * missed.square()).sum() / (weight * table.square()).sum())


def test_fwsvd_is_the_svd_of_weighted_rows():
    table, rows = embeddings(V, H), torch.rand(V) + 0.01
    fisher = rows.unsqueeze(1) * torch.full((V, H), 1 / H)
    got = fwsvd(table, R, fisher=fisher, smoothing=0)
    assert_close(
        weighted_error(table, fisher, got), closed_form(table, rows, torch.ones(H)), rtol=1e-4, atol=0
    )
    same = direction(table, R, row_weight=rows, cosine_weight=0, mse_weight=1)
    assert_close(got.codes @ got.basis, same.codes @ same.basis, rtol=1e-3, atol=1e-4)
    by_row = fwsvd(table, R, fisher=rows, smoothing=0)
    assert_close(by_row.codes @ by_row.basis, same.codes @ same.basis, rtol=1e-3, atol=1e-4)


def test_rank_one_weights_reach_the_closed_form():
    table, rows, columns = embeddings(V, H), torch.randn(V).exp(), torch.randn(H).exp()
    fisher = rows.unsqueeze(1) * columns
    least = closed_form(table, rows, columns)
    got = tfwsvd(table, R, fisher=fisher, smoothing=0, **FEW)
    assert least * (1 - 1e-5) <= weighted_error(table, fisher, got) <= least * (1 + 1e-4)
    assert got.facts["error"] == pytest.approx(weighted_error(table, fisher, got), rel=1e-4)
    rows_only = fwsvd(table, R, fisher=fisher, smoothing=0)
    assert weighted_error(table, fisher, got) < weighted_error(table, fisher, rows_only)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("spread", [0.0, 1.0, 3.0])
def test_it_is_never_worse_than_the_closed_form(dtype, spread):
    table, fisher = embeddings(V, H, dtype), (spread * torch.randn(V, H)).exp()
    start = weighted_error(table, fisher, fwsvd(table, R, fisher=fisher), 0.01)
    for steps in ({}, {"lr": 10.0}, {"adam_steps": 0, "sgd_steps": 0}):
        got = tfwsvd(table, R, fisher=fisher, **{**FEW, **steps})
        assert got.codes.dtype == got.basis.dtype == dtype
        assert weighted_error(table, fisher, got, 0.01) <= start * (1 + 1e-5)
        assert got.facts["error"] <= got.facts["start_error"]


def test_the_search_comes_near_alternating_least_squares():
    table, fisher = embeddings(V, H), (1.5 * torch.randn(V, H)).exp()
    least = alternating(table, fisher)
    start = weighted_error(table, fisher, fwsvd(table, R, fisher=fisher, smoothing=0))
    got = weighted_error(table, fisher, tfwsvd(table, R, fisher=fisher, smoothing=0))
    assert got - least < 0.2 * (start - least)


def test_it_is_deterministic_and_leaves_its_arguments():
    table, fisher = embeddings(V, H).requires_grad_(), torch.rand(V, H)
    with torch.no_grad():
        first = tfwsvd(table, R, fisher=fisher, **FEW)
    before = fisher.clone()
    again = tfwsvd(table, R, fisher=fisher, **FEW)
    assert torch.equal(first.codes, again.codes)
    assert torch.equal(first.basis, again.basis)
    assert torch.equal(fisher, before)
    assert table.grad is None
    assert not again.codes.requires_grad


@pytest.mark.parametrize("rank", [1, H])
def test_ranks_at_the_ends_zero_rows_and_rows_without_weight(rank):
    table, fisher = embeddings(V, H), torch.rand(V, H)
    fisher[:50] = 0
    fisher[:, 3] = 0
    table[60:70] = 0
    table[:, 5] = 0
    for smoothing in (0.0, 0.01):
        got = tfwsvd(table, rank, fisher=fisher, smoothing=smoothing, **FEW)
        dense = got.codes @ got.basis
        assert bool(torch.isfinite(dense).all())
        assert dense.abs().max() < 100 * table.abs().max()
        if rank == H and smoothing:
            assert weighted_error(table, fisher, got) < 1e-6


def test_a_table_of_zeros():
    got = tfwsvd(torch.zeros(V, H), R, fisher=torch.rand(V, H), **FEW)
    assert not (got.codes @ got.basis).any()


def test_weights_that_cannot_be_used_are_refused():
    table = embeddings(V, H)
    with pytest.raises(ValueError, match=r"fisher: method 'tfwsvd' expected weights \(300, 24\), got none"):
        tfwsvd(table, R)
    with pytest.raises(ValueError, match=r"fisher: method 'fwsvd' expected weights \(300, 24\) or \(300,\)"):
        fwsvd(table, R)
    with pytest.raises(ValueError, match=r"fisher: expected shape \(300, 24\), as the table, got \(300,\)"):
        tfwsvd(table, R, fisher=torch.rand(V))
    with pytest.raises(TypeError, match="fisher: expected a floating-point dtype, got torch.int64"):
        tfwsvd(table, R, fisher=torch.ones(V, H, dtype=torch.int64))
    with pytest.raises(TypeError, match="fisher: expected a tensor .* got list"):
        fwsvd(table, R, fisher=[1.0] * V)
    for bad in (-1.0, float("nan"), float("inf")):
        fisher = torch.rand(V, H)
        fisher[7, 3] = bad
        with pytest.raises(ValueError, match="fisher: expected finite weights of at least 0"):
            tfwsvd(table, R, fisher=fisher)
    with pytest.raises(ValueError, match="fisher: expected one above 0, got none"):
        tfwsvd(table, R, fisher=torch.zeros(V, H))
    with pytest.raises(ValueError, match="rank"):
        tfwsvd(table, H + 1, fisher=torch.rand(V, H))
    with pytest.raises(ValueError, match="tfwsvd: lr: .*greater than 0"):
        tfwsvd(table, R, fisher=torch.rand(V, H), lr=0)


def test_row_fisher_sums_entries_and_smooths():
    fisher = torch.rand(V, H)
    rows = fisher.double().sum(1)
    assert_close(row_fisher(fisher, 0.5), rows + 0.5 * rows.mean())
    assert_close(row_fisher(rows, 0.5), rows + 0.5 * rows.mean())
