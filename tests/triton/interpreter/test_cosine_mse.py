"""The Triton kernels of cosine_mse_loss, run by Triton's interpreter on the CPU.

The oracle is autograd of the documented formula in float64; plain torch is the reference implementation.
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close
from triton.runtime import interpreter

from embkern.ops import cosine_mse_loss, reference
from embkern.ops.reference import MEAN, NONE, SUM
from embkern.triton import cosine_mse as cm
from embkern.triton.launch import Launch
from embkern.triton.scale_gradient import scale_gradient_
from embkern.triton.tiles import RowTile, row_tile_of
from tests.conftest import assert_no_worse_than

TERMS = (0.7, 0.9, 0.3, 0.2)
REDUCTIONS = pytest.mark.parametrize("reduction", [NONE, MEAN, SUM], ids=["none", "mean", "sum"])
WALKED = RowTile(2, 16, 2, 1)  # Two rows in blocks of 32 columns.


def pair(N, H, dtype=torch.float32):
    target = torch.randn(N, H)
    return (target + 0.3 * torch.randn(N, H)).to(dtype), target.to(dtype)


def formula(output, target, reduction, weights=TERMS, alpha=0.5, eps=1e-8, row_weight=None, target_norm=None):
    """The formula of the docstring of cosine_mse_loss."""
    e = output - target
    w = torch.ones_like(e[:, 0]) if row_weight is None else row_weight
    mse = e.square().mean(-1)
    norm = target.norm(dim=-1) if target_norm is None else target_norm
    cos = (output * target).sum(-1) / (output.norm(dim=-1) * norm).clamp_min(eps)
    rows = weights[0] * (1 - cos) + weights[1] * mse + weights[3] * (e.abs() + 1e-10).pow(alpha).mean(-1)
    if reduction == MEAN:
        return (w * rows).sum() / w.sum() + weights[2] * ((w * mse).sum() / w.sum()).sqrt()
    rows = w * (rows + weights[2] * mse.sqrt())
    return rows if reduction == NONE else rows.sum()


def exact(output, target, reduction, grad_loss=None, **options):
    """The formula and its gradients in float64."""
    leaves = [each.to(torch.float64, copy=True).requires_grad_() for each in (output, target)]
    options = {key: value.double() if torch.is_tensor(value) else value for key, value in options.items()}
    loss = formula(*leaves, reduction, **options)
    loss.backward(torch.ones_like(loss) if grad_loss is None else grad_loss.double())
    return [loss.detach(), *(leaf.grad for leaf in leaves)]


def run(
    function,
    output,
    target,
    reduction,
    grad_loss=None,
    weights=TERMS,
    alpha=0.5,
    eps=1e-8,
    row_weight=None,
    target_norm=None,
    needs=(True, True),
):
    return function(
        output, target, row_weight, target_norm, grad_loss, reduction, *weights, alpha, eps, *needs
    )


def check(output, target, reduction, grads=2, **options):
    ours = run(cm.cosine_mse_forward, output, target, reduction, **options)
    plain = run(reference.cosine_mse_forward, output, target, reduction, **options)
    true = exact(output, target, reduction, **options)
    for got, theirs, expected in list(zip(ours, plain, true, strict=True))[: 1 + grads]:
        assert got.dtype == theirs.dtype
        assert got.shape == expected.shape
        assert_no_worse_than(
            got, theirs, expected, tiny=3e-7
        )  # A scalar has an error of some ulps, or none by chance.


# Rows that share a program and leave a rest; odd rows; one entry; three parts; rows of several blocks.
@pytest.mark.parametrize("shape", [(37, 40), (3, 33), (1, 1), (2, 384), (3, 1152), (2, 9000)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@REDUCTIONS
@pytest.mark.usefixtures("poisoned")
def test_loss_and_gradients_are_no_worse_than_plain_torch(shape, dtype, reduction):
    check(*pair(*shape, dtype), reduction)


@pytest.mark.parametrize("tile", ["batch", WALKED], ids=str)
@REDUCTIONS
@pytest.mark.usefixtures("poisoned")
def test_row_weights_and_an_incoming_gradient_in_every_kind_of_tile(monkeypatch, tile, reduction):
    """Rows and columns of a program beyond the last ones have no effect."""
    monkeypatch.setattr(
        cm, "row_tile_of", lambda dtype, N, H: row_tile_of(dtype, 10**6, H) if tile == "batch" else tile
    )
    grad_loss = torch.rand(5 if reduction == NONE else ()) + 0.5
    check(*pair(5, 77), reduction, grad_loss=grad_loss, row_weight=torch.tensor([0.5, 0.0, 2.0, 1.0, 3.0]))


@pytest.mark.parametrize("weights", [TERMS, (0.0, 0.9, 0.0, 0.0)], ids=["every term", "squares"])
@REDUCTIONS
@pytest.mark.usefixtures("poisoned")
def test_without_a_loss_the_gradient_has_the_same_bits(weights, reduction):
    output, target = pair(5, 77)
    grad = torch.full_like(output, math.nan)
    arguments = (output, target, None, None, None, reduction, weights, 0.5, 1e-8)
    for launch in cm.forward_launches(*arguments, None, grad, None):
        assert launch.kernel is not cm._sum_kernel
        launch.run()
    assert torch.equal(grad, run(cm.cosine_mse_forward, output, target, reduction, weights=weights)[1])


@pytest.mark.usefixtures("poisoned")
def test_sums_of_many_programs_are_added_in_steps(monkeypatch):
    """There are three partial sums of weights, and the sums of 45 programs take six and twelve steps."""
    for name, value in (("_WEIGHT_SUMS", 4), ("_WEIGHT_BLOCK", 8), ("_PARTIAL_BLOCK", 8), ("_ROOT_BLOCK", 4)):
        monkeypatch.setattr(cm, name, value)
    monkeypatch.setattr(cm, "row_tile_of", lambda dtype, N, H: RowTile(1, 8, 1, 1))
    check(*pair(45, 6), MEAN, row_weight=torch.rand(45))


# The authors' schedule of alpha at its start, middle and end; above 1.
@pytest.mark.parametrize("alpha", [0.999, 0.55, 0.1, 2.7])
def test_the_power_of_small_and_of_great_errors(alpha):
    """A logarithm in one fp32 number, or that of the hardware, would have ten times the error."""
    sizes = torch.logspace(-10, 8, 4096)
    output = sizes * torch.where(torch.arange(4096) % 2 == 0, 1.0, -1.0)
    weights = (0.0, 0.0, 0.0, 4096.0 / alpha)
    options = dict(weights=weights, alpha=alpha, needs=(True, False))
    rows = output[None], torch.zeros(1, 4096)
    ours, plain = (
        run(function, *rows, SUM, **options)[1].double()
        for function in (cm.cosine_mse_forward, reference.cosine_mse_forward)
    )
    power = (rows[0].double().abs() + 1e-10) ** (alpha - 1) * rows[0].sign()
    errors = [float(((grad - power) / power).abs().max()) for grad in (ours, plain)]
    assert errors[0] <= 2 * errors[1], errors


@pytest.mark.parametrize("term", range(4))
@pytest.mark.usefixtures("poisoned")
def test_each_term_by_itself_with_known_norms(term):
    weights = tuple(2.0 * (i == term) for i in range(4))
    output, target = pair(4, 48)
    for alpha in (1.0, 0.1, 2.5) if term == 3 else (1.0,):
        norm = target.norm(dim=1)
        check(output, target, MEAN, grads=1, weights=weights, alpha=alpha, target_norm=norm)


@pytest.mark.usefixtures("poisoned")
def test_fp64_sums_in_fp64():
    output, target = pair(6, 33, torch.float64)
    for reduction in (NONE, MEAN):
        got = run(cm.cosine_mse_forward, output, target, reduction)
        assert_close(list(got), exact(output, target, reduction), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("tile", [None, WALKED], ids=str)
@pytest.mark.usefixtures("poisoned")
def test_rows_whose_squares_leave_fp32(monkeypatch, tile):
    if tile is not None:
        monkeypatch.setattr(cm, "row_tile_of", lambda dtype, N, H: tile)
    scales = [(1e20, 1e20), (1e-20, 1e20), (1e20, 1e-20), (1.0, 1.0), (1e-20, 1e-15), (1e-20, 1e-20)]
    output, target = pair(len(scales), 77)
    output, target = (
        each * torch.tensor(s)[:, None]
        for each, s in zip((output, target), zip(*scales, strict=True), strict=True)
    )
    # As a loss, the square of 1e20 is beyond fp32; the root and the direction are within.
    options = dict(weights=(1.0, 0.0, 0.5, 0.2), eps=1e-36)
    ours = run(cm.cosine_mse_forward, output, target, NONE, **options)
    for got, true in zip(ours, exact(output, target, NONE, **options), strict=True):
        for row, expected in zip(got, true, strict=True):
            assert_no_worse_than(row, row, expected)  # It checks that the row is finite.
            assert_close(row.double(), expected, rtol=2e-5, atol=2e-6 * float(expected.abs().max()))
    root = run(cm.cosine_mse_forward, output, target, MEAN, weights=(0.0, 0.0, 1.0, 0.0))
    for got, true in zip(root, exact(output, target, MEAN, weights=(0.0, 0.0, 1.0, 0.0)), strict=True):
        assert_close(got.double(), true, rtol=2e-6, atol=1e-44)  # The atol is the least fp32 number.


def test_a_row_of_weight_zero_is_not_in_the_root_however_wrong():
    output, target = pair(3, 40)
    weight = torch.tensor([1.0, 0.0, 2.0])
    output[1] = 1e25
    loss = run(cm.cosine_mse_forward, output, target, MEAN, weights=(0.7, 0.0, 0.3, 0.2), row_weight=weight)[
        0
    ]
    expected = exact(output, target, MEAN, weights=(0.7, 0.0, 0.3, 0.2), row_weight=weight)[0]
    assert_close(loss.double(), expected, rtol=1e-6, atol=0.0)


@pytest.mark.usefixtures("poisoned")
def test_zero_and_equal_rows_are_defined():
    target = torch.ones(3, 4)
    target[0] = 0
    output = torch.tensor([0.0, 0.0, 1.0])[:, None].expand(3, 4).contiguous()
    loss, grad_output, grad_target = run(cm.cosine_mse_forward, output, target, NONE, eps=1e-6)
    unit = TERMS[1] + TERMS[2] + TERMS[3]
    assert_close(
        loss, torch.tensor([TERMS[0], TERMS[0] + unit, 0.0]) + TERMS[3] * 1e-5 * torch.tensor([1, 0, 1])
    )
    assert not grad_output[0].any()
    assert not grad_target[0].any()
    assert_close(grad_output[1], torch.full((4,), -TERMS[0] / 1e-6))
    assert_close(grad_output[2], torch.zeros(4), rtol=0, atol=1e-7)


@pytest.mark.usefixtures("poisoned")
def test_a_nan_stays_in_its_row():
    output, target = pair(6, 40)  # These rows share a program.
    output[2, 5] = math.nan
    for reduction in (NONE, SUM):
        loss, *grads = run(cm.cosine_mse_forward, output, target, reduction)
        assert torch.equal(loss.isnan(), torch.arange(6) == 2 if reduction == NONE else torch.tensor(True))
        for grad in grads:
            assert torch.equal(grad.isnan().any(1), torch.arange(6) == 2)
            assert grad[2, 5].isnan()
    assert run(cm.cosine_mse_forward, output, target, MEAN)[0].isnan()


def test_only_what_is_asked_for_and_one_pass_over_the_rows(monkeypatch):
    launched = []
    run_launch = Launch.run
    monkeypatch.setattr(Launch, "run", lambda self: (launched.append(self.kernel.__name__), run_launch(self)))
    output, target = pair(3, 16)
    passes = {(NONE, 0.0): 1, (NONE, 0.5): 1, (SUM, 0.5): 1, (MEAN, 0.0): 1, (MEAN, 0.5): 2}
    for (reduction, rmse), expected in passes.items():
        for needs in ((True, False), (False, True), (False, False)):
            launched.clear()
            weights = (1.0, 1.0, rmse, 0.0)
            got = run(cm.cosine_mse_forward, output, target, reduction, weights=weights, needs=needs)
            assert [each.shape for each in got[1:]] == [(3, 16) if needed else (0,) for needed in needs]
            assert launched.count("_cosine_mse_kernel") == (expected if any(needs) else 1)


def test_no_rows_launch_nothing(monkeypatch):
    monkeypatch.setattr(Launch, "run", lambda self: pytest.fail("launched"))
    empty = torch.empty(0, 4)
    for reduction, expected in (
        (NONE, empty[:, 0]),
        (MEAN, torch.tensor(math.nan)),
        (SUM, torch.tensor(0.0)),
    ):
        loss, *grads = run(cm.cosine_mse_forward, empty, empty, reduction)
        assert torch.equal(loss.nan_to_num(7), expected.nan_to_num(7))
        assert [grad.shape for grad in grads] == [(0, 4), (0, 4)]
    scale_gradient_(empty, torch.tensor(2.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_the_public_loss_and_its_backward(dtype):
    output, target = (each.requires_grad_() for each in pair(4, 21, dtype))
    loss = cosine_mse_loss(output, target, rmse_weight=0.5, power_weight=0.1, alpha=0.5, backend="triton")
    (3 * loss).backward()
    weights = (1.0, 1.0, 0.5, 0.1)
    true = exact(output.detach(), target.detach(), MEAN, torch.tensor(3.0), weights=weights)
    # One rounding to fp16, or sums of 21 terms in fp32.
    tolerance = dict(rtol=2**-11 + 1e-5, atol=1e-6) if dtype == torch.float16 else dict(rtol=2e-6, atol=1e-6)
    assert_close([loss.detach().double(), output.grad.double(), target.grad.double()], true, **tolerance)


def test_the_raw_ops_pass_opcheck():
    utils = ("test_schema", "test_faketensor")
    weight = torch.rand(3)
    arguments = (*pair(3, 8), weight, None, None, MEAN, *TERMS, 0.5, 1e-8, True, False)
    torch.library.opcheck(torch.ops.embkern.cosine_mse_forward.triton, arguments, test_utils=utils)
    torch.library.opcheck(
        torch.ops.embkern.scale_gradient_.triton, (torch.rand(3, 8), weight), test_utils=utils
    )


# One block and a rest, or a rest alone; rows in one step and in several.
@pytest.mark.parametrize("shape", [(9, 1000), (5, 7)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_scaled_gradients(shape, dtype):
    grad = torch.randn(shape).to(dtype)
    for factor in (torch.tensor(-2.5), torch.randn(shape[0])):
        got = grad.clone()
        scale_gradient_(got, factor)
        assert torch.equal(got, (grad.float() * (factor if factor.dim() == 0 else factor[:, None])).to(dtype))


def test_a_factor_of_one_touches_nothing():
    """Arithmetic would turn a signalling NaN into a quiet one."""
    signalling = torch.full((6, 40), 0x7F800001, dtype=torch.int32)
    grad = signalling.clone().view(torch.float32)
    scale_gradient_(grad, torch.tensor(1.0))
    assert torch.equal(grad.view(torch.int32), signalling)
    factor = torch.tensor([1.0, 2.0, 1.0, math.nan, 1.0, 0.0])
    scale_gradient_(grad, factor)
    assert torch.equal((grad.view(torch.int32) != signalling).all(1), factor != 1)
    assert torch.equal((grad.view(torch.int32) != signalling).any(1), factor != 1)


def lazy(N, H):
    """Rows whose memory exists only where it is accessed."""
    return torch.empty(0, dtype=torch.float16).set_(torch.UntypedStorage(N * H * 2), 0, (N, H), (H, 1))


def test_offsets_beyond_two_to_the_31st(monkeypatch):
    """Only the last programs run: row 2^25 of 64 columns starts at element 2^31."""
    N, H = 2**25 + 3, 64
    output, target, grad = lazy(N, H), lazy(N, H), lazy(N, H)
    output[-3:], target[-3:] = pair(3, H, torch.float16)
    loss = torch.empty(N)
    (launch,) = cm.forward_launches(
        output, target, None, None, None, NONE, TERMS, 0.5, 1e-8, loss, grad, None
    )
    builder, block = interpreter.interpreter_builder, launch.arguments["BLOCK_N"]
    first = (N - 3) // block
    assert launch.grid == (-(-N // block),)
    monkeypatch.setattr(
        builder, "set_grid_idx", lambda x, y, z: setattr(builder, "grid_idx", (first + x, y, z))
    )
    replace(launch, grid=(launch.grid[0] - first,)).run()
    expected = run(reference.cosine_mse_forward, output[-3:], target[-3:], NONE)
    assert_close((loss[-3:], grad[-3:]), expected[:2])
