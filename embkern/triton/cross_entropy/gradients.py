"""The backward: gradients of logits, computed again, and their products with the rows and with the states."""
# mypy: disable-error-code="no-untyped-def"
# (Triton reads the annotations of a jit kernel: only fp64 scalars have one.)

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...ops.reference import accumulation_dtype
from ...ops.reference.cross_entropy import Head
from ..launch import Launch
from ..sizes import cdiv
from ..tiles import LOSS_TILES, Device, LossTile, describe_device, loss_tile_of
from .shared import block_of, capped_logits, exponential, label_places, products


def is_fused(states: Tensor) -> bool:
    """Return whether _gradient_kernel takes states (N, K), of which it holds whole rows in registers."""
    most = LOSS_TILES["state_gradient", 2].BLOCK_K
    if states.shape[1] % 8:  # Rows that do not start on 16 bytes take more registers to load.
        most //= 2
    return states.dtype.itemsize == 2 and states.shape[1] <= most


@dataclass(frozen=True)
class Upstream:
    """What the gradients of a state's logits follow from.

    gradient = factor exp(logit - shift) - uniform, and of_label for the label; both times the slope of the
    cap. values (4, N) has shift, factor, uniform and of_label; places (N,) the labels, -1 where ignored.
    """

    head: Head
    values: Tensor
    places: Tensor

    @staticmethod
    def of(head: Head, grad: Tensor, statistics: Tensor) -> Upstream:
        """Return it for the gradient (N,) of the losses and the statistics (N, 3) of the forward."""
        shift, log_sum, surprise = statistics.to(accumulation_dtype(head.states.dtype)).unbind(1)
        upstream = grad.to(shift.dtype).masked_fill(head.ignored(), 0)
        smoothing, uniform = head.options.label_smoothing, head.options.label_smoothing / head.vocabulary
        of_label = (-surprise).expm1() + smoothing - uniform
        values = [shift, (-log_sum).exp() * upstream, upstream * uniform, upstream * of_label]
        return Upstream(head, torch.stack(values), label_places(head))

    def arguments(self, first: int, rows: Tensor) -> dict[str, object]:
        """Return the arguments of a kernel for a piece of the table."""
        cap = self.head.options.softcap
        return dict(
            states_ptr=self.head.states,
            rows_ptr=rows,
            values_ptr=self.values,
            places_ptr=self.places,
            constant_ptr=self.head.constant,
            bias_ptr=self.head.bias,
            cap=float(cap),
            inverse_cap=1 / cap if cap else 0.0,
            N=len(self.places),
            first=first,
            count=len(rows),
            K=rows.shape[1],
            CAPPED=cap != 0,
        )


@triton.jit
def _gradients(
    sums,
    n,
    v,
    values_ptr,
    places_ptr,
    constant_ptr,
    bias_ptr,
    cap,
    inverse_cap,
    N,
    first,
    count,
    element: tl.constexpr,
    CAPPED: tl.constexpr,
):
    """Gradients of the logits with products ``sums``; n and v are numbers of states and rows, broadcast."""
    known = n < N
    at = values_ptr + n
    stride = N.to(tl.int64)
    shift = tl.load(at, mask=known, other=0.0)
    factor = tl.load(at + stride, mask=known, other=0.0)
    uniform = tl.load(at + 2 * stride, mask=known, other=0.0)
    of_label = tl.load(at + 3 * stride, mask=known, other=0.0)
    place = tl.load(places_ptr + n, mask=known, other=-1)
    constant = None
    if constant_ptr is not None:
        constant = tl.load(constant_ptr + n, mask=known, other=0.0).to(sums.dtype)
    bias = None
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + first + v, mask=v < count, other=0.0).to(sums.dtype)
    logits, tangent = capped_logits(sums, constant, bias, cap, inverse_cap, element, CAPPED)
    gradients = factor * exponential(logits - shift, element) - uniform
    gradients = tl.where(place - first == v, of_label, gradients)
    if CAPPED:
        gradients *= (1.0 - tangent) * (1.0 + tangent)
    # An ignored state may have logits of any size.
    return tl.where((place >= 0) & (v < count), gradients, 0.0)


