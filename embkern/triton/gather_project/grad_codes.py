"""The gradient of codes: ``scale * grad @ basis^T`` per position, then sums over the positions of equal ids.

Positions are sorted by their ids. A segment is the positions of one id; its sum is made block by block.
"""
# mypy: disable-error-code="no-untyped-def"
# (Triton reads the annotations of a jit kernel: its pointers and sizes carry none.)

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...ops.reference import accumulation_dtype
from ..launch import Launch
from ..sizes import cdiv, next_power_of_2
from ..tiles import Device, Tile, describe_device, tile_of
from .forward import OUT_OF_RANGE

# Sorted positions that one program sums, and sums of such blocks that are joined at once.
_SEGMENT_BLOCK = 32
_JOIN_BLOCK = 32
_SEGMENT_COLUMNS = 32


@triton.jit(do_not_specialize=["N", "V", "padding_idx"], debug=True)
def _project_grad_kernel(
    grad_ptr,
    ids_ptr,
    basis_ptr,
    out_ptr,
    scale,
    N,
    V,
    padding_idx,
    r: tl.constexpr,
    H: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """``scale * grad @ basis^T`` per position (N, r); rows of padding are zero even if grad is NaN."""
    element = basis_ptr.dtype.element_ty
    accumulator: tl.constexpr = tl.float64 if element == tl.float64 else tl.float32
    R_TILES: tl.constexpr = (r + BLOCK_R - 1) // BLOCK_R
    n = (tl.program_id(0) // R_TILES).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = (tl.program_id(0) % R_TILES) * BLOCK_R + tl.arange(0, BLOCK_R)
    ids = tl.load(ids_ptr + n, mask=n < N, other=0).to(tl.int64)
    tl.device_assert((ids >= 0) & (ids < V), OUT_OF_RANGE)
    counted = ((n < N) & (ids != padding_idx))[:, None]
    columns = tl.arange(0, BLOCK_H)
    sums = tl.zeros((BLOCK_N, BLOCK_R), accumulator)
    for start in range(0, H, BLOCK_H):
        h = start + columns
        grad = tl.load(grad_ptr + n[:, None] * H + h[None, :], mask=counted & (h < H)[None, :], other=0.0)
        transposed = tl.load(
            basis_ptr + k[None, :] * H + h[:, None], mask=(k < r)[None, :] & (h < H)[:, None], other=0.0
        )
        sums = tl.dot(grad, transposed, sums, input_precision="ieee", out_dtype=accumulator)
    out = (sums * scale).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + n[:, None] * r + k[None, :], out, mask=(n < N)[:, None] & (k < r)[None, :])


@triton.jit(do_not_specialize=["N", "V"], debug=True)
def _sum_segments_kernel(
    rows_ptr,
    sorted_ids_ptr,
    order_ptr,
    grad_codes_ptr,
    heads_ptr,
    tails_ptr,
    N,
    V,
    r: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Sum the rows of equal ids within one block of sorted positions.

    A segment that lies within the block is finished here. A segment that crosses a border leaves its sum in
    ``tails[block]`` for the block where it begins and in ``heads[block]`` for those where it continues;
    _join_segments_kernel adds them. The work per program thus does not depend on how often an id occurs.
    """
    element = rows_ptr.dtype.element_ty
    R_TILES: tl.constexpr = (r + BLOCK_R - 1) // BLOCK_R
    block = (tl.program_id(0) // R_TILES).to(tl.int64)
    k = (tl.program_id(0) % R_TILES) * BLOCK_R + tl.arange(0, BLOCK_R)
    row = tl.arange(0, BLOCK)
    i = block * BLOCK + row
    ids = tl.load(sorted_ids_ptr + i, mask=i < N, other=-1).to(tl.int64)
    following = tl.load(sorted_ids_ptr + i + 1, mask=i + 1 < N, other=-1).to(tl.int64)
    preceding = tl.load(sorted_ids_ptr + block * BLOCK - 1, mask=block > 0, other=-1).to(tl.int64)
    columns = (k < r)[None, :]
    # Every position receives the sum of its segment; unrolled, so that the loads of four rows overlap. A
    # product with the 0/1 matrix of equal ids would give NaN (0 * inf) in rows of other ids. Positions beyond
    # N have the id -1, which does not occur.
    sums = tl.zeros((BLOCK, BLOCK_R), element)
    for j in tl.range(0, BLOCK, loop_unroll_factor=4):
        at = block * BLOCK + j
        id = tl.load(sorted_ids_ptr + at, mask=at < N, other=-1).to(tl.int64)
        position = tl.load(order_ptr + at, mask=at < N, other=0)
        values = tl.load(rows_ptr + position * r + k, mask=k < r, other=0.0)
        sums += tl.where((ids == id)[:, None], values[None, :], 0.0)

    begins_here = ids != preceding
    ends_here = ids != following
    done = (i < N) & begins_here & ends_here & (ids >= 0) & (ids < V)
    tl.store(
        grad_codes_ptr + ids[:, None] * r + k[None, :],
        sums.to(grad_codes_ptr.dtype.element_ty),
        mask=done[:, None] & columns,
    )
    part = block * r + k[None, :] + tl.zeros((BLOCK, 1), tl.int64)
    leaves = (i + 1 < N) & (row == BLOCK - 1) & (ids == following)
    tl.store(tails_ptr + part, sums, mask=(leaves & begins_here)[:, None] & columns)
    enters = (i < N) & (ids == preceding) & (ends_here | leaves)
    tl.store(heads_ptr + part, sums, mask=enters[:, None] & columns)


@triton.jit(do_not_specialize=["N", "V"], debug=True)
def _join_segments_kernel(
    sorted_ids_ptr,
    grad_codes_ptr,
    heads_ptr,
    tails_ptr,
    N,
    V,
    r: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_R: tl.constexpr,
    JOIN: tl.constexpr,
):
    """Finish the segment that begins in a block and leaves it: its tail plus the heads that follow."""
    R_TILES: tl.constexpr = (r + BLOCK_R - 1) // BLOCK_R
    block = (tl.program_id(0) // R_TILES).to(tl.int64)
    k = (tl.program_id(0) % R_TILES) * BLOCK_R + tl.arange(0, BLOCK_R)
    end = (block + 1) * BLOCK
    id = tl.load(sorted_ids_ptr + end - 1, mask=end < N, other=-1).to(tl.int64)
    following = tl.load(sorted_ids_ptr + end, mask=end < N, other=-2).to(tl.int64)
    preceding = tl.load(sorted_ids_ptr + end - BLOCK - 1, mask=block > 0, other=-1).to(tl.int64)
    if (id == following) & (id != preceding) & (id >= 0) & (id < V):
        sums = tl.load(tails_ptr + block * r + k, mask=k < r, other=0.0)
        later = block + 1 + tl.arange(0, JOIN)
        more = True
        while more:
            mine = (
                tl.load(sorted_ids_ptr + later * BLOCK, mask=later * BLOCK < N, other=-1).to(tl.int64) == id
            )
            heads = tl.load(
                heads_ptr + later[:, None] * r + k[None, :], mask=mine[:, None] & (k < r)[None, :], other=0.0
            )
            sums += tl.sum(heads, 0)
            later += JOIN
            more = tl.min(mine.to(tl.int32), 0) == 1
        tl.store(grad_codes_ptr + id * r + k, sums.to(grad_codes_ptr.dtype.element_ty), mask=k < r)


def project_grad_launch(
    grad: Tensor,
    ids: Tensor,
    codes: Tensor,
    basis: Tensor,
    scale: float,
    padding_idx: int,
    out: Tensor,
    device: Device | None = None,
    tile: Tile | None = None,
) -> Launch:
    """Return the launch that writes ``scale * grad @ basis^T`` per position into ``out`` (N, r)."""
    (N, H), (V, r) = grad.shape, codes.shape
    device = device or describe_device(codes)
    tile = tile or tile_of("project_grad", device, codes.dtype, N, r, H)
    arguments = dict(
        grad_ptr=grad,
        ids_ptr=ids,
        basis_ptr=basis,
        out_ptr=out,
        scale=float(scale),
        N=N,
        V=V,
        padding_idx=padding_idx,
        r=r,
        H=H,
        **tile.blocks(),
    )
    grid = (cdiv(N, tile.BLOCK_N) * cdiv(r, tile.BLOCK_R),)
    return Launch(_project_grad_kernel, grid, arguments, tile.num_warps, tile.num_stages)


def segment_launches(rows: Tensor, sorted_ids: Tensor, order: Tensor, grad_codes: Tensor) -> list[Launch]:
    """Return the launches that sum ``rows[order]`` (N, r) of equal ids into ``grad_codes`` (V, r), zeros."""
    (N, r), V = rows.shape, grad_codes.shape[0]
    blocks = cdiv(N, _SEGMENT_BLOCK)
    block_r = min(_SEGMENT_COLUMNS, max(16, next_power_of_2(r)))
    shared = dict(
        sorted_ids_ptr=sorted_ids,
        grad_codes_ptr=grad_codes,
        heads_ptr=rows.new_empty(blocks, r),
        tails_ptr=rows.new_empty(blocks, r),
        N=N,
        V=V,
        r=r,
        BLOCK=_SEGMENT_BLOCK,
        BLOCK_R=block_r,
    )
    grid = (blocks * cdiv(r, block_r),)
    return [
        Launch(_sum_segments_kernel, grid, dict(shared, rows_ptr=rows, order_ptr=order), num_warps=4),
        Launch(_join_segments_kernel, grid, dict(shared, JOIN=_JOIN_BLOCK), num_warps=4),
    ]


def sum_grad_codes(
    grad: Tensor,
    ids: Tensor,
    codes: Tensor,
    basis: Tensor,
    scale: float,
    padding_idx: int,
    grad_codes: Tensor,
) -> None:
    """Write the gradient of codes into ``grad_codes`` (V, r), zeros."""
    rows = grad.new_empty((ids.numel(), codes.shape[1]), dtype=accumulation_dtype(grad.dtype))
    project_grad_launch(grad, ids, codes, basis, scale, padding_idx, rows).run()
    sorted_ids, order = torch.sort(ids.reshape(-1), stable=True)
    for launch in segment_launches(rows, sorted_ids, order, grad_codes):
        launch.run()
