"""cosine_mse_loss: numbers against float64, gradients, edge rows, bad input, torch's transforms."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from embkern.ops import cosine_mse_loss, library, reference
from tests.conftest import assert_no_worse_than, compile_counting

OP = "cosine_mse"


TERMS = {
    "cosine and mse": dict(),
    "all": dict(cosine_weight=0.7, mse_weight=0.3, rmse_weight=0.2, power_weight=0.4, alpha=0.6),
    "cosine": dict(cosine_weight=0.2, mse_weight=0.0),
    "mse": dict(cosine_weight=0.0, mse_weight=3.0),
    "rmse": dict(cosine_weight=0.0, mse_weight=0.0, rmse_weight=1.5),
    "power": dict(cosine_weight=0.0, mse_weight=0.0, power_weight=1.0, alpha=0.1),
}
DEFAULTS = dict(cosine_weight=1.0, mse_weight=1.0, rmse_weight=0.0, power_weight=0.0, alpha=1.0)


def plain(y, x, row_weight=None, reduction="mean", **terms):
    """The formula of the docstring in torch functions, as a user would write it."""
    chosen = {**DEFAULTS, **terms}
    w = torch.ones_like(y[..., 0]) if row_weight is None else row_weight
    mse = (y - x).square().mean(-1)
    rows = chosen["cosine_weight"] * (1 - F.cosine_similarity(x, y, dim=-1)) + chosen["mse_weight"] * mse
    if chosen["power_weight"]:
        rows = rows + chosen["power_weight"] * ((y - x).abs() + 1e-10).pow(chosen["alpha"]).mean(-1)
    if reduction == "mean":
        loss = (w * rows).sum() / w.sum()
        weight = chosen["rmse_weight"]
        return loss + weight * ((w * mse).sum() / w.sum()).sqrt() if weight else loss
    rows = w * (rows + chosen["rmse_weight"] * mse.sqrt() if chosen["rmse_weight"] else rows)
    return rows.sum() if reduction == "sum" else rows


def rows(N, H, dtype=torch.float32, device="cpu"):
    target = torch.randn(N, H, device=device)
    return (target + 0.5 * torch.randn(N, H, device=device)).to(dtype), target.to(dtype)


@pytest.mark.parametrize("shape", [(32, 384), (7, 33), (1, 40), (129, 768)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("terms", ["cosine and mse", "rmse", "power"])
@pytest.mark.usefixtures("poisoned")
def test_loss_and_gradients_are_no_worse_than_plain_torch(backend, device, shape, dtype, terms):
    output, target = rows(*shape, device=device)
    if terms == "power":  # Its slope is infinite at 0, where the rounding of the inputs is decisive.
        error = output - target
        output = target + torch.where(error < 0, error - 0.1, error + 0.1)
    pair = (output.to(dtype), target.to(dtype))
    weight = torch.rand(shape[0], device=device) + 0.1
    results = []
    for function, cast in (
        (lambda *a, **k: cosine_mse_loss(*a, **k, backend=backend), dtype),
        (plain, dtype),
        (plain, torch.float64),
    ):
        leaves = [each.to(cast, copy=True).requires_grad_() for each in pair]
        w = weight.to(cast) if cast == torch.float64 else weight
        loss = function(*leaves, row_weight=w, **TERMS[terms])
        loss.backward()
        results.append([loss.detach(), *(leaf.grad for leaf in leaves)])
    assert results[0][0].dtype == torch.float32
    for ours, native, exact in zip(*results, strict=True):
        # Eight ulps: the loss is fp32 for every dtype, and plain torch's may be exact by chance.
        assert_no_worse_than(ours, native, exact, tiny=2**-21)


@pytest.mark.parametrize("terms", ["cosine and mse", "rmse"])
@pytest.mark.usefixtures("poisoned")
def test_one_column_has_no_direction(backend, device, terms):
    """The gradient of the cosine is two terms 1 / |y| that cancel, with up to eight roundings each."""
    output, target = rows(300, 1, device=device)
    options = dict(DEFAULTS | TERMS[terms], reduction="sum", backend=backend)
    leaves = [each.clone().requires_grad_() for each in (output, target)]
    cosine_mse_loss(*leaves, **options).backward()
    wide = [each.double().requires_grad_() for each in (output, target)]
    plain(*wide, reduction="sum", **TERMS[terms]).backward()
    for leaf, exact in zip(leaves, wide, strict=True):
        of_cosine = options["cosine_weight"] / exact.detach().abs()
        of_error = 2 * options["mse_weight"] * (wide[0] - wide[1]).detach().abs() + options["rmse_weight"]
        assert ((leaf.grad - exact.grad).abs() <= 2**-24 * (16 * of_cosine + 8 * of_error)).all()


@pytest.mark.parametrize("terms", TERMS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("weighted", [True, False])
def test_gradcheck(backend, device, terms, reduction, weighted):
    pair = [each.requires_grad_() for each in rows(5, 4, torch.float64, device)]
    weight = torch.rand(5, dtype=torch.float64, device=device) if weighted else None
    options = dict(row_weight=weight, reduction=reduction, **TERMS[terms])
    assert torch.autograd.gradcheck(lambda y, x: cosine_mse_loss(y, x, **options, backend=backend), pair)
    detached = [each.detach() for each in pair]
    assert_close(cosine_mse_loss(*detached, **options, backend=backend), plain(*detached, **options))


def test_a_known_norm_of_the_target_changes_nothing(backend, device):
    output, target = rows(6, 40, device=device)
    output.requires_grad_()
    results = []
    for norm in (None, target.norm(dim=-1)):
        loss = cosine_mse_loss(output, target, target_norm=norm, backend=backend)
        results.append((loss, *torch.autograd.grad(loss, output)))
    for known, computed in zip(*results, strict=True):
        assert_close(known, computed)
    with pytest.raises(ValueError, match="target_norm: expected None where target requires a gradient"):
        cosine_mse_loss(output, target.requires_grad_(), target_norm=norm, backend=backend)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("norms", [(1e-20, 1e20), (1e20, 1e20), (1e20, 1e-20), (1e-18, 1e-18)], ids=str)
def test_norms_near_the_ends_of_fp32(backend, device, norms, reduction):
    output, target = rows(4, 64, device=device)
    pair = [(norm / 8 * each).requires_grad_() for norm, each in zip(norms, (output, target), strict=True)]
    wide = [each.detach().double().requires_grad_() for each in pair]
    for terms in (dict(mse_weight=0.0), dict(cosine_weight=0.0, mse_weight=0.0, rmse_weight=1.0)):
        options = dict(eps=1e-37, reduction=reduction, backend=backend, **terms)
        loss = cosine_mse_loss(*pair, **options)
        exact = cosine_mse_loss(*wide, **{**options, "backend": "torch"})
        assert_close(loss.double(), exact, rtol=2e-6, atol=0)
        grads = torch.autograd.grad(loss.sum(), pair)
        for got, expected in zip(grads, torch.autograd.grad(exact.sum(), wide), strict=True):
            largest = expected.abs().max()
            assert_close(got.double() / largest, expected / largest, rtol=0, atol=2e-6)


def test_the_gradient_of_the_mean_survives_fp16(backend, device):
    output, target = rows(2048, 32, torch.float16, device)
    output.requires_grad_()
    loss = cosine_mse_loss(output, target, cosine_weight=0.0, mse_weight=1e-3, backend=backend)
    (got,) = torch.autograd.grad(
        65536 * loss, output
    )  # This is the work of a loss scaler; unscaled, it is 0.
    exact = 65536 * 1e-3 * 2 * (output.detach().double() - target.double()) / output.numel()
    # One rounding of normal fp16 numbers, half a step of subnormal ones.
    assert_close(got.double(), exact, rtol=2**-11 + 1e-6, atol=2**-25)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_the_slope_of_a_root_of_subnormal_numbers(backend, device, reduction):
    output = torch.tensor([[3e-40, -4e-40]], device=device, requires_grad=True)
    options = dict(cosine_weight=0.0, mse_weight=0.0, rmse_weight=1.0, reduction=reduction)
    loss = cosine_mse_loss(output, torch.zeros(1, 2, device=device), **options, backend=backend)
    (got,) = torch.autograd.grad(loss.sum(), output)
    assert_close(got, torch.tensor([[0.6, -0.8]], device=device) / 2**0.5, rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_the_sum_of_the_rows_losses_has_the_gradient_of_the_sum(backend, device, dtype):
    """The gradient of each row's loss is then one number, expanded to all rows."""
    pair = rows(5, 8, dtype, device)
    grads = []
    for loss_of in (
        lambda *pair: cosine_mse_loss(*pair, reduction="none", backend=backend).sum(),
        lambda *pair: cosine_mse_loss(*pair, reduction="sum", backend=backend),
    ):
        leaves = [each.clone().requires_grad_() for each in pair]
        grads.append(torch.autograd.grad(loss_of(*leaves), leaves))
    for ours, expected in zip(*grads, strict=True):
        assert_close(ours, expected)


