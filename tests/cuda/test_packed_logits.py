"""The CUDA packed_logits on a GPU: graphs, the same bits in every run.

tests/ops/test_packed_logits.py tests the op on every backend, and
tests/cuda/test_emulated_packed_logits.py the indexing and numbers of the kernels without a GPU.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from embkern.ops import packed_logits
from embkern.ops.backends import unavailable
from tests.conftest import assert_no_worse_than
from tests.ops.packed_problems import Problem, problem

pytestmark = pytest.mark.gpu
# (V, H, K, states)
SHAPES = [(30522, 768, 128, 1), (49152, 576, 576, 4), (3001, 97, 96, 16), (3001, 7, 0, 40)]


@pytest.fixture(autouse=True)
def _kernel() -> None:
    if reason := unavailable("native", "packed_logits", "cuda", torch.bfloat16):
        pytest.skip(reason)


def forward(p: Problem, hidden: torch.Tensor) -> torch.Tensor:
    return packed_logits(hidden, *p.codes, p.scales, p.basis, p.offset, backend="native")


def states(shape, dtype: torch.dtype) -> tuple[Problem, torch.Tensor]:
    *table, count = shape
    hidden = torch.randn(count, shape[1], device="cuda").to(dtype)
    return problem((*table, 1), dtype, "cuda"), hidden


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.usefixtures("poisoned")
def test_no_worse_than_plain_torch(shape, dtype):
    p, hidden = states(shape, dtype)
    ids = torch.arange(shape[0], device="cuda")
    exact = F.linear(hidden.double(), p.plain(ids, *(each.double() for each in p.factors)))
    assert_no_worse_than(forward(p, hidden), F.linear(hidden, p.plain(ids, *p.factors)), exact)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_same_bits_every_time(shape):
    p, hidden = states(shape, torch.bfloat16)
    first = forward(p, hidden)
    assert all(torch.equal(first, forward(p, hidden)) for _ in range(20))


def test_a_captured_graph_reads_the_new_states():
    p, hidden = states(SHAPES[1], torch.bfloat16)
    forward(p, hidden)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = forward(p, hidden)
    for _ in range(3):
        hidden.copy_(torch.randn_like(hidden))
        graph.replay()
        assert torch.equal(captured, forward(p, hidden))
