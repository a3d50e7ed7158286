"""gather_project: numbers against float64, gradients."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from embkern.ops import gather_project, reference
from embkern.ops.library import cpu_capability
from tests.conftest import assert_no_worse_over_draws, assert_no_worse_than
from tests.ops.conftest import assert_rounded_once
from tests.ops.factorised_problems import plain, problem, skip_without_float64

OP = "gather_project"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# (V, r, H, N): even; odd everything and more rows than a block; rank 1; one token; the table of the paper.
SHAPES = [(64, 16, 64, 96), (101, 63, 77, 149), (37, 1, 5, 8), (50, 257, 33, 1), (30522, 75, 384, 333)]


def draw(shape, dtype, backend=None, device="cpu"):
    """Rows and gradients of a new problem: ours, those of plain torch, and those of float64."""
    ids, *factors = problem(shape, dtype, device)
    upstream = torch.randn(len(ids), shape[2], device=device).to(dtype)
    results = []
    for function, cast in (
        (lambda *a: gather_project(*a, backend=backend), dtype),
        (plain, dtype),
        (plain, torch.float64),
    ):
        leaves = [f.to(cast, copy=True).requires_grad_() for f in factors]
        out = function(ids, *leaves)
        out.backward(upstream.to(cast))
        results.append([out.detach(), *(leaf.grad for leaf in leaves)])
    assert all(each.dtype == dtype for each in results[0])
    return results


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.usefixtures("poisoned")
def test_every_instruction_set_keeps_the_numerical_contract(level, dtype):
    assert cpu_capability() == level
    # Also more rows than are packed, few rows in wide tiles, long sums, a rank beyond a block of sums.
    for shape in [*SHAPES, (500, 130, 95, 25), (500, 19, 300, 4), (40, 300, 33, 700), (30, 600, 40, 20)]:
        assert_no_worse_over_draws(lambda: draw(shape, dtype))  # noqa: B023


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_bits_of_a_row_do_not_depend_on_its_batch(level, dtype):
    _, *factors = problem((300, 150, 210, 1), dtype)
    rows = gather_project(torch.arange(300), *factors)
    for count in (1, 2, 5, 11, 12, 23, 25, 97, 300):
        ids = torch.randint(0, 300, (count,))
        assert torch.equal(gather_project(ids, *factors), rows[ids]), count


@pytest.mark.parametrize("special", [float("nan"), float("inf"), 1e30], ids=str)
def test_narrow_outputs_round_like_torch(level, special):
    for dtype in (torch.bfloat16, torch.float16):
        codes = torch.tensor([[1.0], [special], [1 + 2**-8], [3.0]]).to(dtype)
        basis = torch.tensor([[1.0, 1 + 2**-7, -0.5]]).to(dtype).repeat(1, 20)
        got = gather_project(torch.arange(4), codes, basis)
        expected = (codes.float() @ basis.float()).to(dtype)
        assert torch.equal(got.nan_to_num(7.0), expected.nan_to_num(7.0))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.usefixtures("poisoned")
def test_forward_and_gradients_are_no_worse_than_plain_torch(backend, device, shape, dtype):
    assert_no_worse_over_draws(lambda: draw(shape, dtype, backend, device))


@pytest.mark.parametrize("ids_dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("offset", [True, False])
def test_gradcheck(backend, device, ids_dtype, offset):
    skip_without_float64(backend, device)
    ids, *factors = problem((7, 3, 5, 9), torch.float64, device, offset, ids_dtype)
    leaves = [f if f is None else f.requires_grad_() for f in factors]
    assert torch.autograd.gradcheck(lambda *f: gather_project(ids, *f, scale=1.5, backend=backend), leaves)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("offset", [True, False])
@pytest.mark.usefixtures("poisoned")
def test_scale_is_applied_before_the_only_rounding(backend, device, dtype, offset):
    ids, *factors = problem((101, 63, 77, 149), dtype, device, offset)
    wide = [f if f is None else f.double() for f in factors]
    got = gather_project(ids, *factors, scale=25.25, backend=backend)
    exact = plain(ids, *wide) * 25.25
    assert_rounded_once(got, exact)


@pytest.mark.parametrize("padding_idx", [None, 3])
def test_a_sparse_gradient_is_the_dense_one(backend, device, padding_idx):
    ids, *factors = problem((200, 8, 10, 300), device=device)
    upstream, grads = torch.randn(300, 10, device=device), []
    for sparse in (True, False):
        leaves = [f.clone().requires_grad_() for f in factors]
        rows = gather_project(ids, *leaves, padding_idx=padding_idx, sparse=sparse, backend=backend)
        grads.append(torch.autograd.grad(rows, leaves, upstream))
    codes, *others = grads[0]
    assert codes.is_sparse
    assert codes._nnz() <= 300
    assert_close((codes.to_dense(), *others), grads[1])
    assert codes.is_coalesced() == (backend == "native" and device == "cpu")
    if codes.is_coalesced():
        counted = ids if padding_idx is None else ids[ids != padding_idx]
        assert torch.equal(codes.indices()[0], counted.unique())


@pytest.mark.parametrize("frozen", [0, 1, 2])
def test_only_the_gradients_that_are_asked_for(backend, device, frozen):
    ids, *factors = problem((20, 4, 6, 11), device=device)
    for position, factor in enumerate(factors):
        factor.requires_grad_(position != frozen)
    gather_project(ids, *factors, backend=backend).sum().backward()
    assert [f.grad is None for f in factors] == [position == frozen for position in range(3)]


@pytest.mark.parametrize("padding_idx", [3, -1])
def test_padding_contributes_no_gradient(backend, device, padding_idx):
    skip_without_float64(backend, device)
    _, *factors = problem((9, 4, 6, 1), torch.float64, device)
    ids = torch.tensor([3, 1, 3, 8, 8], device=device)
    leaves = [f.requires_grad_() for f in factors]
    gather_project(ids, *leaves, padding_idx=padding_idx, backend=backend).square().sum().backward()
    got = [leaf.grad for leaf in leaves]
    expected = [f.detach().clone().requires_grad_() for f in factors]
    plain(ids[ids != padding_idx % 9], *expected).square().sum().backward()
    assert_close(got, [leaf.grad for leaf in expected])


def test_padding_idx_does_not_change_the_row(backend, device):
    ids, *factors = problem((9, 4, 6, 5), device=device)
    factors[0].requires_grad_()
    assert torch.equal(
        gather_project(ids, *factors, backend=backend),
        gather_project(ids, *factors, padding_idx=int(ids[0]), backend=backend),
    )


# (V, r, H, N): blocks of rows; columns split between threads; one token on several threads.
@pytest.mark.parametrize("shape", [(500, 33, 70, 2000), (900, 150, 1100, 300), (900, 150, 1100, 1)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.usefixtures("poisoned")
def test_the_same_bits_for_any_number_of_threads(native, shape, dtype):
    ids, *factors = problem(shape, dtype)
    upstream = torch.randn(shape[3], shape[2]).to(dtype)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 4, 1):
            torch.set_num_threads(threads)
            leaves = [f.clone().requires_grad_() for f in factors]
            out = gather_project(ids, *leaves, backend=native)
            out.backward(upstream)
            results.append([out.detach(), *(leaf.grad for leaf in leaves)])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
    wide = [f.double() for f in factors]
    assert_no_worse_than(results[0][0], plain(ids, *factors), plain(ids, *wide))


@pytest.mark.parametrize("shape", [(3, 16, 384, 4000), (1, 16, 384, 2048), (3000, 16, 96, 9000)], ids=str)
def test_long_sums_are_no_worse_than_plain_torch(backend, device, shape):
    """A gradient is the sum of thousands of rows, where a running fp32 sum would lose digits."""
    ids, *factors = problem(shape, device=device)
    upstream = torch.randn(shape[3], shape[2], device=device)
    grads = []
    for function, cast in (
        (lambda *a: gather_project(*a, backend=backend), torch.float32),
        (plain, torch.float32),
        (plain, torch.float64),
    ):
        leaves = [f.to(cast, copy=True).requires_grad_() for f in factors]
        function(ids, *leaves).backward(upstream.to(cast))
        grads.append([leaf.grad for leaf in leaves])
    for ours, native, exact in zip(*grads, strict=True):
        assert_no_worse_than(ours, native, exact)


def test_reference_backward_is_autograd_of_its_forward():
    ids, *factors = problem((9, 4, 6, 13), torch.float64)
    grad = torch.randn(13, 6, dtype=torch.float64)
    leaves = [f.clone().requires_grad_() for f in factors]
    reference.gather_project_forward(ids, *leaves, 0.5).backward(grad)
    _, *got = reference.gather_project_backward(grad, ids, *factors[:2], 0.5, -1, True, True, True, False)
    assert_close(got, [leaf.grad for leaf in leaves])
