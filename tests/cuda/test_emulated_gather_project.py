"""The CUDA kernels of gather_project, compiled for the CPU and run on an emulator of the GPU's instructions.

csrc/cuda/gather_project.cuh is compiled unchanged; tests/cuda/emulator replaces only the functions of ptx.cuh
and launch.cuh. So these tests check indexing, barriers, fragment layouts and numbers. They check neither
nvcc's code nor timing.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from tests.conftest import assert_no_worse_than, seed_of
from tests.cuda.emulated import (
    DTYPES,
    HOPPER_SHARED,
    MARKS,
    ORDERS,
    Outputs,
    gather_project_call,
    programs,
    run,
    spaced,
    start,
)

pytestmark = MARKS
program, sanitized_program = programs("gather_project")


@dataclass
class Call:
    """One call of the op, and the device that it runs on."""

    dtype: torch.dtype
    N: int
    r: int
    H: int
    V: int = 41
    offset: bool = True
    ids_dtype: torch.dtype = torch.int64
    scale: float = 1.0
    misaligned: int = 0  # elements between a 16-byte boundary and each tensor
    multiprocessors: int = 132  # with few of them the large tiles are chosen
    shared: int = HOPPER_SHARED  # bytes per block
    order: str = "ascending"
    bad_id: int | None = None
    apart: int = 0  # elements between the rows of codes, NaN

    def __post_init__(self) -> None:
        self.ids = (torch.rand(self.N) ** 3 * self.V).to(self.ids_dtype)  # skewed: many ids repeat
        if self.bad_id is not None:
            self.ids[-1] = self.bad_id
        self.codes = spaced(torch.randn(self.V, self.r).to(self.dtype), self.apart)
        self.basis = (torch.randn(self.r, self.H) / max(self.r, 1) ** 0.5).to(self.dtype)
        self.shift = torch.randn(self.H).to(self.dtype) if self.offset else None

    def serialised(self) -> bytes:
        tensors = (self.ids, self.codes, self.basis, self.shift)
        device = dict(multiprocessors=self.multiprocessors, shared=self.shared, order=self.order)
        return gather_project_call(*tensors, self.scale, misaligned=self.misaligned, **device)

    def take(self, outputs: Outputs) -> torch.Tensor:
        return outputs.take(self.dtype, self.N, self.H)

    def plain(self, dtype: torch.dtype) -> torch.Tensor:
        rows = F.embedding(self.ids, self.codes.to(dtype)) @ self.basis.to(dtype)
        return self.scale * (rows if self.shift is None else rows + self.shift.to(dtype))


def check(program: Path, calls: list[Call], folder: Path) -> None:
    for call, got in zip(calls, run(program, calls, folder), strict=True):
        try:
            assert_no_worse_than(got, call.plain(call.dtype), call.plain(torch.float64))
        except AssertionError as error:
            raise AssertionError(f"{call}: {error}") from None


# N: for each kernel, both sides of its bounds. r: one, less than a fragment, a multiple of 16 bytes or not,
# more than a stage. H: less than a vector, odd, a multiple of 16 bytes or not, more than a tile.
COUNTS = (1, 4, 16, 17, 64, 65, 128, 333)
RANKS = (1, 16, 63, 75, 256, 257)
WIDTHS = (5, 77, 96, 136)
LARGE, SMALL = dict(multiprocessors=1), dict(multiprocessors=132)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_worse_than_plain_torch(program, dtype, tmp_path):
    calls = [
        Call(
            *(dtype, N, r, WIDTHS[(i + j) % 4]),
            offset=(i + j) % 3 > 0,
            ids_dtype=(torch.int32, torch.int64)[(i + j) % 2],
            scale=(1.0, 0.37)[j % 2],
            **(SMALL, LARGE)[(i + j // 2) % 2],
        )
        for i, N in enumerate(COUNTS)
        for j, r in enumerate(RANKS)
    ]
    check(program, calls, tmp_path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_several_tiles_along_the_width(program, dtype, tmp_path):
    """The pipeline continues from one column tile to the next, and blocks share the columns of their rows."""
    calls = [Call(dtype, 150, r, 520, multiprocessors=m) for r in (24, 64, 75) for m in (1, 4, 9, 132)]
    check(program, calls, tmp_path)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_codes_that_do_not_fit_in_shared_memory(program, dtype, tmp_path):
    """The tile kernel then takes them panel by panel; the decode kernel loops for r in the thousands."""
    few = dict(shared=72 * 1024, H=136, r=600)
    calls = [Call(dtype, 70, **few), Call(dtype, 140, **few, multiprocessors=1), Call(dtype, 9, 2100, 40)]
    check(program, calls, tmp_path)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_of_codes_that_are_apart(program, dtype, tmp_path):
    """With rows that start on 16 bytes, vectors are copied that only begin with codes."""
    calls = [
        Call(dtype, N, r, 72, apart=apart, **LARGE)
        for N in (1, 7, 90)
        for r, apart in ((75, 5), (64, 16), (63, 3), (33, 1000))
    ]
    check(program, calls, tmp_path)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tensors_that_are_not_aligned(program, dtype, tmp_path):
    calls = [Call(dtype, N, 64, 96, misaligned=1, **LARGE) for N in (1, 9, 70)]
    check(program, calls, tmp_path)


def test_rank_zero_is_the_scaled_offset(program, tmp_path):
    for dtype in DTYPES:
        for call in (Call(dtype, N, 0, 24, scale=0.5) for N in (3, 40)):
            (got,) = run(program, [call], tmp_path)
            assert torch.equal(got, (call.shift.double() * 0.5).to(dtype).expand(call.N, -1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_same_bits_in_every_order_of_threads(program, dtype, tmp_path):
    """The emulator runs threads one after another; where a barrier is missing, the order changes bits."""
    for N, r, H in ((1, 75, 40), (11, 2100, 40), (130, 264, 264), (70, 75, 77)):
        for device in (SMALL, LARGE):
            calls = []
            for order in ORDERS:
                torch.manual_seed(seed_of(0))
                calls.append(Call(dtype, N, r, H, order=order, shared=72 * 1024, **device))
            first, *others = run(program, calls, tmp_path)
            assert torch.isfinite(first).all()
            assert all(torch.equal(first, other) for other in others)


def test_no_access_out_of_bounds(sanitized_program, tmp_path):
    """AddressSanitizer checks the bounds of every buffer and alignment."""
    calls = [
        Call(dtype, N, r, H, ids_dtype=torch.int32, **device)
        for dtype in DTYPES
        for N, r, H in ((1, 75, 77), (7, 64, 40), (66, 63, 77), (130, 72, 264))
        for device in (SMALL, LARGE)
    ]
    calls += [Call(dtype, N, 75, 40, apart=5) for dtype in DTYPES for N in (2, 66)]
    check(sanitized_program, calls, tmp_path)


@pytest.mark.parametrize("bad", [-1, 41, 2**40])
@pytest.mark.parametrize("N", [3, 40])
def test_an_id_out_of_range_ends_the_kernel(program, N, bad, tmp_path):
    done = start(program, [Call(torch.bfloat16, N, 16, 24, bad_id=bad).serialised()], tmp_path)
    assert done.returncode == 3
    assert "ids: expected 0 <= id < V" in done.stderr
