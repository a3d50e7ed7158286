"""The CUDA gather_project on a GPU: streams, graphs, device assertions, large tables.

tests/ops/test_gather_project.py tests the op on every backend, and
tests/cuda/test_emulated_gather_project.py the indexing and numbers of the kernels without a GPU.
"""

from __future__ import annotations

import pytest
import torch

from benchmarks.tools.gpu_check.assertions import ASSERTIONS, check
from embkern.ops import gather_project
from embkern.ops.backends import unavailable
from tests.conftest import assert_no_worse_than
from tests.ops.factorised_problems import plain, problem

pytestmark = pytest.mark.gpu
OP = "gather_project"
# (V, r, H, N): decode of 1, 4 and 8 rows; narrow tiles, large tiles twice, codes in panels.
DECODE = [(3000, 75, 384, 1), (3000, 256, 2048, 4), (3000, 256, 2048, 13)]
TILES = [(3000, 256, 2048, 50), (3000, 256, 2048, 4100), (3000, 75, 770, 5000), (3000, 1400, 512, 3000)]


@pytest.fixture(autouse=True)
def _kernel() -> None:
    if reason := unavailable("native", OP, "cuda", torch.bfloat16):
        pytest.skip(reason)


def forward(ids, codes, basis, offset):
    return gather_project(ids, codes, basis, offset, backend="native")


@pytest.mark.parametrize("shape", DECODE + TILES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_every_kernel_is_no_worse_than_plain_torch(shape, dtype):
    ids, *factors = problem(shape, dtype, "cuda", ids_dtype=torch.int32)
    exact = plain(ids, *(factor.double() for factor in factors))
    out = torch.full_like(exact, torch.nan, dtype=dtype)
    torch.ops.embkern.gather_project_out.native(ids, *factors, 1.0, out)
    assert_no_worse_than(out, plain(ids, *factors), exact)


@pytest.mark.parametrize("shape", DECODE + TILES, ids=str)
def test_the_same_bits_every_time(shape):
    arguments = problem(shape, torch.bfloat16, "cuda")
    first = forward(*arguments)
    assert all(torch.equal(first, forward(*arguments)) for _ in range(20))


@pytest.mark.parametrize("shape", DECODE + TILES[:2], ids=str)
def test_a_captured_graph_reads_the_new_ids(shape):
    ids, *factors = problem(shape, torch.bfloat16, "cuda")
    forward(ids, *factors)  # loads the kernel and sets its shared memory, which a capture does not permit
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = forward(ids, *factors)
    for _ in range(3):
        ids.copy_(torch.randint_like(ids, shape[0]))
        graph.replay()
        assert torch.equal(captured, forward(ids, *factors))


@pytest.mark.parametrize("shape", [DECODE[2], TILES[1]], ids=str)
def test_runs_on_the_current_stream(shape):
    """A kernel on the default stream would run before the codes change, since the current stream is busy."""
    ids, codes, *rest = problem(shape, torch.bfloat16, "cuda")
    new = torch.randn_like(codes)
    expected = forward(ids, new, *rest)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(50_000_000)
        codes.copy_(new)
        got = forward(ids, codes, *rest)
    torch.cuda.synchronize()
    assert torch.equal(got, expected)


@pytest.mark.parametrize("shape", [DECODE[2], TILES[0], TILES[1]], ids=str)
def test_tensors_that_are_not_aligned(shape):
    arguments = problem(shape, torch.bfloat16, "cuda")
    ids, *factors = arguments
    shifted = [torch.cat([f.new_zeros(1), f.flatten()])[1:].view(f.shape) for f in factors]
    assert all(f.data_ptr() % 16 for f in shifted)
    assert torch.equal(forward(ids, *shifted), forward(*arguments))


def test_an_id_out_of_range_is_a_device_assertion():
    """One process per kernel, in parallel, since an assertion ends the process's CUDA context."""
    mine = [each for each in ASSERTIONS if (each.op, each.backend) == ("gather_project", "native")]
    assert check(mine) == ({}, {})


def test_offsets_beyond_two_to_the_31st():
    """Row 2^25 of a table of 64 columns starts at element 2^31."""
    V, r = 2**25 + 3, 64
    if torch.cuda.mem_get_info()[0] < 6 * 2**30:
        pytest.skip("needs 6 GiB of free GPU memory")
    codes = torch.empty(V, r, dtype=torch.float16, device="cuda")
    codes[-1] = torch.arange(r) / r
    codes[0] = 0
    basis = torch.eye(r, 8, dtype=torch.float16, device="cuda")
    for count in (2, 40):
        ids = torch.tensor([V - 1, 0], device="cuda").repeat(count // 2)
        assert torch.equal(forward(ids, codes, basis, None), codes[ids, :8])
