"""``allocate`` of rows whose squares leave the range of fp32."""

from __future__ import annotations

import pytest
import torch

from embkern.methods.allocate import allocate
from embkern.methods.magnitude import extreme_exponents
from tests.methods.test_metric_allocation import calibration

LONG = 2.0**20  # whose scales are stored in fp32, as those of extreme rows are


@pytest.fixture
def table() -> torch.Tensor:
    return torch.randn(200, 64)


def assert_scaled(got, expected, factors: torch.Tensor) -> None:
    """The same codes, and scales that are multiplied by powers of two."""
    for name, tensor in expected.tensors().items():
        wanted = tensor * factors if name == "scales" else tensor
        assert torch.equal(getattr(got, name), wanted), name


@pytest.mark.parametrize("ratio", [4, 12])
@pytest.mark.parametrize("exponent", [40, 66, 100, -33, -66, -90])
def test_a_table_is_stored_alike_at_any_magnitude(table, ratio, exponent):
    expected = allocate(table * LONG, ratio=ratio)
    got = allocate(table * LONG * 2.0**exponent, ratio=ratio)
    assert_scaled(got, expected, torch.tensor(2.0**exponent))


@pytest.mark.parametrize("exponent", [60, -80])
def test_single_rows_are_stored_as_those_beside_them(table, exponent):
    factors = torch.ones(200)
    factors[::7] = 2.0**exponent
    table[14] = 0
    expected = allocate(table * LONG, ratio=8)
    assert_scaled(allocate(table * LONG * factors[:, None], ratio=8), expected, factors)


def test_tables_of_other_dtypes(table):
    for dtype, ratio in ((torch.bfloat16, 4), (torch.float64, 12)):
        found = allocate((table * 1e20).to(dtype), ratio=ratio)
        cosines = torch.cosine_similarity(table.double(), found.to_dense().double() / 1e20)
        assert cosines.mean() > 0.95


def test_usual_tables_are_left_alone(table):
    for size in (1e-9, 1.0, 1e8):
        assert extreme_exponents(table * size, alike=False) is None
    assert extreme_exponents(torch.zeros(3, 4), alike=False) is None


@pytest.mark.parametrize(
    ("dtype", "size"), [(torch.float32, 1e-38), (torch.float64, 1e100), (torch.float64, 1e-60)]
)
def test_rows_beyond_fp32_are_refused_by_name(table, dtype, size):
    table = table.to(dtype)
    table[[3, 5]] *= size
    message = (
        r"table: expected rows of lengths within the range of torch.float32, got .* in 2 row\(s\): 3, 5$"
    )
    with pytest.raises(ValueError, match=message):
        allocate(table, ratio=2)


def test_a_calibration_compares_lengths(table):
    known = calibration(200, 64)
    expected = allocate(table * LONG, ratio=8, calibration=known)
    got = allocate(table * LONG * 2.0**40, ratio=8, calibration=known)
    assert_scaled(got, expected, torch.tensor(2.0**40))
    table[5] *= 1e-30
    with pytest.raises(
        ValueError, match=r"lengths that a calibration can compare, got other ones in 1 row\(s\): 5"
    ):
        allocate(table, ratio=8, calibration=known)
