"""``allocate`` with a calibration: the error that a model sees, and tables and metrics at their limits."""

from __future__ import annotations

import pytest
import torch

from embkern import Calibration
from embkern.methods import allocate, predicted_divergence
from embkern.methods.calibration import CalibrationFacts, CalibrationRun
from embkern.methods.metric_allocation import PREDICTION_STRENGTH, forms_of, input_frequencies
from embkern.text.frequencies import COMPRESSION_STRENGTH
from tests.conftest import seed_of

V, H, SCORED = 700, 64, 5000
MANY = 3000  # rows, beside which a basis of 64 rows is small
FACTS = CalibrationFacts(
    architecture="Model",
    kind="causal",
    weights="none",
    tokenizer=None,
    runs=(CalibrationRun(source="text", texts="none", tokens=SCORED, length=16, seed=0),),
)


def moment(width: int, generator: torch.Generator, decades: float = 3.0) -> torch.Tensor:
    """Return a positive definite matrix whose eigenvalues span some powers of 10, in random directions."""
    vectors = torch.linalg.qr(torch.randn(width, width, generator=generator, dtype=torch.float64))[0]
    values = torch.logspace(0, -decades, width, dtype=torch.float64)
    product = (vectors * values) @ vectors.t()
    return SCORED * (product + product.t()) / 2


def calibration(rows: int = V, width: int = H, *, head: bool = True, **changed) -> Calibration:
    generator = torch.Generator().manual_seed(seed_of(1))
    counts = torch.rand(rows, generator=generator, dtype=torch.float64) ** 6
    fields = {
        "inputs": SCORED * counts / counts.sum(),
        "input_moment": moment(width, generator),
        "predictions": SCORED * counts.flip(0) / counts.sum() if head else None,
        "head_moment": moment(width, generator) if head else None,
    }
    return Calibration(**{**fields, **changed}, scored=SCORED, facts=FACTS)


def table(rows: int = V, width: int = H) -> torch.Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed_of(2)))


def same(one, other) -> bool:
    tensors = other.tensors()
    return all(torch.equal(tensor, tensors[name]) for name, tensor in one.tensors().items())


def test_divergence_is_the_sum_of_two_quadratic_forms():
    c, x = calibration(), table().double()
    y = x + 0.1 * torch.randn(V, H, dtype=torch.float64)
    counts = torch.rand(V, dtype=torch.float64)
    f = counts / counts.sum()
    q = (c.predictions + PREDICTION_STRENGTH * f) / (SCORED + PREDICTION_STRENGTH)
    e = x - y
    inputs = 0.5 * (f * ((e @ c.input_moment / SCORED) * e).sum(1)).sum()
    head = 0.5 * (q * ((e @ c.head_moment / SCORED) * e).sum(1)).sum()
    # Products are in fp32: a form errs by up to 2 H eps |e|^2 |M|, where |M| = 1 is the largest eigenvalue,
    # and is |e|^2 trace(M) / H = 0.15 |e|^2 on average.
    bound = 2 * H * torch.finfo(torch.float32).eps / 0.14
    for tied, expected in ((True, inputs + head), (False, inputs)):
        got = predicted_divergence(x, y, c, counts, tied=tied)
        assert abs(got - float(expected)) <= bound * float(expected)
    assert predicted_divergence(x, x, c, counts, tied=True) == 0


@pytest.mark.parametrize("share", [0.0, 0.1, 1.0])
def test_shrinkage_raises_every_eigenvalue_to_a_share_of_the_mean(share):
    c = calibration()
    for form, moment_of in zip(
        forms_of(c, None, tied=True, shrinkage=share), (c.input_moment, c.head_moment), strict=True
    ):
        values = torch.linalg.eigvalsh(moment_of) / SCORED
        expected = (1 - share) * values + share * values.mean()
        tolerance = H * torch.finfo(torch.float64).eps * float(values[-1])
        torch.testing.assert_close(torch.linalg.eigvalsh(form.matrix), expected, rtol=0, atol=8 * tolerance)


def test_a_matrix_that_is_no_moment_gives_finite_rows():
    """The sum of outer products has no negative eigenvalue; a file may have one."""
    indefinite = calibration().input_moment.fill_diagonal_(0)
    c = calibration(head=False, input_moment=indefinite + 1e-3 * SCORED * torch.eye(H, dtype=torch.float64))
    assert torch.linalg.eigvalsh(c.input_moment)[0] < 0
    assert bool(torch.isfinite(allocate(table(), ratio=16, calibration=c).to_dense()).all())


def test_frequencies_without_counts_are_those_of_the_calibration():
    c = calibration()
    expected = c.inputs + COMPRESSION_STRENGTH * c.predictions / c.predictions.sum()
    torch.testing.assert_close(input_frequencies(c), expected / expected.sum(), rtol=1e-12, atol=0)
    alone = input_frequencies(calibration(head=False))
    assert bool((alone > 0).all())
    assert float(alone.sum()) == pytest.approx(1)


@pytest.mark.parametrize(("ratio", "most"), [(6, 1.0), (12, 0.9)])
@pytest.mark.parametrize("tied", [True, False])
def test_a_model_sees_less_error(tied, ratio, most):
    """Metrics that span three powers of 10 let a table of random rows gain, the more the fewer its bits."""
    c, x = calibration(MANY), table(MANY)
    counts = input_frequencies(c)
    plain = allocate(x, ratio=ratio, counts=counts, exponent=1)
    calibrated = allocate(x, ratio=ratio, calibration=c, tied=tied, exponent=1)
    for each in (plain, calibrated):
        assert x.nbytes / each.nbytes >= ratio
    before, after = (
        predicted_divergence(x, each.to_dense(), c, counts, tied=tied) for each in (plain, calibrated)
    )
    assert after < most * before


