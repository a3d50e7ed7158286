"""``vocabulary_pruning``: kept rows are exact, and the others share their mean."""

from __future__ import annotations

import torch
from torch.testing import assert_close

from embkern.rivals.pruning import vocabulary_pruning


def test_kept_rows_are_exact_and_the_others_are_the_weighted_mean():
    table, counts = torch.randn(50, 8), torch.arange(50.0).double().flip(0)
    counts[10] = 1000
    got = vocabulary_pruning(table, ratio=4, counts=counts)
    kept = got.facts["kept"]
    assert got.parts == {"rows": kept * 32, "mean": 32, "bitmap": 7}
    assert got.nbytes + 32 > table.nbytes / 4
    assert kept == 11
    assert torch.equal(got.to_dense()[:11], table[:11])
    others = counts[11:, None] * table[11:].double()
    mean = (others.sum(0) / counts[11:].sum()).float()
    assert_close(got.to_dense()[11:], mean.expand(39, 8))


def test_all_rows_kept_are_exact():
    table = torch.randn(50, 8)
    got = vocabulary_pruning(table, ratio=1)
    assert torch.equal(got.to_dense(), table)
    assert got.parts == {"rows": table.nbytes}
    assert torch.equal(vocabulary_pruning(table, ratio=2, storage="float16").to_dense(), table.half().float())