def test_a_kept_graph_gives_the_same_gradient_twice(backend, device):
    output, target = rows(6, 8, device=device)
    output.requires_grad_()
    for scale in (1, 3):
        loss = scale * cosine_mse_loss(output, target, backend=backend)
        (first,) = torch.autograd.grad(loss, output, retain_graph=True)
        kept = first.clone()
        (second,) = torch.autograd.grad(loss, output, retain_graph=True)
        second.mul_(0)  # The caller may modify a gradient.
        (third,) = torch.autograd.grad(loss, output)
        assert torch.equal(first, kept)
        assert torch.equal(third, kept)


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_an_upstream_gradient_of_every_reduction(backend, device, reduction):
    pair = [each.requires_grad_() for each in rows(6, 8, torch.float64, device)]
    incoming = torch.rand(6 if reduction == "none" else (), dtype=torch.float64, device=device)
    got = torch.autograd.grad(cosine_mse_loss(*pair, reduction=reduction, backend=backend), pair, incoming)
    expected = torch.autograd.grad(plain(*pair, reduction=reduction), pair, incoming)
    for ours, theirs in zip(got, expected, strict=True):
        assert_close(ours, theirs)


def test_an_upstream_gradient_scales_the_gradient(backend, device):
    output, target = rows(6, 8, device=device)
    output.requires_grad_()
    (once,) = torch.autograd.grad(cosine_mse_loss(output, target, backend=backend), output)
    (thrice,) = torch.autograd.grad(3 * cosine_mse_loss(output, target, backend=backend), output)
    assert_close(thrice, 3 * once)


