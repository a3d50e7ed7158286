"""The forward of gather_project: ``out[n] = scale * (codes[ids[n]] @ basis + offset)``."""
# mypy: disable-error-code="no-untyped-def"
# (Triton reads the annotations of a jit kernel: its pointers and sizes carry none.)

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..launch import Launch
from ..sizes import cdiv
from ..tiles import Device, Tile, describe_device, tile_of
from .code_rows import code_rows, load_codes

OUT_OF_RANGE = tl.constexpr("gather_project: an id is out of range")


@triton.jit(do_not_specialize=["N", "V", "tiles_per_program"], debug=True)
def _gather_project_kernel(
    ids_ptr,
    codes_ptr,
    basis_ptr,
    offset_ptr,
    out_ptr,
    factors_ptr,
    scale: tl.float64,
    N,
    V,
    tiles_per_program,
    r: tl.constexpr,
    H: tl.constexpr,
    CODES_STRIDE: tl.constexpr,
    LOADED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_TAIL: tl.constexpr,
):
    """One block of rows times ``tiles_per_program`` column tiles.

    The programs of one row block have adjacent indices, so that its gathered codes come from DRAM once and
    the basis stays in L2. Where r fits BLOCK_R + BLOCK_TAIL, the program keeps the codes on chip and streams
    the basis: two powers of two cover a rank with little padding (75 with 64 + 16). For a greater r, codes
    and basis are loaded in steps of BLOCK_R.
    """
    element = codes_ptr.dtype.element_ty
    accumulator: tl.constexpr = tl.float64 if element == tl.float64 else tl.float32
    H_TILES: tl.constexpr = (H + BLOCK_H - 1) // BLOCK_H
    chunks = tl.cdiv(H_TILES, tiles_per_program)
    n = (tl.program_id(0) // chunks).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    ids = tl.load(ids_ptr + n, mask=n < N, other=0).to(tl.int64)
    known = (ids >= 0) & (ids < V)
    gathered = ((n < N) & known)[:, None]  # An id out of range reads nothing.
    if factors_ptr is None:
        tl.device_assert(known, OUT_OF_RANGE)
        written = (n < N)[:, None]
        count = tiles_per_program
    else:
        written = gathered
        count = tiles_per_program * tl.max(gathered.to(tl.int32))
    scale = tl.full((), scale, accumulator)
    rows = codes_ptr + ids[:, None] * CODES_STRIDE
    k = tl.arange(0, BLOCK_R)
    RESIDENT: tl.constexpr = r <= BLOCK_R + BLOCK_TAIL
    if RESIDENT:
        codes = load_codes(rows, k, gathered, r, LOADED)
        if BLOCK_TAIL > 0:
            t = BLOCK_R + tl.arange(0, BLOCK_TAIL)
            codes_tail = load_codes(rows, t, gathered, r, LOADED)

    first = (tl.program_id(0) % chunks) * tiles_per_program
    for tile in range(first, min(first + count, H_TILES)):
        h = tile * BLOCK_H + tl.arange(0, BLOCK_H)
        sums = tl.zeros((BLOCK_N, BLOCK_H), accumulator)
        if RESIDENT:
            basis = _basis_tile(basis_ptr, k, h, r, H)
            sums = tl.dot(codes, basis, sums, input_precision="ieee", out_dtype=accumulator)
            if BLOCK_TAIL > 0:
                basis_tail = _basis_tile(basis_ptr, t, h, r, H)
                sums = tl.dot(codes_tail, basis_tail, sums, input_precision="ieee", out_dtype=accumulator)
        else:
            for start in range(0, r, BLOCK_R):
                s = start + k
                codes = load_codes(rows, s, gathered, r, LOADED)
                basis = _basis_tile(basis_ptr, s, h, r, H)
                sums = tl.dot(codes, basis, sums, input_precision="ieee", out_dtype=accumulator)
        if factors_ptr is not None:
            sums *= tl.load(factors_ptr + n, mask=n < N, other=0.0)[:, None]
        if offset_ptr is not None:
            sums += tl.load(offset_ptr + h, mask=h < H, other=0.0).to(accumulator)[None, :]
        out = (sums * scale).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + n[:, None] * H + h[None, :], out, mask=written & (h < H)[None, :])


@triton.jit
def _basis_tile(basis_ptr, k, h, r: tl.constexpr, H: tl.constexpr):
    """Rows ``k`` and columns ``h`` of the basis, zero outside it."""
    return tl.load(
        basis_ptr + k[:, None] * H + h[None, :], mask=(k < r)[:, None] & (h < H)[None, :], other=0.0
    )


def forward_launch(
    ids: Tensor,
    codes: Tensor,
    basis: Tensor,
    offset: Tensor | None,
    scale: float,
    out: Tensor,
    device: Device | None = None,
    tile: Tile | None = None,
    factors: Tensor | None = None,
) -> Launch:
    """Return the launch of gather_project_out; ``device`` and ``tile`` stand in for the tensors' own.

    With ``factors`` (N,), in the dtype of the sums, out[n] is ``scale * (factors[n] * (codes[ids[n]] @ basis)
    + offset)`` if ids[n] is in range, and is left as it is otherwise.
    """
    N, (V, r), H = ids.numel(), codes.shape, basis.shape[1]
    device = device or describe_device(codes)
    rows = code_rows(codes)
    tile = tile or tile_of("forward", device, codes.dtype, N, r, H, rows.aligned)
    row_blocks, h_tiles = cdiv(N, tile.BLOCK_N), cdiv(H, tile.BLOCK_H)
    # The longest run of tiles per program that leaves two programs for every multiprocessor.
    tiles_per_program = max(1, min(h_tiles, row_blocks * h_tiles // (2 * device.processors)))
    arguments = dict(
        ids_ptr=ids,
        codes_ptr=codes,
        basis_ptr=basis,
        offset_ptr=offset,
        out_ptr=out,
        factors_ptr=factors,
        scale=float(scale),
        N=N,
        V=V,
        tiles_per_program=tiles_per_program,
        r=r,
        H=H,
        CODES_STRIDE=rows.stride,
        LOADED=rows.loaded,
        **tile.blocks(),
        BLOCK_TAIL=tile.BLOCK_TAIL,
    )
    grid = (row_blocks * cdiv(h_tiles, tiles_per_program),)
    return Launch(_gather_project_kernel, grid, arguments, tile.num_warps, tile.num_stages)
