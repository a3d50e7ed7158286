"""The scales that are tried for trellis codes: one or two searches a row."""

from __future__ import annotations

import pytest
import torch

from embkern.methods import row_codes
from embkern.methods.row_codes import FINE_SCALES, TRELLIS_SCALES, RowCodes
from embkern.ops.packed_codes import GROUP
from embkern.ops.packed_format import Tier
from tests.conftest import seed_of


def error(rows: torch.Tensor, projections: torch.Tensor) -> float:
    """The mean squared error of directions."""
    return float((1 - (projections / rows.norm(dim=1)).square()).double().mean())


@pytest.mark.parametrize("bits", [(1,) * 12, (2,) * 12, (4, 3, *[2] * 7, 1, 1, 1), (3, *[1] * 11)], ids=str)
@pytest.mark.parametrize("outliers", [False, True])
def test_a_second_search_of_some_rows_is_as_good_as_two_of_all(bits, outliers):
    torch.manual_seed(seed_of(0))
    values, tier = torch.randn(96, 12 * GROUP), Tier(True, bits)
    if outliers:
        values[:, ::37] *= 6
    spread = torch.tensor(bits).repeat_interleave(GROUP).exp2()  # groups get their bits for their variances
    codes = RowCodes(spread / spread.max())
    scales = codes._scalar(tier, values, FINE_SCALES, False)[1]
    two = codes._trellis(tier, values, scales.unsqueeze(1) * torch.tensor(TRELLIS_SCALES))
    one = codes._trellis(tier, values, scales.unsqueeze(1))
    found = codes.encode(tier, values)
    assert bool((found[2] >= one[2]).all())  # what the second search finds is taken only where it is better
    rows = values * codes.spread
    assert error(rows, found[2]) < 1.01 * error(rows, two[2])


def test_rows_of_more_bits_are_searched_with_both_scales(monkeypatch):
    torch.manual_seed(seed_of(0))
    searched, search = [], row_codes.quantize_trellis
    monkeypatch.setattr(
        row_codes, "quantize_trellis", lambda *a, **k: searched.append(a[4].shape[1]) or search(*a, **k)
    )
    for bits, scales in (((4, *[2] * 7), 2), ((4, *[1] * 7), 1), ((2,) * 7, 2), ((3,) * 8, 2)):
        searched.clear()
        RowCodes(None).encode(Tier(True, bits), torch.randn(1, len(bits) * GROUP))
        assert searched[0] == scales, bits


def test_codes_and_scales_are_those_of_the_better_search(monkeypatch):
    torch.manual_seed(seed_of(0))
    values, tier = torch.randn(16, 8 * GROUP), Tier(False, (2,) * 8)
    codes = RowCodes(None)
    monkeypatch.setattr(row_codes, "_SURE_WITHIN", -1.0)  # every row is searched twice
    found = codes.encode(tier, values)
    scales = codes._scalar(tier, values, FINE_SCALES, False)[1].unsqueeze(1)
    first = codes._trellis(tier, values, scales)
    second = codes._trellis(tier, values, scales * (first[1].unsqueeze(1) / scales) ** 3)
    better = second[2] > first[2]
    assert 0 < int(better.sum()) < len(better)
    for each, one, other in zip(found, first, second, strict=True):
        assert torch.equal(each, torch.where(better.view(-1, *[1] * (each.dim() - 1)), other, one))


def test_rows_of_zeros():
    codes, scales, projections = RowCodes(None).encode(Tier(False, (1,) * 8), torch.zeros(3, 8 * GROUP))
    assert codes.shape == (3, 8 * GROUP)
    assert bool(scales.isfinite().all())
    assert not projections.any()
