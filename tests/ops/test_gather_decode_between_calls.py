"""gather_decode: what a thread keeps from one call to the next, and outputs that no cache holds."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from embkern.ops import gather_decode
from embkern.ops.packed_format import Tier
from tests.ops.packed_problems import every_tier, problem

OP = "gather_decode"


def test_tables_in_the_same_memory_are_told_apart(level):
    """Every tensor of one table is overwritten by that of another one with as many tiers and groups."""
    shape = (70, 64, 64, 40)
    tables = [
        problem(shape, tiers=tiers)
        for tiers in (
            [Tier(False, (2, 3)), Tier(True, (4, 1)), Tier(False, (8, 0))],
            [Tier(True, (2, 0)), Tier(False, (4, 4)), Tier(False, (1, 5))],
        )
    ]
    expected = [p.ours(p.ids, *p.factors) for p in tables]
    pairs = zip(tables[0].codes, tables[1].codes, strict=True)
    memory = [torch.empty(max(a.numel(), b.numel()), dtype=a.dtype) for a, b in pairs]
    for _ in range(2):
        for p, rows in zip(tables, expected, strict=True):
            codes = [m[: each.numel()].view(each.shape) for m, each in zip(memory, p.codes, strict=True)]
            for to, each in zip(codes, p.codes, strict=True):
                to.copy_(each)
            assert torch.equal(p._replace(codes=codes).ours(p.ids, *p.factors), rows)


def test_levels_that_are_written_in_place_are_read(level):
    p = problem((70, 45, 32, 40), offset=False, tiers=[Tier(False, (2, 4)), Tier(True, (3,))])
    p.codes[3].floor_divide_(8)  # sums of four of them do not wrap
    before = p.ours(p.ids, *p.factors)
    p.codes[3].neg_()
    assert torch.equal(p.ours(p.ids, *p.factors), -before)


def test_levels_of_many_tables_are_told_apart(level):
    """Calls alternate between tables whose levels, and nothing else, differ; each are twice those before."""
    p = problem((70, 64, 32, 40), offset=False, tiers=[Tier(False, (1, 2)), Tier(False, (4, 3))])
    records, directory, tiers, levels = p.codes
    tables = [p._replace(codes=[records, directory, tiers, (levels >> 6) << power]) for power in range(5)]
    rows = tables[0].ours(p.ids, *p.factors)
    for _ in range(2):
        for power, table in enumerate(tables):
            assert torch.equal(table.ours(p.ids, *p.factors), 2**power * rows)


def test_memory_does_not_grow_with_calls(native):
    """10^5 calls with more tables than a thread keeps the tiers of."""
    script = """
import torch
from embkern.ops.packed_format import Tier
from tests.ops.packed_problems import problem
def table(n, bits):
    return problem((40, 40, 32, n), tiers=[Tier(False, (bits, 1)), Tier(True, (bits,))])
tables = [table(n, bits) for n in (1, 20) for bits in range(1, 9)]
def pages():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1])
def call(times):
    for _ in range(times):
        for p in tables:
            p.ours(p.ids, *p.factors)
with torch.no_grad():
    call(100)
    before = pages()
    call(100_000 // len(tables))
    print((pages() - before) * 4096)
"""
    if not sys.platform.startswith("linux"):
        pytest.skip("/proc is that of Linux")
    # AddressSanitizer keeps what is freed.
    without = ":quarantine_size_mb=0:thread_local_quarantine_size_kb=0"
    env = os.environ | {"ASAN_OPTIONS": os.environ.get("ASAN_OPTIONS", "") + without}
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=env)
    assert run.returncode == 0, run.stderr
    assert int(run.stdout) < 4 << 20  # 42 bytes a call


def test_threads_look_up_in_tables_of_their_own(native):
    dtypes = 4 * [torch.float32, torch.bfloat16]
    tables = [problem((300, 70, 64, 200), dtype) for dtype in dtypes]
    expected = [p.ours(p.ids, *p.factors) for p in tables]

    def calls(first: int) -> bool:
        mine = [(first + i) % len(tables) for i in range(200)]
        return all(torch.equal(tables[i].ours(tables[i].ids, *tables[i].factors), expected[i]) for i in mine)

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(calls, range(4)))


def test_a_fork_looks_up_after_its_parent_has(native):
    script = """
import os, torch
from tests.ops.packed_problems import problem
p = problem((300, 70, 64, 40))
expected = p.ours(p.ids, *p.factors)
child = os.fork()
if child == 0:
    os._exit(0 if torch.equal(p.ours(p.ids, *p.factors), expected) else 1)
print(os.waitpid(child, 0)[1])
"""
    if not hasattr(os, "fork"):
        pytest.skip("there is no fork")
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert run.stdout.strip() == "0", run.stderr


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.usefixtures("poisoned")
def test_outputs_beyond_the_caches(level, dtype):
    """17 MB of rows, which are written past the caches; rows of coefficients among them."""
    p = problem((500, 64, 64, 1), dtype, tiers=every_tier(64, 64))
    ids = torch.randint(0, 500, (17 * 2**20 // (64 * dtype.itemsize),))
    rows = p.ours(torch.arange(500), *p.factors)
    assert torch.equal(p.ours(ids, *p.factors), rows[ids])
    ids[-3] = 500
    with pytest.raises(IndexError, match=f"got 500 at flat position {len(ids) - 3}"):
        p.ours(ids, *p.factors)


def test_rows_of_one_tier_fill_several_products(level):
    """More distinct rows of coefficients than a product takes, some repeated, with groups without bits."""
    p = problem((400, 70, 96, 900), torch.float64, tiers=[Tier(True, (0, 5, 0)), Tier(True, (2, 0, 3))])
    torch.testing.assert_close(p.ours(p.ids, *p.factors), p.plain(p.ids, *p.factors))
    few = p.ids[:16]
    assert torch.equal(p.ours(few, *p.factors), p.ours(p.ids, *p.factors)[:16])


def test_a_batch_is_refused_for_one_of_its_records(native):
    p = problem((640, 40, 32, 1))
    codes = [each.clone() for each in p.codes]
    codes[1][3, 0] = -5
    ids = torch.arange(640)
    with pytest.raises(
        ValueError, match="directory: expected records within their .* at 4294967291 for id 96"
    ):
        gather_decode(ids, *codes, p.scales, p.basis, p.offset, embedding_dim=p.H, backend=native)
