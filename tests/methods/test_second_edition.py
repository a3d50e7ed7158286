"""Tables of the first edition in the codes of the second one: what stays, and how much error is added."""

from __future__ import annotations

import pytest
import torch

from embkern.methods.quantizer_levels import TRELLIS_DISTORTION
from embkern.methods.second_edition import AddedError, added_error, second_edition
from embkern.ops.packed_format import Tier
from tests.first_edition import first_edition

KEPT = ("directory", "tiers", "basis", "offset")


def share_of_rows(before, after, ids) -> float:
    """The squared error over the squared values of rows, without the offset."""
    x, y = (each.to(torch.float32).decode(ids).double() for each in (before, after))
    offset = 0 if before.offset is None else before.offset.double()
    return float((x - y).square().sum() / (x - offset).square().sum())


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize("transform", [False, True])
def test_error_is_that_of_the_new_codes(bits, transform):
    tier = Tier(transform, (bits,) * 4)
    before = first_edition(300, 128, [tier], basis=transform, offset=transform)
    after = second_edition(before)
    # That of normal values. 38,400 values have a standard error of 1 %, and those of the old codes are near
    # normal.
    assert share_of_rows(before, after, torch.arange(300)) < 1.25 * TRELLIS_DISTORTION[bits]


def test_everything_but_codes_and_scales_stays():
    tiers = [Tier(False, (8, 8)), Tier(False, (3, 3)), Tier(True, (4, 2, 0, 1)), Tier(False, ())]
    before = first_edition(70, 40, tiers, basis=True, offset=True)
    after = second_edition(before)
    after.validate()
    for name in KEPT:
        assert torch.equal(getattr(after, name), getattr(before, name)), name
    assert after.records.shape == before.records.shape
    assert after.embedding_dim == before.embedding_dim
    assert after.dtype == before.dtype
    assert before.nbytes - after.nbytes == 4 * 128 * 2 - 17 * 16  # the levels
    same = before.tier_of_rows() != 1
    same &= before.tier_of_rows() != 2
    assert torch.equal(after.to_dense()[same], before.to_dense()[same]), "8 bits, and none"
    assert torch.equal(after.scales[same], before.scales[same])


def test_equal_tables_give_equal_bytes():
    before = first_edition(65, 64, [Tier(False, (2, 2)), Tier(True, (1, 1))], basis=True)
    one, other = second_edition(before), second_edition(before)
    for name, tensor in one.tensors().items():
        assert torch.equal(tensor, other.tensors()[name]), name


def test_a_tier_of_narrow_and_wide_groups_keeps_its_scales():
    before = first_edition(90, 96, [Tier(False, (6, 3, 4))])
    after = second_edition(before)
    assert torch.equal(after.scales, before.scales)
    x, y = before.to(torch.float32).to_dense(), after.to(torch.float32).to_dense()
    assert torch.equal(x[:, :32], y[:, :32])
    error = (x - y)[:, 32:].square().sum() / x[:, 32:].square().sum()
    assert 0 < float(error) < 1.5 * TRELLIS_DISTORTION[3]


def test_scales_beyond_the_range_of_squares_are_no_matter():
    before = first_edition(40, 32, [Tier(False, (4,))], dtype=torch.float32)
    for scale in (1e-30, 1e30):
        scaled = second_edition(
            type(before)(*(*before.packed_tensors()[:4], before.scales * scale), embedding_dim=32)
        )
        assert torch.isfinite(scaled.scales).all()
        assert torch.equal(scaled.records, second_edition(before).records)


def test_rows_of_scale_zero_stay_zero():
    before = first_edition(40, 32, [Tier(False, (2,))])
    before.scales[::3] = 0
    after = second_edition(before)
    assert not after.to_dense()[::3].any()
    assert after.to_dense()[1].any()


def test_the_second_edition_is_refused():
    after = second_edition(first_edition(33, 32, [Tier(False, (2,))]))
    with pytest.raises(ValueError, match=r"table: expected one of embkern\.packed/1, got one of the second"):
        second_edition(after)


def test_added_error_is_what_its_docstring_says():
    before = first_edition(50, 64, [Tier(False, (4, 4)), Tier(False, (8, 8))])
    after = second_edition(before)
    x, y = before.to(torch.float32).to_dense().double(), after.to(torch.float32).to_dense().double()
    error = added_error(before, after)
    assert error.mse == pytest.approx(float((x - y).square().mean()))
    assert error.share == pytest.approx(float((x - y).square().sum() / x.square().sum()))
    assert error.direction == pytest.approx(float((1 - torch.cosine_similarity(x, y)).mean()))
    assert added_error(after, after) == AddedError(0.0, 0.0, 0.0)
