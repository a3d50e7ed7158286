"""``shared_tensor_trains``: one central core, exact where the tables have one, and never past the bytes."""

from __future__ import annotations

import math

import pytest
import torch
from torch.testing import assert_close

from embkern.methods import joint_bytes, shared_tensor_trains, tensor_train
from tests.methods.row_tables import dense


def related(*sizes, H=24):
    """Tables whose rows lie near the rows of one small table."""
    base = torch.randn(60, H)
    return [torch.randn(V, 60) @ base / 8 + 0.3 * torch.randn(V, H) for V in sizes]


def error(tables, made):
    """The sum of the squared errors over that of the squares."""
    errors = sum(float((a - dense(b)).square().sum()) for a, b in zip(tables, made, strict=True))
    return errors / sum(float(a.square().sum()) for a in tables)


@pytest.mark.parametrize("scales", [False, True])
@pytest.mark.parametrize("ratio", [2, 5])
def test_one_core_is_shared_and_counted_once(scales, ratio):
    tables = related(1000, 300)
    made = shared_tensor_trains(tables, ratio=ratio, scales=scales)
    assert made[0].core_2 is made[1].core_2
    before, bytes_of_all = sum(each.nbytes for each in tables), joint_bytes(made)
    assert bytes_of_all == sum(each.nbytes for each in made) - made[0].core_2.nbytes
    assert 0.9 * before / ratio < bytes_of_all <= before / ratio
    for table, each in zip(tables, made, strict=True):
        each.validate()
        assert each.to_dense().shape == table.shape
        assert (each.rows[1], each.columns[1]) == (made[0].rows[1], made[0].columns[1])
    assert error(tables, made) < 1


def test_tables_that_have_a_core_in_common_are_exact():
    core = torch.randn(3, 10 * 3, 2).double()
    tables = []
    for V in (1000, 320):  # factors 10, 10, 10 and 4, 10, 8 of the rows, 4, 3, 2 of the columns
        v1, v3 = (10, 10) if V == 1000 else (4, 8)
        first, last = torch.randn(v1 * 4, 3).double(), torch.randn(2, v3 * 2).double()
        whole = torch.einsum("ar,rbs,sc->abc", first, core, last)
        whole = whole.view(v1, 4, 10, 3, v3, 2).permute(0, 2, 4, 1, 3, 5)
        tables.append(whole.reshape(V, 24))
    made = shared_tensor_trains(tables, ratio=3, scales=False)
    assert [each.rows for each in made] == [[10, 10, 10], [4, 10, 8]]
    assert made[0].columns == [4, 3, 2]
    assert error(tables, made) < 1e-4


def test_sharing_pays_where_tables_are_alike_and_one_table_is_as_good_as_alone():
    (table,) = related(1000)
    twins = [table, table.clone()]
    shared = shared_tensor_trains(twins, ratio=4, scales=False)
    alone = [tensor_train(each, ratio=4, scales=False) for each in twins]
    assert joint_bytes(shared) <= sum(each.nbytes for each in twins) / 4
    assert error(twins, shared) < error(twins, alone)
    (single,) = shared_tensor_trains([table], ratio=4, scales=False)
    assert error([table], [single]) <= error([table], [alone[0]]) * (1 + 1e-4)


def test_widths_may_differ_and_ratios_too():
    tables = [*related(500, H=24), *related(200, H=18)]
    made = shared_tensor_trains(tables, ratio=[2, 4], scales=False)
    assert [math.prod(each.columns) for each in made] == [24, 18]
    assert made[0].columns[1] == made[1].columns[1]
    assert joint_bytes(made) <= tables[0].nbytes / 2 + tables[1].nbytes / 4
    assert shared_tensor_trains([each.bfloat16() for each in tables], ratio=3)[0].dtype == torch.bfloat16


def test_the_same_tables_give_the_same_bits():
    tables = related(300, 100)
    first, second = (shared_tensor_trains(tables, ratio=3) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert all(torch.equal(b.tensors()[name], tensor) for name, tensor in a.tensors().items())


def test_zero_tables_and_gradients_through_the_shared_core():
    tables = [torch.zeros(100, 6), torch.randn(90, 6)]
    made = shared_tensor_trains(tables, ratio=2, scales=False)
    assert_close(made[0].to_dense(), tables[0])
    assert error(tables, made) < 1
    core = made[0].core_2.requires_grad_()
    sum(each.decode(torch.tensor([3, 5])).sum() for each in made).backward()
    assert core.grad is not None


def test_what_is_refused():
    tables = related(100, 50, H=6)
    for options, message in [
        ({"ratio": 2, "cores": 2}, "expected three cores"),
        ({"ratio": 2, "rows": [5, 5, 5]}, "expected three cores of automatic shapes"),
        ({"ratio": [2, 3, 4]}, "ratio: expected one number or 2, one for each table, got 3"),
        ({"ratio": 0.5}, "ratio: expected at least 1"),
        ({"ratio": 300}, r"leaves no room for rank 1; the highest that fits all is \d+"),
    ]:
        with pytest.raises(ValueError, match=message):
            shared_tensor_trains(tables, **options)
    with pytest.raises(ValueError, match="tables: expected at least one"):
        shared_tensor_trains([], ratio=2)
    with pytest.raises(TypeError, match="tables: expected one dtype and device"):
        shared_tensor_trains([tables[0], tables[1].double()], ratio=2)