@triton.jit(do_not_specialize=["N", "first", "count", "per_program"], debug=True)
def _gradient_kernel(
    states_ptr,
    rows_ptr,
    values_ptr,
    places_ptr,
    constant_ptr,
    bias_ptr,
    out_ptr,
    sums_ptr,
    cap: tl.float64,
    inverse_cap: tl.float64,
    N,
    first,
    count,
    per_program,
    OF_STATES: tl.constexpr,
    K: tl.constexpr,
    CAPPED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Gradients of a block of states by ``per_program`` rows, or of a block of rows by as many states.

    ``out`` (parts, own, K) are the products of gradients of logits with the others, ``sums`` (parts, own) the
    sums of those gradients.
    """
    element = states_ptr.dtype.element_ty
    own_size: tl.constexpr = BLOCK_N if OF_STATES else BLOCK_V
    other_size: tl.constexpr = BLOCK_V if OF_STATES else BLOCK_N
    if OF_STATES:
        own_ptr, own_count, other_ptr, other_count = states_ptr, N, rows_ptr, count
    else:
        own_ptr, own_count, other_ptr, other_count = rows_ptr, count, states_ptr, N
    blocks = tl.cdiv(own_count, own_size)
    part = tl.program_id(0) // blocks
    i = (tl.program_id(0) % blocks) * own_size + tl.arange(0, own_size)
    k = tl.arange(0, BLOCK_K)
    cap = tl.full((), cap, tl.float32)
    inverse_cap = tl.full((), inverse_cap, tl.float32)
    own = block_of(own_ptr, i, k, own_count, K).to(element)
    out = tl.zeros((own_size, BLOCK_K), tl.float32)
    sums = tl.zeros((own_size,), tl.float32)
    begin = part * per_program
    for start in range(begin, tl.minimum(begin + per_program, other_count), other_size):
        j = start + tl.arange(0, other_size)
        other = block_of(other_ptr, j, k, other_count, K).to(element)
        logits = tl.dot(own, tl.trans(other), out_dtype=tl.float32)
        n = i[:, None] if OF_STATES else j[None, :]
        v = j[None, :] if OF_STATES else i[:, None]
        gradients = _gradients(
            logits,
            n,
            v,
            values_ptr,
            places_ptr,
            constant_ptr,
            bias_ptr,
            cap,
            inverse_cap,
            N,
            first,
            count,
            element,
            CAPPED,
        )
        sums += tl.sum(gradients, 1)
        out = tl.dot(gradients.to(element), other, out, out_dtype=tl.float32)
    at = part.to(tl.int64) * own_count + i
    tl.store(sums_ptr + at, sums, mask=i < own_count)
    mask = (i < own_count)[:, None] & (k < K)[None, :]
    tl.store(out_ptr + at[:, None] * K + k[None, :], out.to(out_ptr.dtype.element_ty), mask=mask)


def gradient_launch(
    upstream: Upstream,
    rows: Tensor,
    of_states: bool,
    dtype: torch.dtype,
    device: Device | None = None,
    tile: LossTile | None = None,
) -> tuple[Launch, Tensor, Tensor]:
    """Return a launch over the whole table, and the parts of the products and sums that it fills."""
    head = upstream.head
    (N, K), V = head.states.shape, len(rows)
    device = device or describe_device(rows)
    kernel = "state_gradient" if of_states else "row_gradient"
    tile = tile or loss_tile_of(kernel, device, head.states.dtype, N, K)
    own, other, own_size, other_size = N, V, tile.BLOCK_N, tile.BLOCK_V
    if not of_states:
        own, other, own_size, other_size = V, N, tile.BLOCK_V, tile.BLOCK_N
    blocks, other_blocks = cdiv(own, own_size), cdiv(other, other_size)
    # As few parts as give two programs for every multiprocessor, but none of fewer than four blocks.
    parts = max(1, min(cdiv(2 * device.processors, blocks), other_blocks // 4))
    per_program = cdiv(other_blocks, parts) * other_size
    parts = cdiv(other, per_program)
    sums = upstream.values.new_empty(parts, own)
    out = sums.new_empty((parts, own, K), dtype=dtype if parts == 1 else sums.dtype)
    arguments = upstream.arguments(0, rows) | tile.blocks()
    arguments |= dict(out_ptr=out, sums_ptr=sums, per_program=per_program, OF_STATES=of_states)
    launch = Launch(_gradient_kernel, (blocks * parts,), arguments, tile.num_warps, tile.num_stages)
    return launch, out, sums


def gradient(upstream: Upstream, rows: Tensor, of_states: bool, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Gradients of the states (N, K) and their constant (N,), or of the rows (V, K) and their bias (V,).

    For states that are ``is_fused``. The first result is of ``dtype``.
    """
    launch, out, sums = gradient_launch(upstream, rows, of_states, dtype)
    launch.run()
    if len(out) == 1:
        return out[0], sums[0]
    return out.sum(0).to(dtype), sums.sum(0)


@triton.jit(do_not_specialize=["N", "first", "count"], debug=True)
def _logit_gradients_kernel(
    states_ptr,
    rows_ptr,
    values_ptr,
    places_ptr,
    constant_ptr,
    bias_ptr,
    out_ptr,
    state_sums_ptr,
    row_sums_ptr,
    cap: tl.float64,
    inverse_cap: tl.float64,
    N,
    first,
    count,
    K: tl.constexpr,
    CAPPED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """A block of the gradients (N, count) of logits, and its sums by state and by row."""
    element = states_ptr.dtype.element_ty
    accumulator: tl.constexpr = tl.float64 if element == tl.float64 else tl.float32
    blocks = tl.cdiv(N, BLOCK_N)
    i, j = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    n = i * BLOCK_N + tl.arange(0, BLOCK_N)
    v = j * BLOCK_V + tl.arange(0, BLOCK_V)
    states = block_of(states_ptr, n, tl.arange(0, BLOCK_K), N, K)
    sums = products(states, states_ptr, rows_ptr, n, v, N, count, K, BLOCK_N, BLOCK_V, BLOCK_K, accumulator)
    gradients = _gradients(
        sums,
        n[:, None],
        v[None, :],
        values_ptr,
        places_ptr,
        constant_ptr,
        bias_ptr,
        tl.full((), cap, accumulator),
        tl.full((), inverse_cap, accumulator),
        N,
        first,
        count,
        element,
        CAPPED,
    )
    tl.store(state_sums_ptr + j.to(tl.int64) * N + n, tl.sum(gradients, 1), mask=n < N)
    tl.store(row_sums_ptr + i.to(tl.int64) * count + v, tl.sum(gradients, 0), mask=v < count)
    mask = (n < N)[:, None] & (v < count)[None, :]
    out = out_ptr + n.to(tl.int64)[:, None] * count + v[None, :]
    tl.store(out, gradients.to(element), mask=mask)


def logit_gradients_launch(
    upstream: Upstream,
    first: int,
    rows: Tensor,
    device: Device | None = None,
    tile: LossTile | None = None,
) -> tuple[Launch, Tensor, Tensor, Tensor]:
    """Return the launch of a piece of the table; the gradients, and parts of their sums that it fills."""
    (N, K), count = upstream.head.states.shape, len(rows)
    device = device or describe_device(rows)
    tile = tile or loss_tile_of("logit_gradients", device, upstream.head.states.dtype, N, K)
    blocks, row_blocks = cdiv(N, tile.BLOCK_N), cdiv(count, tile.BLOCK_V)
    out = upstream.head.states.new_empty(N, count)
    by_state, by_row = upstream.values.new_empty(row_blocks, N), upstream.values.new_empty(blocks, count)
    arguments = upstream.arguments(first, rows) | tile.blocks()
    arguments |= dict(out_ptr=out, state_sums_ptr=by_state, row_sums_ptr=by_row)
    grid = (blocks * row_blocks,)
    launch = Launch(_logit_gradients_kernel, grid, arguments, tile.num_warps, tile.num_stages)
    return launch, out, by_state, by_row


def logit_gradients(upstream: Upstream, first: int, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients (N, count) of the logits of a piece of the table, in the dtype of states, and their sums.

    The sums, by state (N,) and by row (count,), are those before the rounding to that dtype.
    """
    launch, out, by_state, by_row = logit_gradients_launch(upstream, first, rows)
    if len(out):
        launch.run()
    return out, by_state.sum(0), by_row.sum(0)
