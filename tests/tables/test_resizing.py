"""resized: old rows keep their bits, new ones decode to the mean row, no unused records remain."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch.testing import assert_close

from embkern import Factors
from embkern.ops.packed_format import Tier
from embkern.tables.packed import PackedTable, pack
from embkern.tables.resizing import resized
from tests.example_tables import packed_of


@pytest.mark.parametrize("offset", [True, False])
@pytest.mark.parametrize(("rows", "width"), [(101, 32), (64, 16), (7, 33), (1, 5)])
@pytest.mark.parametrize("size", [1, 31, 32, 33, 64, 65, 200])
def test_packed_tables(rows, width, size, offset):
    table = packed_of(torch.randn(rows, width) + 0.2, torch.float32, offset)
    before = table.to_dense()
    other = resized(table, size)
    after, kept = other.to_dense(), min(size, rows)
    assert after.shape == (size, width)
    assert torch.equal(after[:kept], before[:kept])
    for name in ("tiers", "levels", "basis", "offset"):
        assert getattr(other, name) is getattr(table, name)
    words = torch.tensor([tier.words for tier in other.described_tiers()])[other.tier_of_rows()].sum()
    assert len(other.records) == words
    if size > rows:
        mean = before.double().mean(0)
        assert (after[rows:].double() - mean).norm(dim=1).max() <= 0.02 * mean.norm()
    else:
        again = resized(other, rows)
        assert torch.equal(again.to_dense()[:kept], before[:kept])


def test_the_mean_of_a_narrow_dtype_and_of_zeros():
    table = packed_of(torch.randn(40, 8), torch.bfloat16, offset=False)
    table = dataclasses.replace(table, scales=torch.zeros_like(table.scales))
    other = resized(table, 43)
    assert other.dtype == torch.bfloat16
    assert not other.to_dense()[40:].any()


def test_a_table_whose_rows_have_no_bits():
    levels = torch.zeros(17, 16, dtype=torch.int8)
    tiers = [Tier(False, (0,))]
    table = pack(torch.zeros(3).long(), {}, tiers, levels, torch.zeros(3), None, torch.arange(4.0), 4)
    assert_close(resized(table, 5).to_dense(), torch.arange(4.0).expand(5, 4))
    assert resized(table, 2).num_embeddings == 2


def test_factors():
    table = Factors(torch.randn(7, 3), torch.randn(3, 5), torch.randn(5))
    assert torch.equal(resized(table, 4).to_dense(), table.to_dense()[:4])
    grown = resized(table, 9)
    assert torch.equal(grown.codes[:7], table.codes)
    assert_close(grown.to_dense()[7:], table.to_dense().mean(0).expand(2, -1))
    assert grown.basis is table.basis


def test_facts_are_kept_and_other_tables_refused():
    table = dataclasses.replace(packed_of(torch.randn(4, 8)), facts={"floor": 0.5})
    assert resized(table, 2).facts == {"floor": 0.5}
    assert isinstance(resized(table, 2), PackedTable)
    with pytest.raises(TypeError, match="table: expected a compressed table, got Tensor"):
        resized(torch.zeros(3, 4), 2)