def test_zero_rows_are_defined(backend, device):
    target = torch.zeros(3, 4, dtype=torch.float64, device=device)
    target[1] = 1.0
    output = torch.zeros_like(target)
    output[2] = 2.0
    output.requires_grad_()
    loss = cosine_mse_loss(output, target, eps=1e-6, backend=backend)
    # One side of every row is zero: the distance is 1. The squared errors are 0, 1 and 4 per entry.
    assert_close(loss, torch.tensor(1 + (0 + 1 + 4) / 3, dtype=torch.float64, device=device))
    loss.backward()
    assert torch.isfinite(output.grad).all()
    assert torch.equal(output.grad[0], torch.zeros_like(output.grad[0]))
    assert_close(output.grad[1], (-1 / 1e-6 / 3 - 2 / 4 / 3) * target[1])


@pytest.mark.parametrize("terms", TERMS)
def test_identical_rows_have_no_gradient(backend, device, terms):
    _, target = rows(3, 16, torch.float64, device)
    output = target.clone().requires_grad_()
    cosine_mse_loss(output, target, **TERMS[terms], backend=backend).backward()
    assert_close(output.grad, torch.zeros_like(output), rtol=0, atol=1e-15)


@pytest.mark.parametrize(("factor", "distance"), [(1.0, 0.0), (3.0, 0.0), (-2.0, 2.0)])
def test_parallel_and_antiparallel_rows(backend, device, factor, distance):
    _, target = rows(4, 16, torch.float64, device)
    loss = cosine_mse_loss(factor * target, target, mse_weight=0.0, backend=backend)
    assert_close(loss, torch.tensor(distance, dtype=torch.float64, device=device))


