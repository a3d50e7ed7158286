"""Tests that need a device: bf16, CUDA graphs, device assertions, the same bits in every run."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton", reason="triton is not installed")

from benchmarks.tools.gpu_check.assertions import ASSERTIONS, check
from embkern.ops import reference
from embkern.ops.reference import MEAN, NONE, SUM
from embkern.triton import cosine_mse as cm
from embkern.triton import gather_project as gp
from embkern.triton.scale_gradient import scale_gradient_
from tests.conftest import assert_no_worse_than
from tests.ops.factorised_problems import problem as factorised

pytestmark = pytest.mark.gpu
SCALE = 0.7
# (V, r, H, N): both tiles, ranks on chip and in steps, aligned and not.
SHAPES = [
    (101, 63, 77, 149),
    (37, 1, 5, 8),
    (30522, 75, 768, 4096),
    (30522, 299, 768, 3000),
    (128256, 256, 2048, 16384),
    (50257, 256, 768, 4),
    (5000, 640, 256, 1500),
]


def problem(shape, dtype):
    upstream = torch.randn(shape[3], shape[2], device="cuda").to(dtype)
    return *factorised(shape, dtype, "cuda"), upstream


def ours(ids, codes, basis, offset, upstream, sparse=False):
    out = gp.gather_project_forward(ids, codes, basis, offset, SCALE)
    return out, *gp.gather_project_backward(upstream, ids, codes, basis, SCALE, 0, True, True, True, sparse)


def plain(ids, codes, basis, offset, upstream, dtype):
    leaves = [each.to(dtype, copy=True).requires_grad_() for each in (codes, basis, offset)]
    out = SCALE * (F.embedding(ids, leaves[0]) @ leaves[1] + leaves[2])
    out.backward(upstream.to(dtype).masked_fill((ids == 0).unsqueeze(1), 0))
    return out.detach(), *(leaf.grad for leaf in leaves)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.usefixtures("poisoned")
def test_no_worse_than_plain_torch(shape, dtype):
    arguments = problem(shape, dtype)
    out, _, *grads = ours(*arguments)
    for got, native, exact in zip(
        (out, *grads), plain(*arguments, dtype), plain(*arguments, torch.float64), strict=True
    ):
        assert got.dtype == dtype
        assert_no_worse_than(got, native, exact)


@pytest.mark.parametrize("sparse", [False, True])
def test_the_same_bits_in_every_run(sparse):
    arguments = problem((200, 75, 768, 5000), torch.bfloat16)
    first = ours(*arguments, sparse)
    for _ in range(10):
        assert all(torch.equal(a, b) for a, b in zip(first, ours(*arguments, sparse), strict=True))


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("N", [1, 16, 2000])
def test_forward_and_backward_replay_in_a_cuda_graph(N, sparse):
    ids, *others = problem((5000, 75, 768, N), torch.bfloat16)
    others[-1] = others[-1][:N]
    ours(ids, *others, sparse)  # This call compiles.
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = ours(ids, *others, sparse)
    ids.copy_(torch.randint(0, 5000, (N,), device="cuda"))
    graph.replay()
    for got, expected in zip(captured, ours(ids, *others, sparse), strict=True):
        assert torch.equal(got, expected)


def test_an_id_out_of_range_is_a_device_assertion():
    """Each runs in a separate process, all at once."""
    mine = [each for each in ASSERTIONS if (each.op, each.backend) == ("gather_project", "triton")]
    assert check(mine) == ({}, {})


# (N, H) of the loss: rows that share a program, odd rows, decoding, a batch, rows wider than a program.
LOSS_SHAPES = [(149, 40), (7, 77), (32, 768), (30522, 384), (4099, 768), (3000, 4096), (50, 12288)]
TERMS = (0.7, 0.9, 0.3, 0.2)


def loss_problem(N, H, dtype, reduction=MEAN):
    """Output, target, row weights, no known norm, an incoming gradient, and the options of the op."""
    target = torch.randn(N, H, device="cuda")
    output = target + 0.3 * torch.randn(N, H, device="cuda")
    weight = torch.rand(N, device="cuda") + 0.1
    grad_loss = torch.rand((N,) if reduction == NONE else (), device="cuda") + 0.5
    return (
        output.to(dtype),
        target.to(dtype),
        weight,
        None,
        grad_loss,
        reduction,
        *TERMS,
        0.5,
        1e-8,
        True,
        True,
    )


@pytest.mark.parametrize("shape", LOSS_SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("reduction", [NONE, MEAN, SUM], ids=["none", "mean", "sum"])
@pytest.mark.usefixtures("poisoned")
def test_the_loss_and_its_gradients_are_no_worse_than_plain_torch(shape, dtype, reduction):
    arguments = loss_problem(*shape, dtype, reduction)
    wide = [each.double() if torch.is_tensor(each) else each for each in arguments]
    results = (
        cm.cosine_mse_forward(*arguments),
        reference.cosine_mse_forward(*arguments),
        reference.cosine_mse_forward(*wide),
    )
    for got, native, exact in zip(*results, strict=True):
        assert got.dtype == native.dtype
        assert_no_worse_than(got, native, exact, tiny=3e-7)


@pytest.mark.parametrize("reduction", [NONE, MEAN, SUM], ids=["none", "mean", "sum"])
def test_the_loss_has_the_same_bits_in_every_run(reduction):
    arguments = loss_problem(5000, 768, torch.float32, reduction)
    first = cm.cosine_mse_forward(*arguments)
    for _ in range(10):
        assert all(torch.equal(a, b) for a, b in zip(first, cm.cosine_mse_forward(*arguments), strict=True))


@pytest.mark.parametrize("reduction", [NONE, MEAN], ids=["none", "mean"])
def test_the_loss_and_its_scaled_gradient_replay_in_a_cuda_graph(reduction):
    """Capture refuses operations that make the host wait."""
    arguments = loss_problem(2000, 768, torch.bfloat16, reduction)
    factor = torch.ones_like(arguments[4])

    def both():
        results = cm.cosine_mse_forward(*arguments)
        scale_gradient_(results[1], factor)
        return results

    both()  # This call compiles.
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = both()
    arguments[0].normal_()
    factor.fill_(3.0)
    graph.replay()
    for got, expected in zip(captured, both(), strict=True):
        assert torch.equal(got, expected)


def test_a_factor_of_one_leaves_the_gradient_untouched():
    """Arithmetic would change the payload of a NaN; the host must not wait to test the factor."""
    pattern = torch.full((5000, 768), 0x7F812345, dtype=torch.int32, device="cuda")
    grad = pattern.clone().view(torch.float32)
    one, factor = torch.ones((), device="cuda"), torch.ones(5000, device="cuda")
    factor[::3] = 2.0
    scale_gradient_(pattern.clone().view(torch.float32), one)  # This call compiles.
    scale_gradient_(pattern.clone().view(torch.float32), factor)
    torch.cuda.set_sync_debug_mode("error")
    try:
        scale_gradient_(grad, one)
        whole = grad.clone()
        scale_gradient_(grad, factor)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(whole.view(torch.int32), pattern)
    assert torch.equal((grad.view(torch.int32) == pattern).all(1), factor == 1)
    assert torch.equal((grad.view(torch.int32) == pattern).any(1), factor == 1)


def test_a_loss_of_more_than_two_to_the_31st_elements():
    """Offsets are 64-bit: the last rows have the same loss and gradient as in a batch of their own."""
    N, H = 2**21 + 5, 1024
    output = torch.empty(N, H, device="cuda", dtype=torch.bfloat16).normal_()
    target = torch.ones_like(output)
    options = (None, None, None, NONE, *TERMS, 0.5, 1e-8, True, False)
    loss, grad, _ = cm.cosine_mse_forward(output, target, *options)
    tail = cm.cosine_mse_forward(output[-2000:].clone(), target[-2000:].clone(), *options)
    assert torch.equal(loss[-2000:], tail[0])
    assert torch.equal(grad[-2000:], tail[1])
    twice = grad[-2000:] * 2
    scale_gradient_(grad, torch.full((), 2.0, device="cuda"))
    assert torch.equal(grad[-2000:], twice)
