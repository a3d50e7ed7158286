"""quantize_trellis: the kernel finds as near codes as the definition, the same at every instruction set."""

import functools

import pytest
import torch
from torch.testing import assert_close

pytest.importorskip("pydantic", reason="the methods need pydantic")

from embkern.methods.quantizer_levels import TRELLIS_DISTORTION, distortion
from embkern.ops.library import cpu_capability, load_native
from embkern.ops.packed_codes import levels_of_windows, packed_levels
from embkern.ops.packed_format import Tier
from embkern.ops.quantize_trellis import quantize_trellis
from embkern.ops.reference import quantize_trellis as definition
from tests.conftest import seed_of
from tests.ops.packed_problems import random_levels, values_of

# A sum of n products in fp32 is within sqrt(n) 2^-24, 8e-7 for the 160 values of a row; a projection has two.
TOLERANCE = 2e-6
PROFILES = [(1,), (2,), (3,), (4,), (3, 0, 1, 4, 2), (0,)]
native = pytest.mark.skipif(load_native() is not None, reason=str(load_native()))


@pytest.fixture(params=[pytest.param("native", marks=native), "torch"])
def kernel(request: pytest.FixtureRequest) -> str:
    return request.param


def _arguments(profile: tuple[int, ...], spread: bool, rows: int = 8):
    generator = torch.Generator().manual_seed(seed_of(sum(profile)))
    values = torch.randn(rows, 32 * len(profile), generator=generator)
    values[3] = 0
    each = torch.rand(values.shape[1], generator=generator) + 0.1 if spread else None
    scales = torch.rand(rows, 2, generator=generator) + 0.5
    return values, each, torch.tensor(profile, dtype=torch.uint8), packed_levels(), scales


def _decoded(codes: torch.Tensor, profile: tuple[int, ...], levels: torch.Tensor | None = None):
    return values_of(codes, Tier(False, profile), packed_levels() if levels is None else levels)


def _weighted_errors(given, codes, profile):
    values, spread, _, levels, scales = given
    decoded = _decoded(codes, profile, levels)
    return ((values.double() / scales[:, :1] - decoded) * (1 if spread is None else spread)).square().sum(1)


@functools.cache
def _defined(profile: tuple[int, ...], spread: bool):
    """Results of the definition, for the tests at every instruction set."""
    return quantize_trellis(*_arguments(profile, spread), needs_codes=True, backend="torch")


# The kernel adds squared errors in 16 bits. Its paths have up to this part more error than the best one,
# unless nearly equal costs make it begin elsewhere in the ring. The definition may then have less, or more.
ROUNDING = 0.005


def _assert_as_near(errors: torch.Tensor, least: torch.Tensor) -> None:
    """Check the squared errors (N,) of rows against those of the best paths."""
    assert int((errors > (1 + ROUNDING) * least).sum()) <= 1
    assert (errors < 2 * least).all()


def _assert_consistent(profile, given, codes, scales, projections) -> None:
    values, each = given[0].double(), 1.0 if given[1] is None else given[1].double()
    decoded, x = _decoded(codes, profile, given[3]) * each, values * each
    dot, norm = (x * decoded).sum(1), decoded.norm(dim=1)
    size = float((x.norm(dim=1) * norm).max())
    assert_close(scales * norm.square(), dot, rtol=0, atol=TOLERANCE * size)
    assert_close(projections * norm, dot, rtol=0, atol=TOLERANCE * size)


@native
@pytest.mark.parametrize("spread", [False, True])
@pytest.mark.parametrize("profile", PROFILES, ids=str)
def test_the_kernel_finds_what_the_definition_finds(profile, spread, level) -> None:
    given = _arguments(profile, spread)
    codes, scales, projections = quantize_trellis(*given, needs_codes=True, backend="native")
    _assert_consistent(profile, given, codes, scales, projections)
    squares = (given[0] * (1 if spread is False else given[1])).double().square().sum(1)
    errors, least = (squares - each.double().square() for each in (projections, _defined(profile, spread)[2]))
    _assert_as_near(errors + 1e-5, least + 1e-5)


@native
def test_sums_that_wrap_around_are_searched_as_they_are_decoded(level) -> None:
    profile = (4, 1, 3)
    values, each, bits, _, scales = _arguments(profile, True, rows=4)
    given = (2 * values, each, bits, random_levels(), scales[:, :1])
    codes, found, projections = quantize_trellis(*given, needs_codes=True, backend="native")
    _assert_consistent(profile, given, codes, found, projections)
    _assert_as_near(*(_weighted_errors(given, each, profile) for each in (codes, _exact_codes(given))))


