"""The CUDA kernels of gather_decode, compiled for the CPU and run on the emulator: numbers, bounds, order."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from embkern.ops.packed_format import Tier
from tests.conftest import assert_no_worse_than, seed_of
from tests.cuda.emulated import (
    DTYPES,
    MARKS,
    ORDERS,
    Outputs,
    gather_decode_call,
    programs,
    start,
)
from tests.ops.packed_problems import Problem, problem

pytestmark = MARKS
program, sanitized_program = programs("gather_decode")

SCALE = 0.37
# (V, H, K, N): few rows and many; odd rows; no basis; a basis of one group, and one wider than the rows.
SHAPES = [(301, 160, 128, 40), (97, 97, 96, 9), (70, 33, 32, 1), (200, 70, 0, 21), (64, 40, 64, 130)]
LARGE, SMALL = dict(multiprocessors=1), dict(multiprocessors=132)


def serialised(p: Problem, **options) -> bytes:
    return gather_decode_call(p.ids, *p.codes, p.scales, p.basis, p.offset, p.H, SCALE, **options)


def run(program: Path, problems: list[Problem], folder: Path, **options) -> list[torch.Tensor]:
    outputs = Outputs(program, (serialised(p, **options) for p in problems), folder)
    rows = [outputs.take(p.scales.dtype, p.ids.numel(), p.H) for p in problems]
    assert not outputs.data
    return rows


def check(program: Path, problems: list[Problem], folder: Path, **options) -> None:
    for p, got in zip(problems, run(program, problems, folder, **options), strict=True):
        plain, exact = (
            SCALE * p.plain(p.ids, *(each.to(dtype) for each in p.factors))
            for dtype in (p.scales.dtype, torch.float64)
        )
        assert_no_worse_than(got, plain, exact)


@pytest.mark.parametrize("device", [LARGE, SMALL], ids=["large tiles", "small tiles"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_worse_than_plain_torch(program, dtype, device, tmp_path):
    dtypes = [torch.int32, torch.int64]
    problems = [
        problem(shape, dtype, offset=i % 2 == 0, ids_dtype=dtypes[i % 2]) for i, shape in enumerate(SHAPES)
    ]
    check(program, problems, tmp_path, **device)


@pytest.mark.parametrize("tiers", [[Tier(True, (4, 3))], [Tier(False, (2, 3))]], ids=["all in it", "none"])
def test_all_rows_in_the_basis_and_none(program, tiers, tmp_path):
    """Blocks of the product without a row to multiply end at once."""
    for N in (5, 150):
        check(program, [problem((80, 64, 64, N), torch.bfloat16, tiers=tiers)], tmp_path, **LARGE)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tensors_that_are_not_aligned(program, dtype, tmp_path):
    check(program, [problem((90, 96, 64, N), dtype) for N in (3, 70)], tmp_path, misaligned=1)


def test_an_infinite_basis_does_not_reach_rows_of_values(program, tmp_path):
    p = problem((97, 97, 96, 60), torch.float32)
    p.basis[0] = torch.inf
    (rows,) = run(program, [p], tmp_path)
    of_values = ~p.transform[p.ids]
    assert torch.isfinite(rows[of_values]).all()
    assert not torch.isfinite(rows[~of_values]).all()


def test_the_same_bits_in_every_order_of_threads(program, tmp_path):
    for shape in (SHAPES[0], SHAPES[1]):
        found = []
        for order in ORDERS:
            torch.manual_seed(seed_of(0))
            found += run(program, [problem(shape, torch.bfloat16)], tmp_path, order=order)
        assert torch.isfinite(found[0]).all()
        assert all(torch.equal(found[0], other) for other in found[1:])


def test_no_access_out_of_bounds(sanitized_program, tmp_path):
    """AddressSanitizer checks the bounds of every buffer and alignment."""
    check(sanitized_program, [problem(shape, dtype) for shape in SHAPES for dtype in DTYPES], tmp_path)


@pytest.mark.parametrize("bad", [-1, 97, 2**40])
def test_an_id_out_of_range_ends_the_kernel(program, bad, tmp_path):
    p = problem((97, 97, 96, 9))
    p.ids[-1] = bad
    done = start(program, [serialised(p)], tmp_path)
    assert done.returncode == 3
    assert "ids: expected 0 <= id < V" in done.stderr


def test_a_record_out_of_range_ends_the_kernel(program, tmp_path):
    p = problem((97, 97, 96, 9))
    p.codes[1][:, 0] += len(p.codes[0])
    done = start(program, [serialised(p)], tmp_path)
    assert done.returncode == 3
    assert "the directory does not fit" in done.stderr
