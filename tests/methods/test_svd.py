"""SVD and PCA against ``torch.linalg.svd``, and wrong arguments."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from embkern.methods import svd


def best(table, rank):
    U, S, Vh = torch.linalg.svd(table.double(), full_matrices=False)
    return (U[:, :rank] * S[:rank]) @ Vh[:rank]


@pytest.mark.parametrize("shape", [(40, 9), (9, 40), (1, 5), (5, 1), (9000, 16)], ids=str)
@pytest.mark.parametrize("algorithm", ["exact", "randomized"])
def test_it_is_the_best_approximation(shape, algorithm):
    table = torch.randn(shape, dtype=torch.float64) * torch.logspace(0, -2, shape[1], dtype=torch.float64)
    for rank in {1, (min(shape) + 1) // 2, min(shape)}:
        got = svd(table, rank, algorithm=algorithm).to_dense()
        error, least = (got - table).norm(), (best(table, rank) - table).norm()
        assert error <= least * (1 + 1e-3) + 1e-5 * table.norm()


@pytest.mark.parametrize("algorithm", ["exact", "randomized"])
def test_pca_subtracts_the_mean_and_keeps_it(algorithm):
    table = torch.randn(50, 8) + 10 * torch.arange(8)
    factors = svd(table, 3, center=True, algorithm=algorithm)
    assert_close(factors.offset, table.mean(0))
    assert_close(
        factors.to_dense().double(),
        best(table - table.mean(0), 3) + table.mean(0).double(),
        atol=1e-3,
        rtol=0,
    )


def test_full_rank_is_exact_and_codes_are_ordered_by_energy():
    table = torch.randn(30, 7)
    factors = svd(table, 7)
    assert_close(factors.to_dense(), table)
    energy = factors.codes.square().sum(0)
    assert torch.equal(energy.sort(descending=True).values, energy)
    assert_close(factors.basis @ factors.basis.t(), torch.eye(7))


@pytest.mark.parametrize("rank", [3, 5])
@pytest.mark.parametrize("algorithm", ["exact", "randomized"])
def test_a_rank_above_the_number_of_rows_is_exact(rank, algorithm):
    table = torch.randn(3, 5)
    factors = svd(table, rank, algorithm=algorithm)
    assert factors.rank == rank
    assert_close(factors.to_dense(), table, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_the_dtype_is_kept(dtype):
    factors = svd(torch.randn(20, 6).to(dtype), 6, center=True)
    assert {tensor.dtype for tensor in factors.tensors().values()} == {dtype}


def test_the_same_seed_gives_the_same_bits_and_the_global_generator_is_left_alone():
    table = torch.randn(60, 12)
    state = torch.get_rng_state()
    first, second = (svd(table, 4, algorithm="randomized", n_iter=1, seed=7) for _ in range(2))
    assert torch.equal(first.codes, second.codes)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(first.codes, svd(table, 4, algorithm="randomized", n_iter=1, seed=8).codes)


def test_a_parameter_leaves_no_graph_behind():
    assert not svd(torch.nn.Parameter(torch.randn(20, 6)), 3).codes.requires_grad


def test_zero_rows_stay_zero_and_a_table_of_zeros_works():
    table = torch.randn(10, 4)
    table[3] = 0
    assert not svd(table, 2).to_dense()[3].any()
    assert not svd(torch.zeros(6, 4), 2).to_dense().any()


@pytest.mark.parametrize(
    ("table", "rank", "options", "error", "message"),
    [
        (torch.zeros(5, 4), 0, {}, ValueError, "rank: expected 1 <= rank <= H = 4, got 0"),
        (torch.zeros(5, 4), -1, {}, ValueError, "got -1"),
        (torch.zeros(5, 4), 5, {}, ValueError, "got 5"),
        (torch.zeros(5), 1, {}, ValueError, r"table: expected shape \(V, H\)"),
        (torch.zeros(0, 4), 1, {}, ValueError, r"V, H >= 1, got \(0, 4\)"),
        (torch.zeros(5, 4).int(), 1, {}, TypeError, "table: expected a floating-point dtype"),
        (torch.tensor([[1.0], [float("nan")], [float("inf")]]), 1, {}, ValueError, "in 2 row.s.: 1, 2"),
        (torch.zeros(5, 4), 1, {"algorithm": "fast"}, ValueError, "svd: algorithm: .*got 'fast'"),
        (torch.zeros(5, 4), 1, {"n_iter": -1}, ValueError, "svd: n_iter: .* got -1"),
        (torch.zeros(5, 4), 1, {"epochs": 3}, ValueError, "svd: epochs: Extra inputs .*known: center"),
    ],
)
def test_bad_arguments_are_named(table, rank, options, error, message):
    with pytest.raises(error, match=message):
        svd(table, rank, **options)
