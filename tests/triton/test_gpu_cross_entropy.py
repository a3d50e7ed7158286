"""The cross-entropies in Triton on a device: bf16, CUDA graphs, peak memory, the same bits in every run."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from tests.ops import test_low_rank_cross_entropy as low_rank
from tests.ops import test_packed_cross_entropy as packed
from tests.ops.test_packed_cross_entropy import OPTIONS, results

pytestmark = pytest.mark.gpu
DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]
# (V, H, r) and states: ranks that are multiplied in registers, aligned and not; a wider one; few states.
FACTORS = [
    ((32000, 768, 128), 1000),
    ((5003, 769, 75), 333),
    ((32000, 768, 256), 200),
    ((5003, 640, 384), 300),
    ((32000, 96, 64), 3),
]


@pytest.mark.parametrize(("shape", "states"), FACTORS, ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.usefixtures("poisoned")
def test_factors_are_no_worse_than_plain_torch(shape, states, options, dtype):
    low_rank.assert_contract(shape, states, dtype, "cuda", "triton", range(5), **options)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.usefixtures("poisoned")
def test_packed_tables_are_no_worse_than_plain_torch(options, dtype):
    for shape in ((20000, 768, 128), (3001, 97, 96)):
        packed.assert_contract(shape, 300, dtype, "cuda", "triton", **options)


def tasks():
    return low_rank.Task((32000, 768, 128), 1000, torch.bfloat16, "cuda"), packed.Task(
        (3001, 768, 128), 500, torch.bfloat16, "cuda"
    )


def test_the_same_bits_in_every_run():
    for task in tasks():
        run = lambda task=task: results(  # noqa: E731
            task.ours(backend="triton", reduction="none"), task.leaves, task.upstream, torch.bfloat16
        )
        first = run()
        for _ in range(5):
            assert all(torch.equal(a, b) for a, b in zip(first, run(), strict=True))


def test_replays_in_a_cuda_graph():
    """There is no host synchronisation, because capture would refuse it."""
    for task in tasks():
        function = task.ours(backend="triton", reduction="none")
        leaves = [each.detach().requires_grad_() for each in task.leaves]

        def call(function=function, leaves=leaves, task=task):
            losses = function(*leaves)
            return losses, *torch.autograd.grad(losses, leaves, task.upstream)

        call()  # This call compiles.
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = call()
        task.labels.copy_(task.labels.flip(0))
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(captured, call(), strict=True))


def test_no_logits_are_held():
    task = low_rank.Task((128256, 256, 128), 8192, torch.bfloat16, "cuda")
    call = lambda: results(  # noqa: E731
        task.ours(backend="triton"), task.leaves, torch.ones(()), torch.bfloat16
    )
    call()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    assert torch.cuda.max_memory_allocated() - before < 2 * 8192 * 128256 / 8  # an eighth of bf16 logits