def _kinds() -> dict[str, tuple]:
    """Arguments for which a search may take other ways: by bits, weights, outliers and levels."""
    generator = torch.Generator().manual_seed(seed_of(5))
    kinds = {}
    for bits in (1, 2, 3, 4):
        given = list(_arguments((bits,) * 4, False))
        kinds[f"{bits} bits"] = tuple(given)
        given[0] = given[0].clone()
        given[0][:, ::23] *= torch.logspace(0.5, 4, 8).unsqueeze(1)
        kinds[f"{bits} bits, outliers"] = tuple(given)
    for profile in ((1, 2, 3, 4), (4, 0, 1, 1)):
        values, _, bits, levels, scales = _arguments(profile, False)
        for name, spread in (
            ("falling", torch.logspace(1, -1, 128)),
            ("any", torch.rand(128, generator=generator) + 0.01),
            ("far apart", torch.logspace(-6, 0, 128)),
        ):
            kinds[f"{profile}, {name}"] = (values, spread, bits, levels, scales)
        kinds[f"{profile}, levels that wrap around"] = (2 * values, None, bits, random_levels(), scales)
    kinds["far too small scales"] = (*_arguments((1, 2, 3, 4), False)[:4], torch.full((8, 1), 1e-30))
    return kinds


@native
def test_every_instruction_set_finds_the_same(level) -> None:
    for kind, given in _kinds().items():
        found = quantize_trellis(*given, needs_codes=True, backend="native")
        cpu_capability("portable")
        expected = quantize_trellis(*given, needs_codes=True, backend="native")
        cpu_capability(level)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True)), kind


@functools.cache
def _far_apart(profile: tuple[int, ...], reverse: bool):
    """Arguments whose weights fall or rise by 6 orders in a row, with one scale, and their exact codes."""
    given = list(_arguments(profile, False, rows=16))
    spread = torch.logspace(0, -3, given[0].shape[1])
    given[1] = spread.flip(0) if reverse else spread
    given[4] = given[4][:, :1]
    return given, _exact_codes(given)


def _exact_codes(given) -> torch.Tensor:
    """Codes of the definition in float64, at the first scale."""
    values, spread, bits, levels, scales = given
    spread = None if spread is None else spread.double()
    return definition(values.double(), spread, bits, levels, scales[:, :1].double(), True)[0]


@native
@pytest.mark.parametrize("profile", [(1,), (2, 4)], ids=str)
def test_rows_with_outliers_are_as_near_as_in_double(profile, level) -> None:
    given = list(_arguments(profile, False))
    given[0][:, ::17] *= torch.logspace(0.5, 3, 8).unsqueeze(1)
    codes = quantize_trellis(*given[:4], given[4][:, :1], needs_codes=True, backend="native")[0]
    _assert_as_near(*(_weighted_errors(given, each, profile) for each in (codes, _exact_codes(given))))


