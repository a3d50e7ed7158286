"""cosine_mse_loss: numbers against float64, gradients, edge rows, bad input, torch's transforms."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from embkern.ops import cosine_mse_loss, reference

from ..conftest import assert_no_worse_than, compile_counting

OP = "cosine_mse"


def plain(y, x, cosine_weight=1.0, mse_weight=1.0, row_weight=None):
    rows = cosine_weight * (1 - F.cosine_similarity(x, y, dim=-1)) + mse_weight * (x - y).square().mean(-1)
    return rows.mean() if row_weight is None else (row_weight * rows).sum() / row_weight.sum()


def rows(N, H, dtype=torch.float32, device="cpu"):
    target = torch.randn(N, H, device=device)
    return (target + 0.5 * torch.randn(N, H, device=device)).to(dtype), target.to(dtype)


@pytest.mark.parametrize("shape", [(32, 384), (7, 33), (1, 1), (129, 768)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.usefixtures("poisoned")
def test_loss_and_gradients_are_no_worse_than_plain_torch(backend, device, shape, dtype):
    pair = rows(*shape, dtype, device)
    weight = torch.rand(shape[0], device=device) + 0.1
    results = []
    for function, cast in (
        (lambda *a, row_weight: cosine_mse_loss(*a, row_weight=row_weight, backend=backend), dtype),
        (lambda *a, row_weight: plain(*a, row_weight=row_weight), dtype),
        (lambda *a, row_weight: plain(*a, row_weight=row_weight), torch.float64),
    ):
        leaves = [each.to(cast, copy=True).requires_grad_() for each in pair]
        loss = function(*leaves, row_weight=weight.to(cast) if cast == torch.float64 else weight)
        loss.backward()
        results.append([loss.detach(), *(leaf.grad for leaf in leaves)])
    assert results[0][0].dtype == torch.float32
    tiny = 1e-6 if dtype == torch.float32 else float(torch.finfo(dtype).eps)
    for ours, native, exact in zip(*results, strict=True):
        if exact.norm() > 1e-12:  # one dimension has no direction to get wrong
            assert_no_worse_than(ours, native, exact, tiny)


@pytest.mark.parametrize(("cosine_weight", "mse_weight"), [(1.0, 1.0), (0.2, 0.0), (0.0, 3.0)])
@pytest.mark.parametrize("weighted", [True, False])
def test_gradcheck(backend, device, cosine_weight, mse_weight, weighted):
    pair = [each.requires_grad_() for each in rows(5, 4, torch.float64, device)]
    weight = torch.rand(5, dtype=torch.float64, device=device) if weighted else None
    assert torch.autograd.gradcheck(
        lambda y, x: cosine_mse_loss(
            y, x, cosine_weight=cosine_weight, mse_weight=mse_weight, row_weight=weight, backend=backend
        ),
        pair,
    )


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
    # every row has one zero side, so cosine 0 and distance 1; the errors are 0, 1 and 4 per entry
    assert_close(loss, torch.tensor(1 + (0 + 1 + 4) / 3, dtype=torch.float64, device=device))
    loss.backward()
    assert torch.isfinite(output.grad).all()
    assert torch.equal(output.grad[0], torch.zeros_like(output.grad[0]))
    assert_close(output.grad[1], (-1 / 1e-6 / 3 - 2 / 4 / 3) * target[1])


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
    assert cosine_mse_loss(empty, empty, backend=backend).isnan()
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
        (dict(output=torch.zeros(3, 0), target=torch.zeros(3, 0)), ValueError, "H >= 1"),
        (dict(eps=0.0), ValueError, "eps: expected at least 1.18e-38, got 0.0"),
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


def test_raw_ops_pass_opcheck(native):
    output, target = rows(5, 8)
    ops, scalars = torch.ops.embkern, (1.0, 1.0, 1e-8)
    for weight in (torch.rand(5), None):
        torch.library.opcheck(ops.cosine_mse_forward.native, (output, target, weight, *scalars))
        _, stats = ops.cosine_mse_forward.native(output, target, weight, *scalars)
        arguments = (torch.tensor(1.0), output, target, weight, stats, *scalars)
        torch.library.opcheck(ops.cosine_mse_backward.native, arguments)


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


def test_reference_backward_is_autograd_of_its_forward():
    output, target = rows(6, 8, torch.float64)
    leaf = output.clone().requires_grad_()
    loss, stats = reference.cosine_mse_forward(leaf, target, None, 0.7, 0.3, 1e-8)
    loss.backward()
    got = reference.cosine_mse_backward(
        torch.ones_like(loss), output, target, None, stats.detach(), 0.7, 0.3, 1e-8
    )
    assert_close(got, leaf.grad)
