"""The CUDA kernels of gather_project's gradients on the emulator; see test_emulated_gather_project.py."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from embkern.ops import reference
from tests.conftest import assert_no_worse_than, seed_of
from tests.cuda.emulated import (
    DTYPES,
    MARKS,
    ORDERS,
    Outputs,
    gather_project_backward_call,
    programs,
    run,
    spaced,
    start,
)

pytestmark = MARKS
program, sanitized_program = programs("gather_project_backward")


@dataclass
class Call:
    """One call of the op, and the device that it runs on."""

    dtype: torch.dtype
    N: int
    r: int
    H: int
    V: int = 41
    ids_dtype: torch.dtype = torch.int64
    scale: float = 1.0
    padding_idx: int = -1
    needs_basis: bool = True
    needs_offset: bool = True
    sparse: bool = False
    one_id: bool = False
    apart: int = 0  # elements between the rows of codes, NaN
    misaligned: int = 0  # elements between a 16-byte boundary and each tensor
    multiprocessors: int = 132
    order: str = "ascending"
    bad_id: int | None = None

    def __post_init__(self) -> None:
        self.ids = (torch.rand(self.N) ** 3 * self.V).to(self.ids_dtype)  # skewed: many ids repeat
        if self.one_id:
            self.ids.fill_(self.V - 1)
        if self.bad_id is not None:
            self.ids[-1] = self.bad_id
        self.grad = torch.randn(self.N, self.H).to(self.dtype)
        self.grad[self.ids == self.padding_idx] = torch.nan  # must not be read
        self.codes = spaced(torch.randn(self.V, self.r).to(self.dtype), self.apart)
        self.basis = (torch.randn(self.r, self.H) / max(self.r, 1) ** 0.5).to(self.dtype)

    def serialised(self) -> bytes:
        options = (self.scale, self.padding_idx, self.needs_basis, self.needs_offset, self.sparse)
        device = dict(multiprocessors=self.multiprocessors, order=self.order, misaligned=self.misaligned)
        return gather_project_backward_call(self.grad, self.ids, self.codes, self.basis, *options, **device)

    def gradients(self, dtype: torch.dtype) -> list[torch.Tensor]:
        factors = (self.codes.to(dtype), self.basis.to(dtype), self.scale, self.padding_idx)
        needs = (True, self.needs_basis, self.needs_offset, self.sparse)
        return list(reference.gather_project_backward(self.grad.to(dtype), self.ids, *factors, *needs)[1:])

    def take(self, outputs: Outputs) -> list[torch.Tensor]:
        return [
            outputs.take(self.dtype, self.N if self.sparse else self.V, self.r),
            outputs.take(self.dtype, *((self.r, self.H) if self.needs_basis else (0,))),
            outputs.take(self.dtype, self.H if self.needs_offset else 0),
        ]


def check(program: Path, calls: list[Call], folder: Path) -> None:
    for call, gradients in zip(calls, run(program, calls, folder), strict=True):
        native, exact = call.gradients(call.dtype), call.gradients(torch.float64)
        for name, *each in zip(("codes", "basis", "offset"), gradients, native, exact, strict=True):
            try:
                assert_no_worse_than(*each)
            except AssertionError as error:
                raise AssertionError(f"{name}, {call}: {error}") from None


# N: one, parts of a step, several blocks of segments. r: one, less than a fragment, aligned or not, more than
# a tile. H: less than a vector, odd, aligned or not, more than a tile.
COUNTS = (1, 31, 65, 333)
RANKS = (1, 16, 75, 136)
WIDTHS = (5, 77, 96, 264)
LARGE, SMALL = dict(multiprocessors=1), dict(multiprocessors=132)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_worse_than_plain_torch(program, dtype, tmp_path):
    calls = [
        Call(
            *(dtype, N, r, WIDTHS[(i + j) % 4]),
            ids_dtype=(torch.int32, torch.int64)[(i + j) % 2],
            scale=(1.0, 0.37)[j % 2],
            padding_idx=(-1, 0)[(i + j) % 3 == 0],
            **(SMALL, LARGE)[(i + j // 2) % 2],
        )
        for i, N in enumerate(COUNTS)
        for j, r in enumerate(RANKS)
    ]
    check(program, calls, tmp_path)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_id_at_every_position(program, dtype, tmp_path):
    """Its segment passes through more blocks than the warps that join them take at once."""
    calls = [Call(dtype, N, 75, 24, one_id=True, needs_basis=False) for N in (32, 33, 64, 1500)]
    check(program, [*calls, Call(dtype, 90, 20, 24, one_id=True, padding_idx=40)], tmp_path)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_each_gradient_alone_and_sparse(program, dtype, tmp_path):
    needs = [(True, False), (False, True), (False, False)]
    calls = [Call(dtype, 70, 24, 40, needs_basis=basis, needs_offset=offset) for basis, offset in needs]
    calls += [
        Call(dtype, 70, r, 40, sparse=True, padding_idx=0, needs_basis=False, needs_offset=False, **device)
        for r in (16, 75)
        for device in (SMALL, LARGE)
    ]
    check(program, calls, tmp_path)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_codes_that_are_apart_or_not_aligned(program, dtype, tmp_path):
    calls = [Call(dtype, 90, r, 72, apart=apart, **LARGE) for r, apart in ((75, 5), (64, 16), (33, 1000))]
    check(program, [*calls, Call(dtype, 90, 64, 72, misaligned=1)], tmp_path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_more_ids_than_shared_memory_holds(program, dtype, tmp_path):
    """A split reads its ids in chunks; the single multiprocessor leaves one split."""
    check(program, [Call(dtype, 2100, 8, 72, padding_idx=3, **LARGE)], tmp_path)


def test_rank_zero_has_a_gradient_of_the_offset(program, tmp_path):
    calls = [Call(dtype, 70, 0, 24, needs_basis=False, sparse=True, scale=0.5) for dtype in DTYPES]
    for call, (*_, offset) in zip(calls, run(program, calls, tmp_path), strict=True):
        assert_no_worse_than(offset, call.gradients(call.dtype)[2], call.gradients(torch.float64)[2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_same_bits_in_every_order_of_threads(program, dtype, tmp_path):
    """The emulator runs threads one after another; where a barrier is missing, the order changes bits."""
    for N, r, H in ((40, 75, 77), (333, 136, 264), (1100, 20, 24)):
        for device in (SMALL, LARGE):
            calls = []
            for order in ORDERS:
                torch.manual_seed(seed_of(0))
                calls.append(Call(dtype, N, r, H, order=order, **device))
            first, *others = run(program, calls, tmp_path)
            assert all(torch.isfinite(each).all() for each in first)
            assert all(torch.equal(*pair) for other in others for pair in zip(first, other, strict=True))


def test_no_access_out_of_bounds(sanitized_program, tmp_path):
    """AddressSanitizer checks the bounds of every buffer and alignment."""
    calls = [
        Call(dtype, N, r, H, ids_dtype=torch.int32, apart=apart, **device)
        for dtype in DTYPES
        for N, r, H, apart in ((1, 75, 77, 0), (33, 64, 40, 0), (66, 63, 77, 1), (130, 75, 136, 5))
        for device in (SMALL, LARGE)
    ]
    check(sanitized_program, calls, tmp_path)


@pytest.mark.parametrize("bad", [-1, 41, 2**40])
def test_an_id_out_of_range_ends_the_kernel(program, bad, tmp_path):
    done = start(program, [Call(torch.bfloat16, 40, 16, 24, bad_id=bad).serialised()], tmp_path)
    assert done.returncode == 3
    assert "ids: expected 0 <= id < V" in done.stderr
