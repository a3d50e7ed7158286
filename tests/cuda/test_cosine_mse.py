"""The CUDA cosine_mse on a GPU: streams, graphs, no synchronisation, full occupancy.

tests/ops/test_cosine_mse.py tests the op on every backend, and tests/cuda/test_emulated_cosine_mse.py the
indexing and numbers of the kernels without a GPU.
"""

from __future__ import annotations

import pytest
import torch

from embkern.ops import cosine_mse_loss, reference
from embkern.ops.backends import unavailable
from tests.conftest import assert_no_worse_than

pytestmark = pytest.mark.gpu
OP = "cosine_mse"
# (N, H): one row, the paper's batch, a table, odd rows, rows wider than a block's registers
SHAPES = [(1, 384), (32, 768), (30522, 768), (4099, 385), (300, 20000)]
# The default terms take one launch and the sum of the blocks; all terms take another pass for the RMSE.
TERMS = [dict(), dict(cosine_weight=0.2, mse_weight=0.3, rmse_weight=0.4, power_weight=0.5, alpha=0.5)]


@pytest.fixture(autouse=True)
def _kernel() -> None:
    if reason := unavailable("native", OP, "cuda", torch.bfloat16):
        pytest.skip(reason)


def problem(shape, dtype=torch.float32):
    target = torch.randn(shape, device="cuda")
    output = (target + 0.5 * torch.randn_like(target)).to(dtype)
    return output, target.to(dtype), torch.rand(shape[0], device="cuda") + 0.1


def loss_and_gradients(output, target, row_weight, **terms):
    leaves = [each.detach().requires_grad_() for each in (output, target)]
    loss = cosine_mse_loss(*leaves, row_weight=row_weight, backend="native", **terms)
    return loss.detach(), *torch.autograd.grad(loss.sum(), leaves)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("reduction", reference.REDUCTIONS)
@pytest.mark.parametrize("weights", [(1.0, 1.0, 0.0, 0.0), (0.2, 0.3, 0.4, 0.5)], ids=str)
@pytest.mark.usefixtures("poisoned")
def test_every_kernel_is_no_worse_than_plain_torch(shape, dtype, reduction, weights):
    if dtype == torch.float16 and reduction == "mean":
        pytest.skip("gradients of the mean vanish in fp16; they are scaled first, see tests/ops")
    output, target, row_weight = problem(shape, dtype)
    options = (reference.REDUCTIONS.index(reduction), *weights, 0.5, 1e-8, True, True)
    row_weight = row_weight.to(reference.accumulation_dtype(dtype))
    plain = reference.cosine_mse_forward(output, target, row_weight, None, None, *options)
    wide = (each.double() for each in (output, target, row_weight))
    exact = reference.cosine_mse_forward(*wide, None, None, *options)
    got = torch.ops.embkern.cosine_mse_forward.native(output, target, row_weight, None, None, *options)
    tiny = 1e-12 if dtype == torch.float64 else 1e-6
    for ours, theirs, oracle in zip(got, plain, exact, strict=True):
        assert_no_worse_than(ours, theirs, oracle, tiny)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("terms", TERMS, ids=("two", "all"))
def test_the_same_bits_every_time(shape, terms):
    arguments = problem(shape, torch.bfloat16)
    first = loss_and_gradients(*arguments, **terms)
    for _ in range(20):
        again = loss_and_gradients(*arguments, **terms)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("shape", SHAPES[1:3], ids=str)
@pytest.mark.parametrize("terms", TERMS, ids=("two", "all"))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_captured_graph_reads_the_new_rows(shape, terms, dtype):
    """Forward and backward; in fp16 the backward is a separate launch."""
    output, *rest = problem(shape, dtype)
    loss_and_gradients(output, *rest, **terms)  # autograd allocates memory in its first call
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = loss_and_gradients(output, *rest, **terms)
    for _ in range(3):
        output.copy_(torch.randn_like(output))
        graph.replay()
        expected = loss_and_gradients(output, *rest, **terms)
        assert all(torch.equal(a, b) for a, b in zip(captured, expected, strict=True))


@pytest.mark.parametrize("terms", TERMS, ids=("two", "all"))
def test_runs_on_the_current_stream(terms):
    """A kernel on the default stream would run before the rows change, since the current stream is busy."""
    output, *rest = problem((4099, 768))
    new = torch.randn_like(output)
    expected = loss_and_gradients(new, *rest, **terms)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(50_000_000)
        output.copy_(new)
        got = loss_and_gradients(output, *rest, **terms)
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("terms", TERMS, ids=("two", "all"))
def test_runs_on_the_device_of_its_tensors(terms):
    arguments = problem((522, 768))
    expected = loss_and_gradients(*arguments, **terms)
    got = loss_and_gradients(*(each.to("cuda:1") for each in arguments), **terms)
    assert torch.cuda.current_device() == 0
    for ours, there in zip(expected, got, strict=True):
        assert there.device.index == 1
        torch.testing.assert_close(there.cpu(), ours.cpu())


@pytest.mark.parametrize("terms", TERMS, ids=("two", "all"))
def test_the_host_never_waits(terms):
    arguments = problem((4099, 768))
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss_and_gradients(*arguments, **terms)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_tensors_that_are_not_aligned():
    """The kernel for single elements takes them, which sums in another order."""
    arguments = problem((300, 768), torch.bfloat16)
    shifted = [torch.cat([each.new_zeros(1), each.flatten()])[1:].view(each.shape) for each in arguments]
    assert all(each.data_ptr() % 16 for each in shifted)
    for got, expected in zip(loss_and_gradients(*shifted), loss_and_gradients(*arguments), strict=True):
        torch.testing.assert_close(got, expected)


def test_offsets_beyond_two_to_the_31st():
    """Row 2^21 of rows of 1024 elements starts at element 2^31."""
    N, H = 2**21 + 3, 1024
    if torch.cuda.mem_get_info()[0] < 16 * 2**30:
        pytest.skip("needs 16 GiB of free GPU memory")
    output = torch.zeros(N, H, dtype=torch.bfloat16, device="cuda")
    target = torch.zeros_like(output)
    output[-5:], target[-5:] = torch.randn(2, 5, H, device="cuda").bfloat16()
    options = (reference.NONE, 1.0, 1.0, 0.0, 0.0, 1.0, 1e-8, True, False)
    loss, grad, _ = torch.ops.embkern.cosine_mse_forward.native(output, target, None, None, None, *options)
    last = torch.ops.embkern.cosine_mse_forward.native(output[-5:], target[-5:], None, None, None, *options)
    assert torch.equal(loss[-5:], last[0])
    torch.testing.assert_close(grad[-5:], last[1])
    assert not grad[:-5].any()
