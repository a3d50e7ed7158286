"""``prune``: kept rows are exact, the others are what ``unknown`` says, and every byte counts."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from embkern.methods.pruning import prune


def test_kept_rows_are_exact_and_the_others_are_the_weighted_mean():
    table, counts = torch.randn(50, 8), torch.arange(50.0).double().flip(0)
    counts[10] = 1000
    got = prune(table, ratio=4, counts=counts)
    kept = got.facts["kept"]
    assert got.nbytes == kept * (32 + 4) + 32 <= table.nbytes / 4 < got.nbytes + 36
    assert kept == 10
    assert torch.equal(got.kept_ids, torch.tensor([*range(9), 10]).int())
    assert torch.equal(got.to_dense()[:9], table[:9])
    assert torch.equal(got.to_dense()[10], table[10])
    others = torch.tensor([9, *range(11, 50)])
    mean = (counts[others] @ table[others].double() / counts[others].sum()).float()
    assert_close(got.to_dense()[others], mean.expand(40, 8))


@pytest.mark.parametrize("unknown", ["mean", "nearest", "error"])
def test_without_a_ratio_the_rows_that_are_read_are_kept(unknown):
    table, read = torch.randn(400, 8), torch.arange(400) % 7 == 2
    got = prune(table, read=read, unknown=unknown)
    assert got.facts == {"kept": int(read.sum()), "unknown": unknown}
    dense = got.to_dense()
    assert torch.equal(dense[read], table[read])
    row, kept = 8 * 4, int(read.sum())
    assert got.nbytes == kept * (row + 4) + {"mean": row, "nearest": 4 * (400 - kept), "error": 0}[unknown]
    if unknown == "mean":
        assert_close(dense[~read], table[~read].mean(0).expand(400 - kept, 8))
    elif unknown == "error":
        assert not dense[~read].any()
    else:
        cosine = F.normalize(table[~read]) @ F.normalize(table[read]).t()
        assert torch.equal(dense[~read], table[read][cosine.argmax(1)])


@pytest.mark.parametrize("unknown", ["mean", "nearest", "error"])
def test_all_rows_kept_are_exact(unknown):
    table = torch.randn(50, 8)
    got = prune(table, read=torch.ones(50, dtype=torch.bool), unknown=unknown)
    assert torch.equal(got.to_dense(), table)
    halves = prune(table, ratio=1.5, storage="float16", unknown=unknown)
    assert halves.kept == 50
    assert torch.equal(halves.to(torch.float32).to_dense(), table.half().float())


def test_what_is_kept_must_be_known():
    table = torch.randn(50, 8)
    with pytest.raises(ValueError, match="prune: expected counts of text .* or a ratio, got neither"):
        prune(table)
    with pytest.raises(ValueError, match="read: expected a token that is read, got none"):
        prune(table, read=torch.zeros(50, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"read: expected shape \(50,\) of bool, got \(50,\) of torch.int64"):
        prune(table, read=torch.zeros(50).long())
    with pytest.raises(ValueError, match="prune: unknown: .*'nearest' or 'error', got 'zero'"):
        prune(table, ratio=2, unknown="zero")
