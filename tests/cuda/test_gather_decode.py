"""The CUDA gather_decode on a GPU: graphs, device assertions, the same bits in every run.

tests/ops/test_gather_decode.py tests the op on every backend, and
tests/cuda/test_emulated_gather_decode.py the indexing and numbers of the kernels without a GPU.
"""

from __future__ import annotations

import pytest
import torch

from benchmarks.tools.gpu_check.assertions import ASSERTIONS, check
from embkern.ops.backends import unavailable
from tests.conftest import assert_no_worse_than
from tests.ops.packed_problems import Problem, problem

pytestmark = pytest.mark.gpu
OP, SCALE = "gather_decode", 0.7
# (V, H, K, N): the kernel for few rows, narrow tiles, large tiles; odd and wide rows; no basis.
SHAPES = [
    (30522, 768, 128, 4),
    (30522, 768, 256, 50),
    (30522, 768, 128, 16384),
    (3001, 97, 96, 5000),
    (3001, 7, 0, 3000),
    (3001, 4096, 640, 2000),
]


@pytest.fixture(autouse=True)
def _kernel() -> None:
    if reason := unavailable("native", OP, "cuda", torch.bfloat16):
        pytest.skip(reason)


def forward(p: Problem) -> torch.Tensor:
    return p.ours(p.ids, *p.factors, scale=SCALE, backend="native")


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.usefixtures("poisoned")
def test_no_worse_than_plain_torch(shape, dtype):
    p = problem(shape, dtype, "cuda")
    exact = p.plain(p.ids, *(each.double() for each in p.factors)) * SCALE
    assert_no_worse_than(forward(p), p.plain(p.ids, *p.factors) * SCALE, exact)


@pytest.mark.parametrize("shape", SHAPES[:4], ids=str)
def test_the_same_bits_every_time(shape):
    p = problem(shape, torch.bfloat16, "cuda")
    first = forward(p)
    assert all(torch.equal(first, forward(p)) for _ in range(20))


@pytest.mark.parametrize("shape", SHAPES[:3], ids=str)
def test_a_captured_graph_reads_the_new_ids(shape):
    p = problem(shape, torch.bfloat16, "cuda")
    forward(p)  # loads the kernels and sets their shared memory, which a capture does not permit
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = forward(p)
    for _ in range(3):
        p.ids.copy_(torch.randint_like(p.ids, shape[0]))
        graph.replay()
        assert torch.equal(captured, forward(p))


def test_wrong_ids_and_records_are_device_assertions():
    mine = [each for each in ASSERTIONS if (each.op, each.backend) == (OP, "native")]
    assert check(mine) == ({}, {})