def test_a_nan_row_is_not_hidden_and_stays_in_its_row(backend, device):
    output, target = rows(4, 8, device=device)
    output[2, 3] = float("nan")
    output.requires_grad_()
    loss = cosine_mse_loss(output, target, backend=backend)
    assert loss.isnan()
    loss.backward()
    assert output.grad[2].isnan().all()
    assert torch.isfinite(output.grad[[0, 1, 3]]).all()


def test_leading_shapes_and_mixed_dtypes(backend, device):
    output, target = rows(6, 8, device=device)
    weight = torch.rand(6, device=device)
    flat = cosine_mse_loss(output, target, row_weight=weight, backend=backend)
    folded = [each.view(2, 3, *each.shape[1:]) for each in (output, target, weight)]
    assert torch.equal(cosine_mse_loss(*folded[:2], row_weight=folded[2], backend=backend), flat)
    half = output.bfloat16().requires_grad_()
    loss = cosine_mse_loss(half, target, backend=backend)
    assert_close(loss, cosine_mse_loss(half.float(), target, backend=backend))
    loss.backward()
    assert half.grad.dtype == torch.bfloat16


def test_no_rows_give_nan_like_mse_loss(backend, device):
    empty = torch.zeros(0, 4, device=device)
    for weight in (None, empty[:, 0]):
        assert cosine_mse_loss(empty, empty, row_weight=weight, backend=backend).isnan()
        assert cosine_mse_loss(empty, empty, row_weight=weight, reduction="sum", backend=backend) == 0
    assert F.mse_loss(empty, empty).isnan()


def test_non_contiguous_arguments(backend, device):
    output, target = rows(8, 6, device=device)
    strided = output.t().contiguous().t()
    assert torch.equal(
        cosine_mse_loss(strided, target, backend=backend), cosine_mse_loss(output, target, backend=backend)
    )


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(target=torch.zeros(3, 5)), ValueError, r"equal shapes \(\*, H\) .* got \(3, 4\) and \(3, 5\)"),
        (dict(output=torch.tensor(1.0), target=torch.tensor(1.0)), ValueError, "equal shapes"),
        (dict(output=torch.zeros(3, 4, dtype=torch.int64)), TypeError, "output: expected a floating-point"),
        (dict(target=torch.zeros(3, 4, device="meta")), ValueError, "target: expected device cpu"),
        (dict(row_weight=torch.ones(4)), ValueError, r"row_weight: expected shape \(3,\), got \(4,\)"),
        (dict(row_weight=torch.ones(3, requires_grad=True)), ValueError, "row_weight: .* without gradient"),
        (dict(row_weight=torch.ones(3).cfloat()), TypeError, "row_weight: expected a real dtype"),
        (dict(output=torch.zeros(3, 0), target=torch.zeros(3, 0)), ValueError, "H >= 1"),
        (dict(eps=0.0), ValueError, "eps: expected at least 1.18e-38, got 0.0"),
        (dict(alpha=0.0), ValueError, "alpha: expected a positive number, got 0.0"),
        (
            dict(reduction="batchmean"),
            ValueError,
            "reduction: expected one of none, mean, sum, got 'batchmean'",
        ),
        (dict(target_norm=torch.ones(4)), ValueError, r"target_norm: expected shape \(3,\), got \(4,\)"),
        (dict(eps=1e-46), ValueError, "eps: expected at least 1.18e-38, got 1e-46"),
        (dict(backend="eager"), ValueError, "backend: expected one of"),
    ],
)
def test_bad_arguments_are_named(change, error, message):
    with pytest.raises(error, match=message):
        cosine_mse_loss(**dict(output=torch.zeros(3, 4), target=torch.zeros(3, 4)) | change)


