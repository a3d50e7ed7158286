"""What only a device can show: bf16, CUDA graphs, the device assertion, the same bits in every run."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton", reason="triton is not installed")

from embkern.triton import gather_project as gp

from ..conftest import assert_no_worse_than
from ..ops.test_gather_project import problem as factorised

pytestmark = pytest.mark.gpu
SCALE = 0.7
# (V, r, H, N): every length and rank class of the tile table, aligned and not.
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
    ours(ids, *others, sparse)  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = ours(ids, *others, sparse)
    ids.copy_(torch.randint(0, 5000, (N,), device="cuda"))
    graph.replay()
    for got, expected in zip(captured, ours(ids, *others, sparse), strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("bad", [-1, 12, 2**40])
@pytest.mark.parametrize(
    "call",
    [
        "gp.gather_project_forward(ids, codes, basis, None, 1.0)",
        "gp.gather_project_backward(grad, ids, codes, basis, 1.0, -1, True, False, False, False)",
        "gp.gather_project_backward(grad, ids, codes, basis, 1.0, -1, False, True, False, False)",
    ],
)
def test_an_id_out_of_range_is_a_device_assertion(call, bad):
    code = f"""
import torch
from embkern.triton import gather_project as gp
ids = torch.tensor([0, {bad}, 3], device="cuda")
codes, basis, grad = (torch.ones(size, device="cuda") for size in ((12, 4), (4, 6), (3, 6)))
{call}
torch.cuda.synchronize()
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ran.returncode != 0
    assert "device-side assert" in ran.stderr
