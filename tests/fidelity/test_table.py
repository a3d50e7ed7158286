"""``compare_tables``: every figure against its formula on small tables."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from embkern import Factors
from embkern.fidelity import compare_tables
from embkern.text.token_names import TokenName
from tests.example_tables import packed_of


def test_figures_follow_their_formulas():
    table = torch.randn(300, 8)
    rebuilt = table + 0.3 * torch.randn(300, 8)
    got = compare_tables(table, rebuilt, worst=3)
    error = 1 - F.cosine_similarity(table.double(), rebuilt.double())
    assert got.direction_error == pytest.approx(float(error.mean()))
    assert got.direction_error_p99 == pytest.approx(float(error.sort().values[296]))
    assert got.rmse == pytest.approx(float((table - rebuilt).double().square().mean().sqrt()))
    assert [row.id for row in got.worst_rows] == error.argsort(descending=True)[:3].tolist()
    assert got.worst_rows[0].direction_error == pytest.approx(float(error.max()))


def test_a_perfect_copy_has_no_error_even_scaled():
    table = torch.randn(50, 6)
    same, scaled = compare_tables(table, table), compare_tables(table, 3 * table)
    assert same.rmse == 0.0
    assert scaled.rmse > 1
    for each in (same, scaled):
        assert each.direction_error == pytest.approx(0, abs=1e-12)
        assert each.neighbor_overlap == 1.0


def test_unrelated_tables_share_few_neighbours():
    overlap = compare_tables(torch.randn(400, 8), torch.randn(400, 8)).neighbor_overlap
    assert overlap < 0.1


def test_neighbours_are_counted():
    angles = torch.tensor([0.0, 0.1, 0.25, 3.0, 3.1])
    table = torch.stack([angles.cos(), angles.sin()], 1)
    moved = table.clone()
    moved[1] = -table[1]  # row 1 is now nearest to rows 3 and 4
    got = compare_tables(table, moved, neighbors=1, sampled_rows=5)
    before, after = [1, 0, 1, 4, 3], [2, 4, 0, 4, 3]
    assert got.neighbor_overlap == pytest.approx(sum(a == b for a, b in zip(before, after, strict=True)) / 5)


def test_counts_weigh_the_direction_error():
    table, rebuilt = torch.eye(4)[:3], torch.eye(4)[:3].clone()
    rebuilt[1] = torch.tensor([1.0, 0, 0, 0])
    assert compare_tables(table, rebuilt).weighted_direction_error is None
    for counts, expected in (([6, 3, 1], 0.3), ([0, 1, 0], 1.0), ([1, 1, 1], 1 / 3)):
        got = compare_tables(table, rebuilt, counts=torch.tensor(counts).double())
        assert got.weighted_direction_error == pytest.approx(expected)
        assert got.direction_error == pytest.approx(1 / 3)
    for counts in ([1, 1], [0, 0, 0]):
        with pytest.raises(ValueError, match=r"counts: expected shape \(3,\) and a positive sum"):
            compare_tables(table, rebuilt, counts=torch.tensor(counts).double())


def test_packed_tables():
    table = torch.randn(60, 40)
    packed = packed_of(table)
    assert compare_tables(table, packed) == compare_tables(table, packed.to_dense())


def test_zero_rows():
    table, rebuilt = torch.ones(3, 4), torch.ones(3, 4)
    table[0] = rebuilt[0] = 0
    rebuilt[1] = 0
    assert compare_tables(table, rebuilt).direction_error == pytest.approx((0 + 1 + 0) / 3)


def test_tokens_of_the_worst_rows_and_tiny_tables():
    table = torch.randn(2, 3)
    factors = Factors(table, torch.eye(3))
    got = compare_tables(table, factors, tokens=lambda ids: [TokenName(f"<{i}>") for i in ids])
    assert {row.token for row in got.worst_rows} == {"<0>", "<1>"}
    assert compare_tables(table[:1], table[:1]).neighbor_overlap == 1.0


def test_shapes_must_agree():
    with pytest.raises(ValueError, match=r"reconstruction: expected shape \(3, 4\), got \(3, 5\)"):
        compare_tables(torch.zeros(3, 4), torch.zeros(3, 5))
