"""The forward: what the logits of pieces of the table add to loss and statistics of each state."""
# mypy: disable-error-code="no-untyped-def"
# (Triton reads the annotations of a jit kernel: only fp64 scalars have one.)

from __future__ import annotations

from collections.abc import Iterable

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...ops.reference import accumulation_dtype
from ...ops.reference.cross_entropy import Head, finished
from ..launch import Launch
from ..sizes import cdiv
from ..tiles import Device, LossTile, describe_device, loss_tile_of
from .shared import INFINITY, block_of, capped_logits, exponential, label_places, products


@triton.jit(do_not_specialize=["N", "first", "count", "rows_per_program"], debug=True)
def _fold_kernel(
    states_ptr,
    rows_ptr,
    places_ptr,
    constant_ptr,
    bias_ptr,
    maxima_ptr,
    rests_ptr,
    totals_ptr,
    label_logits_ptr,
    cap: tl.float64,
    inverse_cap: tl.float64,
    N,
    first,
    count,
    rows_per_program,
    K: tl.constexpr,
    CAPPED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One block of states by ``rows_per_program`` of the rows ``first`` to ``first + count`` of the table.

    Programs of one range of rows have adjacent indices, so that the rows come from DRAM once. The label's
    logit is written by the one program that has it.
    """
    element = states_ptr.dtype.element_ty
    accumulator: tl.constexpr = tl.float64 if element == tl.float64 else tl.float32
    blocks = tl.cdiv(N, BLOCK_N)
    n = (tl.program_id(0) % blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    part = tl.program_id(0) // blocks
    begin = part * rows_per_program
    end = tl.minimum(begin + rows_per_program, count)
    cap = tl.full((), cap, accumulator)
    inverse_cap = tl.full((), inverse_cap, accumulator)
    place = tl.load(places_ptr + n, mask=n < N, other=-1) - first
    mine = (place >= begin) & (place < end)
    states = block_of(states_ptr, n, tl.arange(0, BLOCK_K), N, K)
    constant = None
    if constant_ptr is not None:
        constant = tl.load(constant_ptr + n, mask=n < N, other=0.0).to(accumulator)[:, None]
    shift = tl.full((BLOCK_N,), -INFINITY, accumulator)
    rest = tl.zeros((BLOCK_N,), accumulator)
    total = tl.zeros((BLOCK_N,), accumulator)
    label_logit = tl.zeros((BLOCK_N,), accumulator)
    for start in range(begin, end, BLOCK_V):
        v = start + tl.arange(0, BLOCK_V)
        logits = products(
            states, states_ptr, rows_ptr, n, v, N, count, K, BLOCK_N, BLOCK_V, BLOCK_K, accumulator
        )
        bias = None
        if bias_ptr is not None:
            bias = tl.load(bias_ptr + first + v, mask=v < count, other=0.0).to(accumulator)[None, :]
        logits, _ = capped_logits(logits, constant, bias, cap, inverse_cap, element, CAPPED)
        if totals_ptr is not None:
            total += tl.sum(tl.where((v < count)[None, :], logits, 0.0), 1)
        logits = tl.where((v < count)[None, :], logits, -INFINITY)
        largest = tl.maximum(shift, tl.max(logits, 1))
        reference = tl.where(largest == -INFINITY, 0.0, largest)  # leaves exp(-inf) at 0
        rest *= exponential(shift - reference, element)
        shift = largest
        if tl.max((mine & (place >= start) & (place < start + BLOCK_V)).to(tl.int32), 0) > 0:
            is_label = (mine & (place >= 0))[:, None] & (place[:, None] == v[None, :])
            label_logit += tl.sum(tl.where(is_label, logits, 0.0), 1)
            logits = tl.where(is_label, -INFINITY, logits)
        rest += tl.sum(exponential(logits - reference[:, None], element), 1)
    at = part.to(tl.int64) * N + n
    tl.store(maxima_ptr + at, shift, mask=n < N)
    tl.store(rests_ptr + at, rest, mask=n < N)
    if totals_ptr is not None:
        tl.store(totals_ptr + at, total, mask=n < N)
    tl.store(label_logits_ptr + n, label_logit, mask=mine)


def fold(
    head: Head, pieces: Iterable[tuple[int, Tensor]], device: Device | None = None
) -> tuple[Tensor, Tensor]:
    """Losses (N,) and statistics (N, 3) of a head; ``pieces`` of the table have their first row's number."""
    places = label_places(head)
    dtype = accumulation_dtype(head.states.dtype)
    label_logit = torch.zeros(len(places), dtype=dtype, device=places.device)
    if not len(places):
        return finished(head, *[label_logit] * 4)[:2]
    parts = []
    for first, rows in pieces:
        launch, *sums = fold_launch(head, places, first, rows, label_logit, device)
        launch.run()
        parts.append(sums)
    maxima, rests, totals = (torch.cat(each) for each in zip(*parts, strict=True))
    shift = maxima.amax(0)
    factors = (maxima - torch.where(shift == -torch.inf, 0, shift)).exp()
    return finished(head, shift, (rests * factors).sum(0), label_logit, totals.sum(0))[:2]


def fold_launch(
    head: Head,
    places: Tensor,
    first: int,
    rows: Tensor,
    label_logit: Tensor,
    device: Device | None = None,
    tile: LossTile | None = None,
) -> tuple[Launch, Tensor, Tensor, Tensor]:
    """Return the launch of a piece of the table, and the maxima, sums and totals (parts, N) that it fills.

    There are no totals without label smoothing. ``label_logit`` (N,) is filled where the piece has the label.
    """
    (N, K), (count, _) = head.states.shape, rows.shape
    smoothing, cap = head.options.label_smoothing, head.options.softcap
    device = device or describe_device(rows)
    tile = tile or loss_tile_of("fold", device, head.states.dtype, N, K)
    blocks, row_blocks = cdiv(N, tile.BLOCK_N), cdiv(count, tile.BLOCK_V)
    # As few parts as give two programs for every multiprocessor, but none of fewer than four blocks of rows.
    parts = max(1, min(cdiv(2 * device.processors, blocks), row_blocks // 4))
    rows_per_program = cdiv(row_blocks, parts) * tile.BLOCK_V
    parts = cdiv(count, rows_per_program)
    maxima, rests = (label_logit.new_empty(parts, N) for _ in range(2))
    totals = label_logit.new_empty(parts if smoothing else 0, N)
    arguments = dict(
        states_ptr=head.states,
        rows_ptr=rows,
        places_ptr=places,
        constant_ptr=head.constant,
        bias_ptr=head.bias,
        maxima_ptr=maxima,
        rests_ptr=rests,
        totals_ptr=totals if smoothing else None,
        label_logits_ptr=label_logit,
        cap=float(cap),
        inverse_cap=1 / cap if cap else 0.0,
        N=N,
        first=first,
        count=count,
        rows_per_program=rows_per_program,
        K=K,
        CAPPED=cap != 0,
        **tile.blocks(),
    )
    launch = Launch(_fold_kernel, (blocks * parts,), arguments, tile.num_warps, tile.num_stages)
    return launch, maxima, rests, totals