def test_a_basis_that_does_not_pay_is_left_out():
    """At 8 bits a value its bytes buy more as codes."""
    assert allocate(table(), ratio=4, calibration=calibration()).basis is None


def test_an_untied_table_does_not_depend_on_the_head():
    x, counts = table(), torch.rand(V)
    one = allocate(x, ratio=10, counts=counts, calibration=calibration(), tied=False)
    assert same(one, allocate(x, ratio=10, counts=counts, calibration=calibration(head=False)))
    assert not same(one, allocate(x, ratio=10, counts=counts, calibration=calibration()))


def test_same_inputs_same_bytes():
    one, other = (allocate(table(), ratio=12, calibration=calibration()) for _ in range(2))
    assert same(one, other)


def test_the_scale_of_a_calibration_does_not_matter():
    x, c = table(), calibration()
    # A power of two, so that no rounding differs.
    both = calibration(input_moment=c.input_moment * 2**40, head_moment=c.head_moment * 2**40)
    assert same(allocate(x, ratio=10, calibration=c), allocate(x, ratio=10, calibration=both))


@pytest.mark.parametrize("factor", [1e-12, 1e12])
def test_metrics_of_very_different_scale(factor):
    x = table()
    made = allocate(x, ratio=10, calibration=calibration(head_moment=calibration().head_moment * factor))
    assert x.nbytes / made.nbytes >= 10
    assert bool(torch.isfinite(made.to_dense()).all())


def test_floor_holds_for_every_row():
    x, floor = table(), 0.55
    made = allocate(x, ratio=8, calibration=calibration(), floor=floor)
    cosine = torch.nn.functional.cosine_similarity(x, made.to_dense().float(), dim=1)
    # Cosines are measured in fp32, and rows are decoded to fp16: a relative error of 2^-11 turns a row by as
    # much at most.
    assert float(cosine.min()) >= floor - 2**-11


@pytest.mark.parametrize("speed", [0.5, 1.0])
def test_speed_counts_lookups_as_the_calibration_does(speed):
    c = calibration()
    made = allocate(table(), ratio=10, calibration=c, speed=speed)
    values = made.tiers[made.tier_of_rows(), 0] == 0
    assert float(input_frequencies(c)[values].sum()) >= speed - 1e-12
    assert speed < 1 or made.basis is None


ALIVE = torch.arange(H) < H // 2
SINGULAR = {
    "of rank 1": lambda m: torch.outer(m[0], m[0]) / m[0, 0],
    "with dead dimensions": lambda m: m * ALIVE * ALIVE.unsqueeze(1),
    "of zeros": torch.zeros_like,
}


@pytest.mark.parametrize("name", SINGULAR)
@pytest.mark.parametrize("which", ["input_moment", "head_moment"])
def test_singular_metrics(name, which):
    x, c = table(), calibration()
    made = allocate(x, ratio=10, calibration=calibration(**{which: SINGULAR[name](getattr(c, which))}))
    assert x.nbytes / made.nbytes >= 10
    assert bool(torch.isfinite(made.to_dense()).all())


@pytest.mark.parametrize(
    ("rows", "width", "ratio"), [(900, 33, 6), (2000, 31, 4), (257, 95, 4), (100, 257, 2)]
)
def test_shapes(rows, width, ratio):
    x = table(rows, width)
    made = allocate(x, ratio=ratio, calibration=calibration(rows, width))
    assert made.to_dense().shape == x.shape
    assert x.nbytes / made.nbytes >= ratio


@pytest.mark.parametrize(("rows", "width"), [(1, 32), (40, 64)])
def test_a_table_too_small_for_the_format(rows, width):
    with pytest.raises(ValueError, match=r"ratio: .* leaves no room"):
        allocate(table(rows, width), ratio=40, calibration=calibration(rows, width))


def test_rows_of_zeros_stay_zero():
    x = table()
    x[::7] = 0
    made = allocate(x, ratio=10, calibration=calibration())
    assert not made.to_dense()[::7].any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_dtypes(dtype):
    x = table().to(dtype)
    made = allocate(x, ratio=6, calibration=calibration())
    assert x.nbytes / made.nbytes >= 6
    assert made.dtype == (torch.bfloat16 if dtype == torch.bfloat16 else torch.float16)


def test_a_small_budget_takes_a_smaller_basis():
    wide = 128
    x = table(V, wide)
    made = allocate(x, ratio=24, calibration=calibration(V, wide))
    assert made.basis is None or len(made.basis) < wide


def test_refusals():
    x = table()
    with pytest.raises(ValueError, match="expected one of a 700 x 64 table, got one of 699 x 64"):
        allocate(x, ratio=8, calibration=calibration(V - 1))
    zero = torch.zeros(H, H, dtype=torch.float64)
    with pytest.raises(ValueError, match="calibration: expected gradients or hidden states other than zero"):
        allocate(x, ratio=8, calibration=calibration(input_moment=zero, head_moment=zero))
    with pytest.raises(ValueError, match="ratio: 1e\\+06 leaves no room"):
        allocate(x, ratio=1e6, calibration=calibration())
    with pytest.raises(ValueError, match=r"compressed: expected shape \(700, 64\) as in calibration"):
        predicted_divergence(x, x[:, :3], calibration(), torch.ones(V), tied=True)
