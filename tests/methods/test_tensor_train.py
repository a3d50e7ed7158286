"""``tensor_train``: tables that it represents exactly, shapes, the padding of rows, and gradients."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch.testing import assert_close

from embkern.methods.tensor_train import TensorTrainOptions, shape_of, tensor_train
from embkern.nn import TableEmbedding
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


@pytest.mark.parametrize(
    ("V", "H", "cores", "rows", "columns"),
    [
        (30522, 384, 3, [29, 31, 34], [8, 8, 6]),
        (250002, 768, 3, [63, 63, 63], [12, 8, 8]),
        (30522, 768, 2, [165, 185], [32, 24]),
        (50257, 768, 3, [34, 37, 40], [12, 8, 8]),
    ],
)
def test_automatic_shapes_are_balanced_and_pad_little(V, H, cores, rows, columns):
    chosen = TensorTrainOptions(cores=cores)
    assert shape_of(V, H, chosen) == (rows, columns)
    assert V <= math.prod(rows) < 1.01 * V
    assert math.prod(columns) == H
    # Of rank 1 the cores are a few hundred values: nearly every ratio can be reached.
    assert sum(v * h for v, h in zip(rows, columns, strict=True)) < V * H / 1000


def test_a_shape_can_be_given():
    table = torch.randn(100, 12)
    got = tensor_train(table, ratio=2, rows=[4, 5, 6], columns=[2, 2, 3])
    assert (got.rows, got.columns) == ([4, 5, 6], [2, 2, 3])
    assert got.nbytes <= table.nbytes / 2
    for options, message in [
        ({"rows": [4, 5]}, r"rows: expected 3 factors, one per core, got \[4, 5\]"),
        ({"rows": [4, 5, 4]}, "rows: expected a product of at least V = 100"),
        ({"columns": [2, 2, 2]}, "columns: expected a product of H = 12"),
        ({"columns": [-2, -2, 3]}, "columns: expected 3 factors"),
    ]:
        with pytest.raises(ValueError, match=message):
            tensor_train(table, ratio=2, **options)


@pytest.mark.parametrize(("V", "H"), [(30522, 24), (250002, 12)])
def test_large_vocabularies_are_compressed_to_the_ratio(V, H):
    table = torch.randn(V, H)
    for ratio in (4, 30):
        got = tensor_train(table, ratio=ratio, scales=False)
        assert 0.9 * table.nbytes / ratio < got.nbytes <= table.nbytes / ratio
        ids = torch.tensor([0, 1, V // 2, V - 1])
        assert_close(got.decode(ids), torch.cat([got.row_range(i, i + 1) for i in ids.tolist()]))


def test_gradients_flow_through_the_cores():
    made = tensor_train(torch.randn(30, 8).double(), ratio=1.5)
    names = ("core_1", "core_2", "core_3", "scales")
    ids = torch.tensor([3, 29, 3, 0])

    def decoded(*tensors):
        return dataclasses.replace(made, **dict(zip(names, tensors, strict=True)), check=False).decode(ids)

    assert torch.autograd.gradcheck(decoded, [getattr(made, name).requires_grad_() for name in names])


def test_fine_tuning_the_cores_lowers_a_weighted_error():
    """TT-SVD weighs all rows alike; steps on frequent rows fit these better, and no id stops the gradient."""
    table = torch.randn(200, 12)
    layer = TableEmbedding(tensor_train(table, ratio=3, scales=False))
    frequent = torch.arange(20)

    def loss():
        return (layer(frequent) - table[frequent]).square().mean()

    before, optimizer = float(loss().detach()), torch.optim.Adam(layer.parameters(), lr=1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    assert float(loss().detach()) < 0.8 * before
