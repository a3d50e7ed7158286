"""quantize_rows: the native kernel against the definition, with every instruction set."""

import pytest
import torch
from torch.testing import assert_close

pytest.importorskip("pydantic", reason="the methods need pydantic")

from embkern.methods.row_codes import scalar_levels, uniform_steps
from embkern.ops.backends import unavailable
from embkern.ops.quantize_rows import quantize_rows
from tests.conftest import seed_of

STEPS = uniform_steps()
FACTORS = torch.tensor([0.8, 0.9, 1.0, 1.15])
native = pytest.mark.skipif(
    unavailable("native", "quantize_rows", "cpu", torch.float32) is not None,
    reason="the extension is not built",
)
# A sum of n products in fp32 is within sqrt(n) 2^-24, 8e-7 for the 160 values of a row; a projection has two.
TOLERANCE = 2e-6
PROFILES = [(bits,) * 3 for bits in range(1, 9)] + [(4, 3, 0, 1, 6), (0,), (1,)]


def _arguments(profile: tuple[int, ...], spread: bool, rows: int = 301):
    generator = torch.Generator().manual_seed(seed_of(sum(profile)))
    width = 32 * len(profile)
    values = torch.randn(rows, width, generator=generator)
    values[3] = 0
    each = torch.rand(width, generator=generator) + 0.1 if spread else None
    return values, each, torch.tensor(profile, dtype=torch.uint8), scalar_levels(), STEPS, FACTORS


def _decoded(codes: torch.Tensor, profile: tuple[int, ...]) -> torch.Tensor:
    parts = []
    for bits, part in zip(profile, codes.long().split(32, 1), strict=True):
        if bits == 0:
            parts.append(torch.zeros(part.shape))
        elif bits <= 4:
            parts.append(scalar_levels()[bits - 1].float()[part] / 4096)
        else:
            parts.append(part - (2**bits - 1) / 2)
    return torch.cat(parts, 1)


@native
@pytest.mark.parametrize("spread", [False, True])
@pytest.mark.parametrize("profile", PROFILES, ids=str)
def test_the_kernel_finds_what_the_definition_finds(profile, spread, level) -> None:
    arguments = _arguments(profile, spread)
    codes, scales, projections = quantize_rows(*arguments, needs_codes=True, backend="native")
    expected = quantize_rows(*arguments, needs_codes=True, backend="torch")
    # Scales, a tenth apart, show which factor a row has taken. Those of 8 bits may be equally good in fp32.
    same = (scales - expected[1]).abs() <= 1e-3 * expected[1]
    assert same.float().mean() > (0.97 if max(profile) == 8 else 0.99)
    halfway = (codes != expected[0]).any(1)  # A value halfway between two levels may round to either.
    assert int((codes != expected[0])[same].sum()) <= 2
    error = (projections - expected[2]).abs() / expected[2].abs().max().clamp_min(1e-30)
    assert error[~halfway].max() <= TOLERANCE
    assert error.max() <= 1e-4
    values, each = arguments[0].double(), 1.0 if arguments[1] is None else arguments[1].double()
    decoded, x = _decoded(codes, profile).double() * each, values * each
    dot, norm = (x * decoded).sum(1), decoded.norm(dim=1)
    assert_close(scales * norm.square(), dot, rtol=TOLERANCE, atol=TOLERANCE)
    assert_close(projections * norm, dot, rtol=TOLERANCE, atol=TOLERANCE)


@native
def test_without_codes_the_rest_is_the_same(level) -> None:
    arguments = _arguments((2, 1, 8), True)
    codes, *rest = quantize_rows(*arguments, needs_codes=False, backend="native")
    assert codes.shape == (0, 96)
    for got, expected in zip(
        rest, quantize_rows(*arguments, needs_codes=True, backend="native")[1:], strict=True
    ):
        assert torch.equal(got, expected)


@native
def test_bits_depend_on_neither_neighbours_nor_threads() -> None:
    arguments = _arguments((3, 1, 1, 6), True, rows=5000)
    whole = quantize_rows(*arguments, needs_codes=True, backend="native")
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = quantize_rows(arguments[0][70:75], *arguments[1:], needs_codes=True, backend="native")
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(each, part[70:75]) for each, part in zip(alone, whole, strict=True))


@pytest.mark.parametrize("kernel", [pytest.param("native", marks=native), "torch"])
def test_more_factors_are_never_worse_and_zero_rows_are_zero(kernel) -> None:
    values, each, bits, levels, steps, factors = _arguments((2, 2), False)
    few = quantize_rows(values, each, bits, levels, steps, factors[:1], needs_codes=False, backend=kernel)
    many = quantize_rows(values, each, bits, levels, steps, factors, needs_codes=False, backend=kernel)
    assert (many[2] >= few[2]).all()
    assert (many[2] > few[2] + 1e-3).any()
    assert many[1][3] == 0
    assert many[2][3] == 0


@native
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"values": torch.zeros(4, 95)},
            r"values: expected shape \(N, 96\), 32 columns for each",
        ),
        ({"bits": torch.tensor([9, 1, 1], dtype=torch.uint8)}, "bits: expected up to 8, got 9"),
        ({"factors": torch.zeros(0)}, r"factors: expected shape \(1,\), got \(0,\)"),
        ({"spread": torch.ones(5)}, r"spread: expected shape \(96,\), got \(5,\)"),
    ],
)
def test_wrong_arguments_are_named(change, message) -> None:
    names = ("values", "spread", "bits", "levels", "steps", "factors")
    arguments = dict(zip(names, _arguments((1, 2, 3), True), strict=True)) | change
    with pytest.raises(ValueError, match=message):
        quantize_rows(**arguments, needs_codes=True, backend="native")


def test_bits_that_have_no_values_are_not_read() -> None:
    meta = [each if each is None else each.to("meta") for each in _arguments((2, 1), False)]
    with pytest.raises(RuntimeError, match="'native' cannot serve quantize_rows: there is no native kernel"):
        quantize_rows(*meta, needs_codes=True, backend="native")
