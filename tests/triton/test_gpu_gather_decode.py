"""gather_decode in Triton on a device: bf16, CUDA graphs, device assertions, the same bits in every run."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from benchmarks.tools.gpu_check.assertions import ASSERTIONS, check
from embkern.triton import gather_decode as gd
from tests.conftest import assert_no_worse_than
from tests.ops.conftest import assert_rounded_once
from tests.ops.packed_problems import problem

pytestmark = pytest.mark.gpu
SCALE = 0.7
# (V, H, K, N): each length of the tile table, coefficients on chip and in steps; odd and wide rows; no basis.
SHAPES = [
    (30522, 768, 128, 16384),
    (30522, 384, 96, 4096),
    (30522, 768, 256, 512),
    (30522, 768, 128, 4),
    (3001, 97, 96, 5000),
    (3001, 33, 32, 149),
    (3001, 7, 0, 3000),
    (3001, 4096, 640, 2000),
]


def forward(p, ids=None):
    ids = p.ids if ids is None else ids
    return gd.gather_decode_forward(ids, *p.codes, p.scales, p.basis, p.offset, p.H, SCALE)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.usefixtures("poisoned")
def test_no_worse_than_plain_torch(shape, dtype):
    p = problem(shape, dtype, "cuda")
    got = forward(p)
    assert got.dtype == dtype
    exact = p.plain(p.ids, *(f.double() for f in p.factors)) * SCALE
    assert_no_worse_than(got, p.plain(p.ids, *p.factors) * SCALE, exact)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_product_is_rounded_once(dtype):
    """Coefficients of 16 bits are not rounded, only the result is."""
    p = problem((3001, 768, 128, 5000), dtype, "cuda")
    exact = p.plain(p.ids, *(f.double() for f in p.factors)) * SCALE
    assert_rounded_once(forward(p), exact)


def test_the_same_bits_in_every_run():
    p = problem((3001, 768, 128, 5000), torch.bfloat16, "cuda")
    first = forward(p)
    assert all(torch.equal(first, forward(p)) for _ in range(10))


@pytest.mark.parametrize("N", [1, 100, 5000])
def test_replays_in_a_cuda_graph(N):
    """There is no host synchronisation, because capture would refuse it."""
    p = problem((3001, 768, 128, N), torch.bfloat16, "cuda")
    forward(p)  # This call compiles.
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = forward(p)
    p.ids.copy_(torch.randint(0, 3001, (N,), device="cuda"))
    graph.replay()
    assert torch.equal(captured, forward(p))


def test_bad_ids_and_a_corrupt_directory_are_device_assertions():
    """Each runs in a separate process, all at once."""
    assert check([each for each in ASSERTIONS if each.op == "gather_decode"]) == ({}, {})
