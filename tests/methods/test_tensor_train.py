"""``tensor_train``: tables that it represents exactly, and the padding of rows."""

from __future__ import annotations

import math

import pytest
import torch
from torch.testing import assert_close

from embkern.methods.tensor_train import tensor_train
from tests.methods.row_tables import dense


@pytest.mark.parametrize("cores", [2, 3])
def test_a_table_of_rank_one_is_exact(cores):
    V, H = (4, 6), (3, 2)  # the factors of 24 rows and 6 columns
    if cores == 3:
        V, H = (2, 3, 4), (3, 2, 1)
    table = torch.ones(1, 1)
    for v, h in zip(V, H, strict=True):
        table = torch.kron(table, torch.randn(v, h))
    got = tensor_train(table, ratio=2, cores=cores)
    assert_close(dense(got), table, rtol=2**-10, atol=1e-6)  # scales are fp16
    got = tensor_train(table, ratio=4, cores=cores, scales=False)
    assert (tuple(got.facts["rows"]), tuple(got.facts["columns"])) == (V, H)
    assert_close(dense(got), table, rtol=1e-5, atol=1e-6)


def test_full_ranks_are_exact_and_two_cores_are_an_svd():
    table = torch.randn(16, 9).double()
    got = tensor_train(table, ratio=1, cores=2, scales=False)
    assert got.facts["rows"] == [4, 4]
    assert got.facts["columns"] == [3, 3]
    matrix = table.view(4, 4, 3, 3).permute(0, 2, 1, 3).reshape(12, 12)
    rank = got.facts["ranks"][0]
    left, values, right = torch.linalg.svd(matrix)
    best = (left[:, :rank] * values[:rank]) @ right[:rank]
    assert float((dense(got) - table).norm()) == pytest.approx(float((best - matrix).norm()), rel=1e-5)
    assert got.nbytes == 8 * rank * 24

    low = torch.kron(torch.randn(2, 3), torch.randn(3, 2)) + torch.kron(torch.randn(2, 3), torch.randn(3, 2))
    table = torch.kron(low, torch.randn(4, 1))  # ranks 2 and 1
    assert_close(dense(tensor_train(table, ratio=1.5, scales=False)), table, rtol=1e-5, atol=1e-5)


def test_rows_that_do_not_factorise_are_padded():
    got = tensor_train(torch.randn(30522 // 64 + 1, 13), ratio=2)
    assert math.prod(got.facts["rows"]) >= 477
    assert math.prod(got.facts["rows"]) <= 1.1 * 477
    assert sorted(got.facts["columns"]) == [1, 1, 13]
    assert dense(got).shape == (477, 13)
