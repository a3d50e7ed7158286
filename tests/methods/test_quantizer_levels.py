"""Quantisers of a standard normal variable, against published tables and quadrature."""

import math

import pytest
import torch
from torch.testing import assert_close

from embkern.methods.quantizer_levels import UNIFORM_STEPS, distortion, lloyd_max_levels


# Max, Quantizing for minimum distortion (1960), table I; for 8 bits Panter and Dite's asymptote.
@pytest.mark.parametrize(
    ("bits", "error", "tolerance"),
    [
        (1, 0.3634, 5e-5),
        (2, 0.1175, 5e-5),
        (3, 0.03454, 1e-5),
        (4, 0.009497, 5e-6),
        (8, math.sqrt(3) * math.pi / 2 / 256**2, 2e-6),
    ],
)
def test_lloyd_max_levels_are_the_best(bits, error, tolerance):
    levels = lloyd_max_levels(bits)
    assert levels.shape == (2**bits,)
    assert torch.equal(levels, -levels.flip(0))
    # By quadrature, independently of the solver's formulas.
    x = torch.linspace(-10, 10, 2_000_001, dtype=torch.float64)
    density = torch.exp(-x.square() / 2) / math.sqrt(2 * math.pi) * (x[1] - x[0])
    midpoints = (levels[1:] + levels[:-1]) / 2
    cells = torch.bucketize(x, midpoints)
    mass, moment = (
        torch.zeros(2**bits).double().index_add(0, cells, each) for each in (density, density * x)
    )
    assert_close(moment / mass, levels, atol=2e-5 * 2**bits, rtol=0)
    found = float((density * (x - levels[cells]).square()).sum())
    assert found == pytest.approx(error, abs=tolerance)
    assert distortion(bits) == pytest.approx(found, rel=1e-5)


def test_zero_bits_have_the_variance_as_their_error():
    assert distortion(0) == 1


@pytest.mark.parametrize("bits", UNIFORM_STEPS)
def test_uniform_steps_have_less_error_than_steps_two_percent_apart(bits):
    x = torch.linspace(-10, 10, 2_000_001, dtype=torch.float64)
    density = torch.exp(-x.square() / 2)
    half = 2 ** (bits - 1)
    shorter, best, longer = (
        float((density * (((x / step).floor().clamp(-half, half - 1) + 0.5) * step - x).square()).sum())
        for step in (UNIFORM_STEPS[bits] * factor for factor in (0.98, 1.0, 1.02))
    )
    assert best < min(shorter, longer)