def test_no_dtype_change_under_autocast(backend, device):
    output, target = rows(5, 8, device=device)
    output.requires_grad_()
    with torch.autocast(device, dtype=torch.bfloat16):
        loss = cosine_mse_loss(output, target, backend=backend)
    assert loss.dtype == torch.float32
    assert_close(loss, cosine_mse_loss(output, target, backend=backend))


def test_raw_op_passes_opcheck(native):
    output, target = rows(5, 8)
    op = torch.ops.embkern.cosine_mse_forward.native
    for weight, norm, grad_loss, reduction in (
        (torch.rand(5), None, torch.tensor(2.0), reference.MEAN),
        (None, target.norm(dim=1), torch.rand(5), reference.NONE),
    ):
        for needs in ((True, True), (False, False)):
            arguments = (output, target, weight, norm, grad_loss, reduction, 1.0, 1.0, 0.5, 0.5, 0.7, 1e-8)
            torch.library.opcheck(op, (*arguments, *needs))


def test_the_same_bits_for_any_number_of_threads(native):
    output, target = rows(1000, 50)
    output.requires_grad_()
    before, results = torch.get_num_threads(), []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        loss = cosine_mse_loss(output, target, backend=native)
        results.append((loss, *torch.autograd.grad(loss, output)))
    torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_compiles_to_one_graph_without_recompiling(backend, device):
    compiled, graphs = compile_counting(lambda y, x: cosine_mse_loss(y, x, backend=backend))
    for count in (5, 9, 33):
        output, target = rows(count, 8, device=device)
        output.requires_grad_()
        (got,) = torch.autograd.grad(compiled(output, target), output)
        (expected,) = torch.autograd.grad(cosine_mse_loss(output, target, backend=backend), output)
        assert_close(got, expected)
    assert len(graphs) == 2, "one forward and one backward graph for every number of rows"


def test_functional_grad_and_forward_mode(backend, device):
    output, target = rows(5, 8, torch.float64, device)
    got = torch.func.grad(lambda y: cosine_mse_loss(y, target, backend=backend))(output)
    leaf = output.clone().requires_grad_()
    plain(leaf, target).backward()
    assert_close(got, leaf.grad)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(output, torch.ones_like(output))
        with pytest.raises(NotImplementedError, match="jvp"):
            cosine_mse_loss(dual, target, backend=backend)


def test_a_second_derivative_is_refused_not_dropped(backend, device):
    output, target = rows(5, 8, device=device)
    output.requires_grad_()
    loss = cosine_mse_loss(output, target, backend=backend)
    (grad,) = torch.autograd.grad(loss, output, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        (loss + grad.square().sum()).backward()
    with pytest.raises(RuntimeError, match="differentiable once"):
        inner = torch.func.grad(lambda y: cosine_mse_loss(y, target, backend=backend))
        torch.func.grad(lambda y: inner(y).square().sum())(output.detach())


@pytest.mark.parametrize(("alpha", "largest"), [(0.1, 30), (0.55, 30), (1.0, 30), (2.0, 18)])
def test_every_instruction_set_computes_the_power_term(native, alpha, largest):
    before = library.cpu_capability()
    sign = torch.tensor([1.0, -1.0]).repeat(2050)[:4099]  # The length leaves a rest for every vector length.
    output = (torch.logspace(-12, largest, 4099) * sign)[None]
    output[0, 7] = 0
    wide = output.double().requires_grad_()
    (expected,) = torch.autograd.grad((wide.abs() + 1e-10).pow(alpha).mean(), wide)
    try:
        for level in library.CPU_CAPABILITIES[: library.CPU_CAPABILITIES.index(before) + 1]:
            library.cpu_capability(level)
            leaf = output.clone().requires_grad_()
            terms = dict(cosine_weight=0.0, mse_weight=0.0, power_weight=1.0, alpha=alpha)
            cosine_mse_loss(leaf, torch.zeros_like(leaf), **terms, backend=native).backward()
            assert_close(leaf.grad.double(), expected, rtol=1e-6, atol=0)
    finally:
        library.cpu_capability(before)
