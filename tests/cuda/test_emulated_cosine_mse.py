"""The CUDA kernels of cosine_mse, compiled for the CPU and run on an emulator of the GPU's instructions.

csrc/cuda/cosine_mse.cuh is compiled unchanged, see test_emulated_gather_project.py. Every approximation of
the special function unit has its largest error.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
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
    cosine_mse_call,
    cosine_mse_results,
    programs,
    run,
)

pytestmark = MARKS
program, sanitized_program = programs("cosine_mse")
NAMES = ("loss", "grad_output", "grad_target")


@dataclass
class Call:
    """One call of the op, and the device that it runs on."""

    dtype: torch.dtype
    N: int
    H: int
    reduction: str = "mean"
    weights: tuple[float, float, float, float] = (1.0, 1.0, 0.0, 0.0)  # cosine, MSE, RMSE, power
    alpha: float = 1.0
    eps: float = 1e-8
    weighted: bool = True
    known_norms: bool = False
    upstream: bool = False
    needs: tuple[bool, bool] = (True, True)
    misaligned: int = 0  # elements between a 16-byte boundary and each matrix
    multiprocessors: int = 132
    order: str = "ascending"

    def __post_init__(self) -> None:
        accumulation = reference.accumulation_dtype(self.dtype)
        x = torch.randn(self.N, self.H)
        self.target = x.to(self.dtype)
        self.output = (x + 0.5 * torch.randn(self.N, self.H)).to(self.dtype)
        self.row_weight = torch.rand(self.N).to(accumulation) + 0.1 if self.weighted else None
        self.target_norm = self.target.to(accumulation).norm(dim=1) if self.known_norms else None
        shape = (self.N,) if self.reduction == "none" else ()
        self.grad_loss = torch.rand(shape).to(accumulation) + 0.5 if self.upstream else None

    def take(self, outputs: Outputs) -> list[torch.Tensor]:
        reduction = reference.REDUCTIONS.index(self.reduction)
        shapes = cosine_mse_results(self.output, reduction, self.needs)
        return [outputs.take(dtype, *shape) for dtype, shape in shapes]

    def serialised(self) -> bytes:
        tensors = (self.output, self.target, self.row_weight, self.target_norm, self.grad_loss)
        options = (
            reference.REDUCTIONS.index(self.reduction),
            *self.weights,
            self.alpha,
            self.eps,
            *self.needs,
        )
        device = dict(multiprocessors=self.multiprocessors, order=self.order)
        return cosine_mse_call(*tensors, *options, misaligned=self.misaligned, **device)

    def plain(self, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
        wide = reference.accumulation_dtype(dtype)
        values = (self.row_weight, self.target_norm, self.grad_loss)
        return reference.cosine_mse_forward(
            *(self.output.to(dtype), self.target.to(dtype)),
            *(each if each is None else each.to(wide) for each in values),
            *(reference.REDUCTIONS.index(self.reduction), *self.weights, self.alpha, self.eps, *self.needs),
        )


def check(program: Path, calls: list[Call], folder: Path) -> None:
    for call, results in zip(calls, run(program, calls, folder), strict=True):
        # Three ulp of fp32: plain torch's scalar may be exact by chance, and 1 - cos cancels.
        tiny = 1e-12 if call.dtype == torch.float64 else 4e-7
        plain, exact = call.plain(call.dtype), call.plain(torch.float64)
        for name, ours, theirs, oracle in zip(NAMES, results, plain, exact, strict=True):
            if oracle.norm() < 1e-12:  # with H = 1 the cosine has no gradient
                continue
            try:
                assert_no_worse_than(ours, theirs, oracle, tiny)
            except AssertionError as error:
                raise AssertionError(f"{name} of {call}: {error}") from None


# Each term alone, and all of them. Exponents: the identity, two with a pole of the slope at 0, the square.
TERMS = ((1, 1, 0, 0), (1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1), (0.2, 0.3, 0.4, 0.5))
ALPHAS = (1.0, 0.5, 0.1, 2.0)
# N: one row; fewer and more rows than multiprocessors; more rows than resident blocks. H: one, odd, a
# multiple of 16 bytes or not; a row for less than a warp, for a warp and for several warps.
SHAPES = ((1, 33), (7, 1), (150, 5), (300, 24), (40, 136), (19, 771), (5, 2056))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", reference.REDUCTIONS)
def test_no_worse_than_plain_torch(program, dtype, reduction, tmp_path):
    calls = [
        Call(
            *(dtype, N, H, reduction, weights),
            alpha=ALPHAS[(i + j) % 4],
            weighted=(i + j) % 3 > 0,
            upstream=(i + j) % 2 > 0,
            multiprocessors=(132, 1, 4)[(i + 2 * j) % 3],
        )
        for i, (N, H) in enumerate(SHAPES)
        for j, weights in enumerate(TERMS)
    ]
    check(program, calls, tmp_path)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_wider_than_the_registers_of_a_block(program, dtype, tmp_path):
    """The last chunk stays in registers, the others are read again; unaligned rows have more chunks."""
    wide = 2 * 256 * 8 * 16 // dtype.itemsize
    calls = [
        Call(dtype, 3, H, reduction, weights, alpha=0.5)
        for H in (wide, wide - 16 // dtype.itemsize, wide // 2 + 1)
        for reduction in ("mean", "none")
        for weights in (TERMS[0], TERMS[-1])
    ]
    check(program, calls, tmp_path)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_optional_inputs_and_outputs(program, dtype, tmp_path):
    """Known norms, no gradient or one of them, and tensors that are not aligned although their rows are."""
    all_terms = dict(weights=TERMS[-1], alpha=0.5)
    calls = [
        Call(dtype, 9, 136, reduction, **all_terms, needs=needs, misaligned=misaligned, known_norms=known)
        for reduction in reference.REDUCTIONS
        for misaligned in (0, 1)
        for needs, known in (((False, False), False), ((True, False), True), ((False, True), False))
    ]
    check(program, calls, tmp_path)


@pytest.mark.parametrize("weights", [TERMS[0], TERMS[-1]], ids=str)
def test_more_weights_than_a_block_adds_up(program, weights, tmp_path):
    """A separate kernel then sums the weights or, with the RMSE, the pass that sums the errors."""
    check(program, [Call(torch.float32, N, 5, weights=weights) for N in (600, 5000)], tmp_path)


NORMS = [10.0**exponent for exponent in (-20, -16, -11, -5, 0, 5, 11, 16, 20)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("reduction", ["none", "sum"])
@pytest.mark.parametrize("eps", [1e-8, 1.2e-38])
def test_norms_of_any_size(program, dtype, reduction, eps, tmp_path):
    """Every pair of norms; the bound on each row is the rounding of its result."""
    pairs = torch.cartesian_prod(torch.tensor(NORMS), torch.tensor(NORMS))
    calls = []
    for known in (False, True):
        call = Call(
            *(dtype, len(pairs), 40, reduction, (1, 0, 1, 0)),
            eps=eps,
            known_norms=known,
            needs=(True, not known),
        )
        for rows, norms in ((call.output, pairs[:, :1]), (call.target, pairs[:, 1:])):
            unit = torch.nn.functional.normalize(rows.double(), dim=1)
            rows.copy_(unit * norms)
        if known:
            call.target_norm = call.target.double().norm(dim=1).float()
        calls.append(call)
    rounding = 2e-6 if dtype == torch.float32 else torch.finfo(dtype).eps / 2
    for call, (loss, *grads) in zip(calls, run(program, calls, tmp_path), strict=True):
        exact = call.plain(torch.float64)
        torch.testing.assert_close(loss.double(), exact[0], rtol=1e-6, atol=1e-7)
        for grad, oracle in zip(grads[: 2 - call.known_norms], exact[1:], strict=False):
            error = (grad.double() - oracle).norm(dim=-1) / oracle.norm(dim=-1)
            assert (error <= rounding).all(), (error.max(), pairs[error.argmax()])


@pytest.mark.parametrize("reduction", reference.REDUCTIONS)
def test_rows_of_zeros_identical_and_antiparallel_rows(program, reduction, tmp_path):
    call = Call(torch.float32, 6, 24, reduction, TERMS[-1], alpha=0.5, eps=1e-3)
    x = call.target.clone()
    call.output[1] = call.target[2] = call.output[3] = call.target[3] = 0
    call.output[4], call.output[5] = x[4], -x[5]
    (results,) = run(program, [call], tmp_path)
    for got, exact in zip(results, call.plain(torch.float64), strict=True):
        torch.testing.assert_close(got.double(), exact, rtol=1e-5, atol=1e-6)
    assert not results[1][3].any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_row_that_is_not_finite_affects_no_other_row(program, dtype, bad, tmp_path):
    """Four rows share a warp here, and the sums of the third are computed again in double."""
    call = Call(dtype, 4, 24, "sum", (0.2, 0.3, 0, 0.5), alpha=0.5)
    call.output[2, 3] = bad
    ((loss, *grads),) = run(program, [call], tmp_path)
    assert not loss.isfinite()
    for grad, exact in zip(grads, call.plain(torch.float64)[1:], strict=True):
        assert not grad[2].isfinite().all()
        others = [0, 1, 3]
        assert_no_worse_than(grad[others], exact[others].to(dtype), exact[others], 1e-6)


def test_no_rows(program, tmp_path):
    calls = [Call(torch.float32, 0, 8, reduction, TERMS[-1]) for reduction in ("mean", "sum")]
    (mean, *_), (total, *_) = run(program, calls, tmp_path)
    assert mean.isnan()
    assert total == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_the_order_of_threads_changes_no_bit(program, dtype, reduction, tmp_path):
    """The emulator runs threads one after another; where a barrier is missing, the order changes bits."""
    for N, H in ((150, 5), (600, 24), (19, 771), (3, 9001)):
        calls = []
        for order in ORDERS:
            torch.manual_seed(seed_of(0))
            calls.append(Call(dtype, N, H, reduction, TERMS[-1], alpha=0.5, order=order))
            calls[-1].output[0] *= 1e-15  # this row is summed again in double
            calls.append(replace(calls[-1], weights=TERMS[0]))
        results = run(program, calls, tmp_path)
        for same in (results[::2], results[1::2]):
            first, *others = same
            for i, tensor in enumerate(first):
                assert torch.isfinite(tensor).all()
                assert all(torch.equal(tensor, other[i]) for other in others)


def test_no_access_out_of_bounds(sanitized_program, tmp_path):
    """AddressSanitizer checks the bounds of every buffer and alignment."""
    calls = [
        Call(dtype, N, H, reduction, weights, alpha=0.5, misaligned=misaligned)
        for dtype in DTYPES
        for N, H in ((1, 1), (7, 33), (66, 24), (3, 771), (2, 9000))
        for reduction, weights, misaligned in (("mean", TERMS[-1], 0), ("none", TERMS[0], 1))
    ]
    check(sanitized_program, calls, tmp_path)
