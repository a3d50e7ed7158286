"""``RateSearch``: the choice of tiers against all choices of a table of a few rows."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from embkern.methods import rate_search
from embkern.methods.rate_search import RateSearch
from embkern.methods.row_floor import RowFloor
from embkern.ops.packed_format import Tier

TIERS = [Tier(False, (bits,)) for bits in (1, 2, 4, 8)]  # 4, 8, 16 and 32 bytes a row
V = 6


def no_shared_bytes(tiers: list[Tier]) -> int:
    return 0


@pytest.fixture
def errors() -> torch.Tensor:
    """Errors (T, V) that fall with the bits, by another amount for every row."""
    return torch.rand(len(TIERS), V, dtype=torch.float64).sort(dim=0, descending=True).values


@pytest.mark.parametrize("budget", [4 * V, 60, 100, 32 * V])
def test_no_other_choice_of_as_many_bytes_has_less_error(errors, budget):
    weights = torch.rand(V, dtype=torch.float64) + 0.1
    search = RateSearch(errors * weights, TIERS, no_shared_bytes)
    found = search.within(budget, len(TIERS))
    assert found is not None
    kept, choice = found
    size = torch.tensor([4 * tier.words for tier in TIERS])
    chosen = torch.tensor(kept)[choice]
    spent = int(size[chosen].sum())
    assert spent <= budget
    every = torch.tensor(list(itertools.product(range(len(TIERS)), repeat=V)))
    costs = (errors[every, torch.arange(V)] * weights).sum(1)
    cost = float((errors[chosen, torch.arange(V)] * weights).sum())
    # Sums of V products in another order.
    assert search.cost_of(kept, choice) == pytest.approx(cost, rel=1e-14)
    # A choice that minimises the Lagrangian is optimal for its own bytes; the price is exact to 1e-5.
    assert cost <= float(costs[size[every].sum(1) <= spent].min()) * (1 + 1e-4)


def test_the_smallest_and_the_largest_choice_are_reached(errors):
    search = RateSearch(errors, TIERS, no_shared_bytes)
    assert search.least_bytes() == 4 * V
    assert search.within(4 * V - 1, 4) is None
    for budget, tier in ((4 * V, 0), (32 * V, 3)):
        kept, choice = search.within(budget, 4)
        assert kept == [tier]
        assert not choice.any()


def test_no_more_tiers_are_kept_than_asked_for(errors):
    search = RateSearch(errors, TIERS, no_shared_bytes)
    for most in (1, 2, 3):
        kept, choice = search.within(70, most)
        assert len(kept) <= most
        assert sum(4 * TIERS[kept[position]].words for position in choice.tolist()) <= 70


def test_bytes_that_rows_share_are_part_of_the_budget(errors):
    search = RateSearch(errors, TIERS, lambda tiers: 10 * len(tiers))
    kept, choice = search.within(80, 4)
    assert sum(4 * TIERS[kept[position]].words for position in choice.tolist()) + 10 * len(kept) <= 80
    assert search.least_bytes() == 4 * V + 10 * len(TIERS)


class Measured:
    """The rows of an allocation whose cosines are known, and which of them have been asked for."""

    def __init__(self, cosines: torch.Tensor) -> None:
        self.known, self.tiers, self.asked = cosines, TIERS, torch.zeros_like(cosines)

    def cosines(self, index: int, ids: torch.Tensor) -> torch.Tensor:
        self.asked[index, ids] += 1
        return self.known[index, ids]


def test_a_floor_excludes_tiers_row_by_row():
    errors = torch.tensor([[0.5, 0.3, 0.2, 0.1]] * (V - 1) + [[0.9, 0.6, 0.4, 0.05]], dtype=torch.float64).t()
    rows, costs = Measured(1 - errors), errors.clone()
    floor, search = RowFloor(rows, 0.5, costs), RateSearch(costs, TIERS, no_shared_bytes)
    while not floor.holds(*(found := search.within(4 * (V - 1) + 16, 4))):
        pass
    kept, choice = found
    assert [kept[position] for position in choice.tolist()] == [0] * (V - 1) + [2]
    assert rows.asked.max() == 1
    assert rows.asked[3].sum() == 0, "a tier that is not chosen is not measured"
    with pytest.raises(ValueError, match=r"floor: expected at most 0.9, the worst row's cosine .* got 0.99"):
        RowFloor(rows, 0.99, errors.clone()).holds([3], torch.zeros(V, dtype=torch.int64))


@pytest.mark.parametrize("factor", [0.1, 1.0, 10.0])
def test_a_floor_holds_however_wrong_the_estimates_are(errors, factor):
    true = (errors * factor ** torch.rand(len(TIERS), V)).clamp(max=0.9)
    true[3] = 0.01
    rows, costs = Measured(1 - true), errors.clone()
    floor, search = RowFloor(rows, 0.7, costs), RateSearch(costs, TIERS, no_shared_bytes)
    while not floor.holds(*(found := search.within(32 * V, 4))):
        pass
    kept, choice = found
    chosen = torch.tensor(kept)[choice]
    assert (true[chosen, torch.arange(V)] <= 0.3).all()


@pytest.mark.parametrize("most", [1, 2, 4])
def test_the_size_of_the_blocks_does_not_change_the_choice(monkeypatch, most):
    """Rows of equal costs, whose upgrades gain alike, are in several blocks."""
    errors = torch.rand(len(TIERS), 40, dtype=torch.float64).sort(dim=0, descending=True).values
    errors[:, 7::3] = errors[:, 4:5]
    errors[0, ::5] = math.inf
    search, budget = RateSearch(errors, TIERS, lambda tiers: 10 * len(tiers)), 700
    found = []
    for rows in (3, 1 << 14):
        monkeypatch.setattr(rate_search, "_ROWS", rows)
        kept, choice = search.within(budget, most)
        smallest = search.smallest(list(range(len(TIERS))))
        found.append((kept, choice.tolist(), smallest.tolist(), search.cost_of(kept, choice)))
    assert found[0] == found[1]
