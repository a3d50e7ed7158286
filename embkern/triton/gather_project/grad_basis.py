"""The gradients of basis and offset: products and sums over splits of the positions, then over the splits."""
# mypy: disable-error-code="no-untyped-def"
# (Triton reads the annotations of a jit kernel: its pointers and sizes carry none.)

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ...ops.reference import accumulation_dtype
from ..launch import Launch
from ..sizes import cdiv
from ..tiles import Device, Tile, describe_device, tile_of
from .code_rows import code_rows
from .forward import OUT_OF_RANGE

# Splits that one step of _sum_splits_kernel adds, and columns per program.
_SPLIT_BLOCK = 16
_SPLIT_COLUMNS = 128


@triton.jit(do_not_specialize=["N", "V", "padding_idx", "split_size", "first_tile", "tiles"], debug=True)
def _grad_basis_kernel(
    grad_ptr,
    ids_ptr,
    codes_ptr,
    splits_ptr,
    N,
    V,
    padding_idx,
    split_size,
    first_tile,
    tiles,
    r: tl.constexpr,
    H: tl.constexpr,
    CODES_STRIDE: tl.constexpr,
    LOADED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """One split of the positions: ``codes[ids]^T @ grad`` in rows below r, the column sum of grad in row r.

    A program computes one of ``tiles`` row tiles from ``first_tile`` on; the last tile, R_TILES, is the
    column sum. The programs of one split have adjacent indices, so that its gradient and codes come from DRAM
    once.
    """
    element = codes_ptr.dtype.element_ty
    accumulator: tl.constexpr = tl.float64 if element == tl.float64 else tl.float32
    R_TILES: tl.constexpr = (r + BLOCK_R - 1) // BLOCK_R
    H_TILES: tl.constexpr = (H + BLOCK_H - 1) // BLOCK_H
    tile = first_tile + tl.program_id(0) % tiles
    h = (tl.program_id(0) // tiles % H_TILES) * BLOCK_H + tl.arange(0, BLOCK_H)
    split = (tl.program_id(0) // (tiles * H_TILES)).to(tl.int64)
    begin = split * split_size
    end = tl.minimum(begin + split_size, N)
    position = tl.arange(0, BLOCK_N)
    split_rows = splits_ptr + split * (r + 1) * H
    if tile == R_TILES:
        column = tl.zeros((BLOCK_H,), accumulator)
        for start in range(begin, end, BLOCK_N):
            n = start + position
            ids = tl.load(ids_ptr + n, mask=n < end, other=0).to(tl.int64)
            counted = (n < end) & (ids != padding_idx)
            grad = tl.load(
                grad_ptr + n[:, None] * H + h[None, :], mask=counted[:, None] & (h < H)[None, :], other=0.0
            )
            column += tl.sum(grad.to(accumulator), 0)
        tl.store(split_rows + r * H + h, column, mask=h < H)
    else:
        k = tile * BLOCK_R + tl.arange(0, BLOCK_R)
        sums = tl.zeros((BLOCK_R, BLOCK_H), accumulator)
        all_known = position >= 0
        for start in range(begin, end, BLOCK_N):
            n = start + position
            ids = tl.load(ids_ptr + n, mask=n < end, other=0).to(tl.int64)
            known = (ids >= 0) & (ids < V)
            all_known &= known  # An assertion in the loop would prevent its pipelining.
            counted = (n < end) & (ids != padding_idx)
            # What is loaded beyond r makes rows of the product that are not stored.
            transposed = tl.load(
                codes_ptr + ids[None, :] * CODES_STRIDE + k[:, None],
                mask=(counted & known)[None, :] & (k < LOADED)[:, None],
                other=0.0,
            )
            grad = tl.load(
                grad_ptr + n[:, None] * H + h[None, :], mask=counted[:, None] & (h < H)[None, :], other=0.0
            )
            sums = tl.dot(transposed, grad, sums, input_precision="ieee", out_dtype=accumulator)
        tl.device_assert(all_known, OUT_OF_RANGE)
        tl.store(split_rows + k[:, None] * H + h[None, :], sums, mask=(k < r)[:, None] & (h < H)[None, :])


@triton.jit(do_not_specialize=["splits", "first", "last"], debug=True)
def _sum_splits_kernel(
    splits_ptr,
    grad_basis_ptr,
    grad_offset_ptr,
    scale,
    splits,
    first,
    last,
    r: tl.constexpr,
    H: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_SPLITS: tl.constexpr,
):
    """Add the splits of _grad_basis_kernel in a fixed order: elements ``first`` to ``last`` of (r + 1, H)."""
    i = first + tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    split = tl.arange(0, BLOCK_SPLITS).to(tl.int64)
    sums = tl.zeros((BLOCK,), splits_ptr.dtype.element_ty)
    for start in range(0, splits, BLOCK_SPLITS):
        s = start + split
        mask = (s < splits)[:, None] & (i < last)[None, :]
        sums += tl.sum(tl.load(splits_ptr + s[:, None] * ((r + 1) * H) + i[None, :], mask=mask, other=0.0), 0)
    sums = (sums * scale).to(grad_basis_ptr.dtype.element_ty)
    tl.store(grad_basis_ptr + i, sums, mask=(i < last) & (i < r * H))
    tl.store(grad_offset_ptr + i - r * H, sums, mask=(i < last) & (i >= r * H))


def grad_basis_launches(
    grad: Tensor,
    ids: Tensor,
    codes: Tensor,
    scale: float,
    padding_idx: int,
    grad_basis: Tensor,
    grad_offset: Tensor,
    device: Device | None = None,
    tile: Tile | None = None,
) -> list[Launch]:
    """Return the launches that fill grad_basis (r, H) and grad_offset (H,); an empty one is not computed."""
    (N, H), (V, r) = grad.shape, codes.shape
    device = device or describe_device(codes)
    rows = code_rows(codes)
    tile = tile or tile_of("grad_basis", device, codes.dtype, N, r, H, rows.aligned)
    r_tiles = cdiv(r, tile.BLOCK_R)
    first_tile = 0 if grad_basis.numel() else r_tiles
    tiles = r_tiles - first_tile + (grad_offset.numel() > 0)
    programs_per_split = tiles * cdiv(H, tile.BLOCK_H)
    # As many splits as give two programs for every multiprocessor, but none shorter than four blocks.
    splits = max(1, min(2 * device.processors // programs_per_split, N // (4 * tile.BLOCK_N)))
    split_size = cdiv(cdiv(N, splits), tile.BLOCK_N) * tile.BLOCK_N
    splits = cdiv(N, split_size)
    partial = grad.new_empty((splits, r + 1, H), dtype=accumulation_dtype(grad.dtype))
    products = dict(
        grad_ptr=grad,
        ids_ptr=ids,
        codes_ptr=codes,
        splits_ptr=partial,
        N=N,
        V=V,
        padding_idx=padding_idx,
        split_size=split_size,
        first_tile=first_tile,
        tiles=tiles,
        r=r,
        H=H,
        CODES_STRIDE=rows.stride,
        LOADED=rows.loaded,
        **tile.blocks(),
    )
    first = 0 if grad_basis.numel() else r * H
    last = (r + 1) * H if grad_offset.numel() else r * H
    sums = dict(
        splits_ptr=partial,
        grad_basis_ptr=grad_basis,
        grad_offset_ptr=grad_offset,
        scale=float(scale),
        splits=splits,
        first=first,
        last=last,
        r=r,
        H=H,
        BLOCK=_SPLIT_COLUMNS,
        BLOCK_SPLITS=_SPLIT_BLOCK,
    )
    return [
        Launch(_grad_basis_kernel, (programs_per_split * splits,), products, tile.num_warps, tile.num_stages),
        Launch(_sum_splits_kernel, (cdiv(last - first, _SPLIT_COLUMNS),), sums, num_warps=4),
    ]
