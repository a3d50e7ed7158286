"""quantize_trellis: the kernel finds the codes of the definition, and no path has less error."""

import pytest
import torch
from torch.testing import assert_close

pytest.importorskip("pydantic", reason="the methods need pydantic")

from embkern.methods.quantizer_levels import TRELLIS_DISTORTION, distortion, lloyd_max_levels
from embkern.ops.library import load_native
from embkern.ops.packed_format import LEVEL_STEP, trellis_levels, trellis_states
from embkern.ops.quantize_trellis import quantize_trellis
from tests.conftest import seed_of
from tests.example_tables import uniform_levels, values_of

# A sum of n products in fp32 is within sqrt(n) 2^-24, 8e-7 for the 160 values of a row; a projection has two.
TOLERANCE = 2e-6
PROFILES = [(1,), (2,), (3,), (4,), (3, 0, 1, 4, 2), (0,)]
native = pytest.mark.skipif(load_native() is not None, reason=str(load_native()))


@pytest.fixture(params=[pytest.param("native", marks=native), "torch"])
def kernel(request: pytest.FixtureRequest) -> str:
    return request.param


def _arguments(profile: tuple[int, ...], spread: bool, rows: int = 37):
    generator = torch.Generator().manual_seed(seed_of(sum(profile)))
    values = torch.randn(rows, 32 * len(profile), generator=generator)
    values[3] = 0
    each = torch.rand(values.shape[1], generator=generator) + 0.1 if spread else None
    scales = torch.rand(rows, 3, generator=generator) + 0.5
    return values, each, torch.tensor(profile, dtype=torch.uint8), trellis_levels(), scales


def _decoded(codes: torch.Tensor, profile: tuple[int, ...]) -> torch.Tensor:
    parts = [
        trellis_levels()[bits - 1].float()[trellis_states(part, bits)] * LEVEL_STEP if bits else 0.0 * part
        for bits, part in zip(profile, codes.long().split(32, 1), strict=True)
    ]
    return torch.cat(parts, 1)


