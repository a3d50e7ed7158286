"""``allocate`` with ``unseen``: rows that are not read take no bytes, and get their mean or a nearest row."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch.testing import assert_close

from embkern.io.mapped_table import TableFile
from embkern.methods import allocate
from embkern.methods.metric_allocation import input_frequencies
from embkern.tables import PackedTable, PrunedPackedTable
from tests.methods.tables import anisotropic
from tests.methods.test_metric_allocation import calibration

V, H = 1500, 64


def counts_of(every: int = 4) -> torch.Tensor:
    """Return counts (V,) of which one in ``every`` is above zero."""
    counts = 1 / torch.arange(1, V + 1, dtype=torch.float64)
    return counts.where(torch.arange(V) % every == 1, 0.0)


@pytest.mark.parametrize("unseen", ["mean", "nearest"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_rows_that_are_not_read_take_no_bytes(unseen, dtype):
    table, counts = anisotropic(V, H, dtype), counts_of()
    read, ratio = counts > 0, 24 / (4 / dtype.itemsize)
    got = allocate(table, ratio=ratio, counts=counts, unseen=unseen)
    got.validate()
    kept = int(read.sum())
    assert isinstance(got, PrunedPackedTable)
    assert got.facts == {"kept": kept, "unseen": V - kept, "unknown": unseen}
    assert torch.equal(got.kept_ids.long(), read.nonzero().flatten())
    assert 0.97 * table.nbytes / ratio <= got.nbytes <= table.nbytes / ratio
    of_map = 4 * kept + (2 * H if unseen == "mean" else 4 * (V - kept))
    assert got.nbytes == got.packed.nbytes + of_map
    dense, exact = got.to(torch.float64).to_dense(), table.double()
    if unseen == "mean":
        mean = exact[~read].mean(0)
        assert_close(dense[~read], mean.expand(V - kept, H), atol=2**-7 * float(mean.abs().max()), rtol=0)
    else:
        nearest = (F.normalize(exact[~read]) @ F.normalize(exact[read]).t()).argmax(1)
        assert_close(dense[~read], dense[read][nearest])
    both = [allocate(table, ratio=ratio / 2, counts=counts, unseen=each) for each in (unseen, "allocate")]
    cosines = [F.cosine_similarity(exact, each.to(torch.float64).to_dense())[read].mean() for each in both]
    assert cosines[0] > cosines[1]


def test_the_mean_is_weighted_by_frequencies_that_are_not_counts():
    table, read = anisotropic(V, H), counts_of() > 0
    frequencies = torch.rand(V, dtype=torch.float64)
    got = allocate(table, ratio=20, counts=frequencies, read=read, unseen="mean")
    weights = frequencies[~read] / frequencies[~read].sum()
    assert_close(got.mean_row, (weights @ table[~read].double()).half(), atol=1e-3, rtol=1e-3)


def test_the_default_is_as_without_the_option_also_where_every_row_is_read():
    table, counts = anisotropic(V, H), counts_of() + 1e-6
    plain = allocate(table, ratio=12, counts=counts)
    for options in (
        {"unseen": "allocate"},
        {"unseen": "allocate", "read": counts_of() > 0},
        {"unseen": "mean"},
    ):
        got = allocate(table, ratio=12, counts=counts, **options)
        assert type(got) is PackedTable
        assert all(torch.equal(each, got.tensors()[name]) for name, each in plain.tensors().items())


def test_a_calibration_says_what_is_read_where_nothing_else_does():
    table, measured = anisotropic(700, 64), calibration()
    inputs = measured.inputs.where(torch.arange(700) % 3 == 0, 0.0)
    measured = calibration(inputs=inputs)
    got = allocate(table, ratio=40, calibration=measured, unseen="mean")
    assert got.kept_ids.tolist() == list(range(0, 700, 3))
    weights = input_frequencies(measured)[inputs == 0]
    assert_close(
        got.mean_row, (weights @ table[inputs == 0].double() / weights.sum()).half(), atol=1e-3, rtol=0
    )
    counts = torch.zeros(700)
    counts[5:25] = 1
    assert allocate(table, ratio=40, calibration=measured, counts=counts, unseen="mean").kept == 20


def test_a_table_in_a_file_gives_the_same_bits(tmp_path):
    table, counts = anisotropic(V, H, torch.float16), counts_of()
    save_file({"table": table}, tmp_path / "table.safetensors")
    for unseen in ("mean", "nearest"):
        options = {"ratio": 10, "counts": counts, "unseen": unseen}
        first, second = (
            allocate(table, **options),
            allocate(TableFile(tmp_path / "table.safetensors", "table"), **options),
        )
        assert all(torch.equal(each, second.tensors()[name]) for name, each in first.tensors().items())


def test_what_cannot_be_is_refused_and_the_highest_ratio_that_is_named_works():
    table, counts = anisotropic(V, H), counts_of()
    with pytest.raises(
        ValueError, match=r"unseen: expected counts of text .* or a calibration on text, .* got neither"
    ):
        allocate(table, ratio=20, unseen="mean")
    with pytest.raises(ValueError, match="unseen: .*'mean' or 'nearest', got 'zero'"):
        allocate(table, ratio=20, counts=counts, unseen="zero")
    with pytest.raises(ValueError, match=r"counts: expected shape \(1500,\), one per row, got \(7,\)"):
        allocate(table, ratio=20, counts=torch.ones(7), unseen="mean")
    with pytest.raises(
        ValueError, match=r"read: expected shape \(1500,\) of bool, got \(1500,\) of torch.float64"
    ):
        allocate(table, ratio=20, counts=counts, read=counts, unseen="mean")
    with pytest.raises(ValueError, match="read: expected a row that is read, got none"):
        allocate(table, ratio=20, counts=counts, read=counts < 0, unseen="mean")
    for unseen in ("mean", "nearest"):
        with pytest.raises(
            ValueError, match="ratio: 1e.06 leaves no room for .* highest that fits"
        ) as refused:
            allocate(table, ratio=1e6, counts=counts, unseen=unseen)
        highest = float(str(refused.value).rsplit(" ", 1)[-1])
        got = allocate(table, ratio=highest, counts=counts, unseen=unseen)
        assert got.nbytes <= table.nbytes / highest


def test_a_floor_is_that_of_the_rows_that_are_read():
    table, counts = anisotropic(V, H), counts_of()
    got = allocate(table, ratio=30, counts=counts, unseen="mean", floor=0.7)
    cosines = F.cosine_similarity(table.double(), got.to(torch.float64).to_dense())
    assert cosines[counts > 0].min() >= 0.7