@native
@pytest.mark.parametrize("reverse", [False, True])
def test_rows_with_weights_far_apart_are_as_near_as_in_double(reverse, level) -> None:
    """Groups whose weights are small have a part of the error, too, which a coarse unit would hide."""
    profile = (2, 3, 1, 4)
    given, exact = _far_apart(profile, reverse)
    codes = quantize_trellis(*given, needs_codes=True, backend="native")[0]
    total = _weighted_errors(given, exact, profile)
    _assert_as_near(_weighted_errors(given, codes, profile), total)
    for group in range(4):
        alone = torch.zeros(128).index_fill_(0, torch.arange(32 * group, 32 * group + 32), 1)
        known = (given[0], alone * given[1], *given[2:])
        found, least = (_weighted_errors(known, each, profile).sum() for each in (codes, exact))
        assert found < 1.1 * least or least < 0.01 * total.sum()


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_levels_by_one_code_alone_make_it_round_to_the_nearest(bits, kernel) -> None:
    """The levels of a step follow from the code two steps later, its own bits, or both codes of a pair."""
    levels = torch.zeros(17, 16, dtype=torch.int8)
    code = torch.arange(16) % 4
    levels[0], levels[3] = 48 * (code % 2) - 24, 48 * (code // 2) - 24
    levels[6] = levels[9] = levels[13] = 20 * code - 30
    levels[11], levels[12] = -5, 5
    levels[16] = torch.tensor([-7, -2, 3, 8] * 4)
    own = levels_of_windows(levels)[bits - 1]
    known = (own[0] if bits == 1 else own).unique()
    values, scale = torch.randn(3, 64), torch.rand(3, 1) + 0.5
    width = torch.tensor([bits, bits], dtype=torch.uint8)
    codes, _, _ = quantize_trellis(values, None, width, levels, scale, needs_codes=True, backend=kernel)
    x = (values / scale).double()
    nearest = known[torch.bucketize(x, (known[1:].double() + known[:-1]) / 2)]
    # The search reads values of 1 bit in steps of levels, others 256 times as fine.
    step = 2**-5 if bits == 1 else 2**-8
    assert ((_decoded(codes, (bits, bits), levels) - x).abs() < (nearest - x).abs() + step).all()


def _least_errors(x: torch.Tensor) -> torch.Tensor:
    """The least squared error (4096,) of closed paths of 1 bit by their first window.

    Costs (first window, present window) are extended from the first step to the last, which is not the order
    of the search.
    """
    first, second = levels_of_windows(packed_levels())[0]
    windows = torch.arange(4096)
    errors = [
        (first - x[4 * (t % 4) + t // 4]).square() + (second - x[16 + 4 * (t % 4) + t // 4]).square()
        for t in range(16)
    ]
    costs = torch.full((4096, 4096), torch.inf)
    costs[windows, windows] = errors[0]
    for t in range(1, 17):
        # The windows before window w are those whose upper ten bits are its lower ones.
        costs = costs.view(4096, 1024, 4).amin(2).repeat(1, 4) + (errors[t] if t < 16 else 0)
    return costs.diagonal()


def test_the_path_has_the_least_error_of_all_closed_paths_through_a_window(kernel) -> None:
    """A ring of 16 steps is short, so the window at its beginning may be another than that of the best."""
    values, width, ones = torch.randn(2, 32), torch.tensor([1], dtype=torch.uint8), torch.ones(2, 1)
    given = (values, None, width, packed_levels(), ones)
    codes = quantize_trellis(*given, needs_codes=True, backend=kernel)[0]
    found = _weighted_errors(given, codes, (1,))
    steps = (codes[:, :16] + 2 * codes[:, 16:]).long().view(-1, 4, 4).transpose(1, 2).flatten(1)
    beginning = (steps[:, :6] << 2 * torch.arange(6)).sum(1)
    least = torch.stack([_least_errors(x) for x in values])
    own = least.gather(1, beginning.unsqueeze(1)).squeeze(1)
    assert (found > 0.9999 * own).all()
    assert (found < (1 + ROUNDING) * own).all()
    assert found.sum() < 1.6 * least.amin(1).sum()


@native
@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_the_error_of_normal_values_is_the_one_that_is_told(bits) -> None:
    values, ones = torch.randn(100, 640), torch.ones(100, 1)
    profile, width = (bits,) * 20, torch.full((20,), bits, dtype=torch.uint8)
    codes, scales, _ = quantize_trellis(
        values, None, width, packed_levels(), ones, needs_codes=True, backend="native"
    )
    error = (values - _decoded(codes, profile)).square().mean()
    assert float(error) == pytest.approx(TRELLIS_DISTORTION[bits], rel=0.02)
    assert float(error) < distortion(bits) * 0.77
    assert float(scales.mean()) == pytest.approx(1, abs=0.01), "levels are what they stand for, on average"


@native
def test_a_long_row_has_no_more_error_than_short_ones() -> None:
    values = torch.randn(1, 16384)
    width = torch.full((512,), 2, dtype=torch.uint8)
    given = (values, None, width, packed_levels(), torch.ones(1, 1))
    codes = quantize_trellis(*given, needs_codes=True, backend="native")[0]
    error = float((values - _decoded(codes, (2,) * 512)).square().mean())
    assert error == pytest.approx(TRELLIS_DISTORTION[2], rel=0.04)


@native
def test_results_do_not_depend_on_the_number_of_threads(level) -> None:
    given, before = _arguments((2, 1, 4, 3), True, rows=37), torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(quantize_trellis(*given, needs_codes=True, backend="native"))
    finally:
        torch.set_num_threads(before)
    for each in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(each, results[0], strict=True))


def test_the_best_scale_is_taken(kernel) -> None:
    values, each, bits, levels, scales = _arguments((2, 2), False, rows=4)
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
    values = 20 * torch.randn(20, 32)
    width, scale = torch.tensor([bits], dtype=torch.uint8), torch.full((20, 1), 1e6)
    given = (values, None, width, packed_levels(), scale)
    codes, scales, projections = quantize_trellis(*given, needs_codes=True, backend=kernel)
    decoded = _decoded(codes, (bits,))
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
        (dict(levels=torch.zeros(4, 128, dtype=torch.int8)), "levels"),
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