@native
@pytest.mark.parametrize("spread", [False, True])
@pytest.mark.parametrize("profile", PROFILES, ids=str)
def test_the_kernel_finds_what_the_definition_finds(profile, spread, level) -> None:
    arguments = _arguments(profile, spread)
    codes, scales, projections = quantize_trellis(*arguments, needs_codes=True, backend="native")
    expected = quantize_trellis(*arguments, needs_codes=True, backend="torch")
    tied = (codes != expected[0]).any(1)  # Where two paths have equal errors, either may be taken.
    assert int(tied.sum()) <= 1
    assert_close(projections[~tied], expected[2][~tied], rtol=TOLERANCE, atol=TOLERANCE)
    values, each = arguments[0].double(), 1.0 if arguments[1] is None else arguments[1].double()
    decoded, x = _decoded(codes, profile).double() * each, values * each
    dot, norm = (x * decoded).sum(1), decoded.norm(dim=1)
    assert_close(scales * norm.square(), dot, rtol=TOLERANCE, atol=TOLERANCE)
    assert_close(projections * norm, dot, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_levels_without_memory_make_it_round_to_the_nearest(bits, kernel) -> None:
    values = torch.randn(20, 64)
    own, scale = values_of(uniform_levels(), bits).float(), torch.rand(20, 1) + 0.5
    width = torch.tensor([bits, bits], dtype=torch.uint8)
    given = (values, None, width, uniform_levels(), scale)
    codes, _, _ = quantize_trellis(*given, needs_codes=True, backend=kernel)
    nearest = torch.bucketize(values / scale, (own[1:] + own[:-1]) / 2)
    assert torch.equal(codes.long(), nearest)


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_no_change_of_codes_is_nearer(bits, kernel) -> None:
    """One or two adjacent codes are changed. The estimate of the boundary state may fail in one row."""
    values, weight = torch.randn(30, 32), torch.rand(32) + 0.1
    width, scale = torch.tensor([bits], dtype=torch.uint8), torch.ones(30, 1)
    given = (values, weight, width, trellis_levels(), scale)
    codes = quantize_trellis(*given, needs_codes=True, backend=kernel)[0].long()

    def cost(codes):
        decoded = trellis_levels()[bits - 1].float()[trellis_states(codes, bits)] * LEVEL_STEP
        return ((values - decoded) * weight).square().sum(1)

    least, nearer = cost(codes), torch.zeros(30, dtype=torch.bool)
    for place in range(32):
        for flip in range(1, 2**bits):
            for other in range(2**bits):
                changed = codes.clone()
                changed[:, place] ^= flip
                changed[:, (place + 1) % 32] ^= other
                nearer |= cost(changed) < least - 1e-5
    assert int(nearer.sum()) <= 1


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_the_error_of_normal_values_is_the_one_that_is_told(bits, kernel) -> None:
    values = torch.randn(400, 128)
    width, scale = torch.full((4,), bits, dtype=torch.uint8), torch.ones(400, 1)
    codes, scales, _ = quantize_trellis(
        values, None, width, trellis_levels(), scale, needs_codes=True, backend=kernel
    )
    error = (values - _decoded(codes, (bits,) * 4)).square().mean()
    assert float(error) == pytest.approx(TRELLIS_DISTORTION[bits], rel=0.02)
    assert float(error) < distortion(bits) * 0.87
    assert float(scales.mean()) == pytest.approx(1, abs=0.01), "levels are what they stand for, on average"
    assert float(trellis_levels()[bits - 1].abs().max()) * LEVEL_STEP > float(lloyd_max_levels(bits).max())


def test_the_best_scale_is_taken(kernel) -> None:
    values, each, bits, levels, scales = _arguments((2, 2), False)
    many = quantize_trellis(values, each, bits, levels, scales, needs_codes=False, backend=kernel)
    each_alone = [
        quantize_trellis(values, each, bits, levels, scale.unsqueeze(1), needs_codes=False, backend=kernel)[2]
        for scale in scales.t()
    ]
    assert torch.equal(many[2], torch.stack(each_alone).amax(0))
    assert many[0].shape == (0, 64)


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_a_scale_far_too_large_has_codes_as_well(bits, kernel) -> None:
    """The best path is then the one nearest to zero, whose direction may be opposite to that of the row."""
    values = 20 * torch.randn(200, 32)
    width, scale = torch.tensor([bits], dtype=torch.uint8), torch.full((200, 1), 1e6)
    given = (values, None, width, trellis_levels(), scale)
    codes, scales, projections = quantize_trellis(*given, needs_codes=True, backend=kernel)
    decoded = _decoded(codes, (bits,)).double()
    dot, norm = (values * decoded).sum(1), decoded.norm(dim=1)
    size = float((values.norm(dim=1) * norm).max())  # Products of both signs cancel in the sum.
    assert_close(projections * norm, dot, rtol=0, atol=TOLERANCE * size)
    assert_close(scales * norm, projections.double(), rtol=TOLERANCE, atol=0)
    assert int(codes.max()) < 2**bits


def test_a_row_of_zeros_projects_on_nothing(kernel) -> None:
    arguments = list(_arguments((2, 3), True))
    arguments[4][3] = 0
    _, scales, projections = quantize_trellis(*arguments, needs_codes=True, backend=kernel)
    assert float(projections[3]) == 0
    assert float(scales[3]) == 0
    assert (projections[:3] > 0).all()


@native
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(bits=torch.tensor([5], dtype=torch.uint8)), "bits: expected up to 4, got 5"),
        (
            dict(bits=torch.tensor([2, 2], dtype=torch.uint8)),
            r"values: expected shape \(N, 64\), 32 columns for each of 2 groups",
        ),
        (dict(levels=torch.zeros(4, 64, dtype=torch.int16)), "levels"),
        (dict(scales=torch.ones(3, 1)), "scales"),
        (dict(spread=torch.ones(31)), "spread"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_does_not_fit_is_refused(change, message) -> None:
    names = ("values", "spread", "bits", "levels", "scales")
    arguments = {**dict(zip(names, _arguments((2,), True), strict=True)), **change}
    with pytest.raises(ValueError, match=message):
        quantize_trellis(**arguments, needs_codes=True, backend="native")
