"""quantize_rows: the native kernel against its definition, on every instruction set."""

import pytest
import torch

pytest.importorskip("pydantic", reason="the methods need pydantic")

from embkern.methods.allocate import scalar_levels, uniform_steps
from embkern.ops.backends import unavailable
from embkern.ops.quantize_rows import quantize_rows
from tests.conftest import seed_of

STEPS = uniform_steps()
FACTORS = torch.tensor([0.8, 0.9, 1.0, 1.15])
native = pytest.mark.skipif(
    unavailable("native", "quantize_rows", "cpu", torch.float32) is not None,
    reason="the extension is not built",
)
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
    assert (projections - expected[2]).abs().max() <= 1e-4 * expected[2].abs().max() + 1e-6
    # Two factors may be as good as each other to fp32: scales, a tenth apart, tell which one a row has taken.
    # A value between two levels may round either way.
    same = (scales - expected[1]).abs() <= 1e-3 * expected[1]
    assert same.float().mean() > 0.9
    assert (codes != expected[0])[same].float().mean() < 0.001
    values, each = arguments[0], arguments[1]
    decoded = _decoded(codes, profile) * (1 if each is None else each)
    x = values * (1 if each is None else each)
    square = decoded.square().sum(1)
    assert torch.allclose(scales * square, (x * decoded).sum(1), atol=1e-3, rtol=1e-4)
    assert torch.allclose(projections * square.sqrt(), (x * decoded).sum(1), atol=1e-3, rtol=1e-4)


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
    assert (many[2] >= few[2] - 1e-5).all()
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
