"""gather_project in Triton: ``scale * (codes[ids] @ basis + offset)``, its out= form and its gradients.

    forward          out[n]          = scale * (codes[ids[n]] @ basis + offset)
    grad of codes    grad_codes[v]   = scale * sum over n with ids[n] = v of grad[n] @ basis^T
    grad of basis    grad_basis      = scale * sum over n of codes[ids[n]]^T grad[n]
    grad of offset   grad_offset     = scale * sum over n of grad[n]

ids (N,), codes (V, r), basis (r, H), offset (H,), grad and out (N, H). Sums run in fp32 (fp64 for fp64) and
are rounded once. There are no atomics and the order of every sum is fixed: the same call gives the same bits.

Three kernels multiply (one row block x column block per program, tensor cores for 16-bit factors), three more
put sums together that several programs share. r and H are constants of a model and therefore constexpr: the
compiler knows how rows are aligned (r = 72 still loads 16 bytes at a time). Row offsets are 64-bit.

`tl.dot` takes fp32 operands with ``input_precision="ieee"``. On tensor cores they would be cut to TF32 (10 of
23 bits), and three TF32 products (tf32x3) still drop the product of the two low parts and sum with
truncation, which is not safely within twice the error of a plain fp32 product.
"""
# mypy: disable-error-code="no-untyped-def"
# (Triton reads the annotations of a jit kernel: its pointers and sizes carry none.)

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..ops.reference import accumulation_dtype
from .launch import Launch
from .tiles import Device, Tile, describe_device, tile_of

_OUT_OF_RANGE = tl.constexpr("gather_project: an id is out of range")
# Sorted positions that one program sums for the gradient of codes, and how many such sums are joined at once.
_SEGMENT_BLOCK = 32
_JOIN_BLOCK = 32
_SEGMENT_COLUMNS = 32
# Splits that one step of _sum_splits_kernel adds, and columns per program.
_SPLIT_BLOCK = 16
_SPLIT_COLUMNS = 128


@triton.jit(do_not_specialize=["N", "V", "tiles_per_program"], debug=True)
def _gather_project_kernel(
    ids_ptr,
    codes_ptr,
    basis_ptr,
    offset_ptr,
    out_ptr,
    scale,
    N,
    V,
    tiles_per_program,
    r: tl.constexpr,
    H: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_TAIL: tl.constexpr,
):
    """One block of rows times ``tiles_per_program`` column tiles.

    The programs of one row block are neighbours, so its gathered codes come from DRAM once and the basis
    stays in L2. Where r fits BLOCK_R + BLOCK_TAIL the program keeps the codes on chip and streams the basis
    past them: two powers of two cover a rank with little padding (75 with 64 + 16). A greater r is walked in
    steps, codes and basis alike.
    """
    element = codes_ptr.dtype.element_ty
    accumulator: tl.constexpr = tl.float64 if element == tl.float64 else tl.float32
    H_TILES: tl.constexpr = (H + BLOCK_H - 1) // BLOCK_H
    chunks = tl.cdiv(H_TILES, tiles_per_program)
    n = (tl.program_id(0) // chunks).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    ids = tl.load(ids_ptr + n, mask=n < N, other=0).to(tl.int64)
    known = (ids >= 0) & (ids < V)
    tl.device_assert(known, _OUT_OF_RANGE)
    gathered = ((n < N) & known)[:, None]  # an id out of range reads nothing
    rows = codes_ptr + ids[:, None] * r
    k = tl.arange(0, BLOCK_R)
    RESIDENT: tl.constexpr = r <= BLOCK_R + BLOCK_TAIL
    if RESIDENT:
        codes = tl.load(rows + k[None, :], mask=gathered & (k < r)[None, :], other=0.0)
        if BLOCK_TAIL > 0:
            t = BLOCK_R + tl.arange(0, BLOCK_TAIL)
            codes_tail = tl.load(rows + t[None, :], mask=gathered & (t < r)[None, :], other=0.0)

    first = (tl.program_id(0) % chunks) * tiles_per_program
    for tile in range(first, min(first + tiles_per_program, H_TILES)):
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
                codes = tl.load(rows + s[None, :], mask=gathered & (s < r)[None, :], other=0.0)
                basis = _basis_tile(basis_ptr, s, h, r, H)
                sums = tl.dot(codes, basis, sums, input_precision="ieee", out_dtype=accumulator)
        if offset_ptr is not None:
            sums += tl.load(offset_ptr + h, mask=h < H, other=0.0).to(accumulator)[None, :]
        out = (sums * scale).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + n[:, None] * H + h[None, :], out, mask=(n < N)[:, None] & (h < H)[None, :])


@triton.jit
def _basis_tile(basis_ptr, k, h, r: tl.constexpr, H: tl.constexpr):
    """Rows ``k`` and columns ``h`` of the basis, zero outside it."""
    return tl.load(
        basis_ptr + k[:, None] * H + h[None, :], mask=(k < r)[:, None] & (h < H)[None, :], other=0.0
    )


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
    """``scale * grad @ basis^T`` per position (N, r); rows of padding are zero, whatever their gradient."""
    element = basis_ptr.dtype.element_ty
    accumulator: tl.constexpr = tl.float64 if element == tl.float64 else tl.float32
    R_TILES: tl.constexpr = (r + BLOCK_R - 1) // BLOCK_R
    n = (tl.program_id(0) // R_TILES).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = (tl.program_id(0) % R_TILES) * BLOCK_R + tl.arange(0, BLOCK_R)
    ids = tl.load(ids_ptr + n, mask=n < N, other=0).to(tl.int64)
    tl.device_assert((ids >= 0) & (ids < V), _OUT_OF_RANGE)
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

    A segment (the positions of one id) that lies within the block is finished here. Of one that crosses its
    borders the sum goes to ``tails[block]`` where the segment begins and to ``heads[block]`` where it goes
    on; _join_segments_kernel adds those. So the work per program does not depend on how often an id occurs.
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
    # Every position gets the sum of its segment; unrolled, so that the loads of four rows overlap. A product
    # with the 0/1 matrix of equal ids would do the same, but 0 * inf would spoil the rows of other ids.
    # Beyond N the id is -1, which is nobody's.
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
    BLOCK_N: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """One split of the positions: ``codes[ids]^T @ grad`` in rows below r, the column sum of grad in row r.

    A program computes one of ``tiles`` row tiles from ``first_tile`` on; tile R_TILES, the last, is the
    column sum. The programs of one split are neighbours, so its gradient and codes come from DRAM once.
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
            all_known &= known  # an assertion in the loop would keep it from being pipelined
            counted = (n < end) & (ids != padding_idx)
            transposed = tl.load(
                codes_ptr + ids[None, :] * r + k[:, None],
                mask=(counted & known)[None, :] & (k < r)[:, None],
                other=0.0,
            )
            grad = tl.load(
                grad_ptr + n[:, None] * H + h[None, :], mask=counted[:, None] & (h < H)[None, :], other=0.0
            )
            sums = tl.dot(transposed, grad, sums, input_precision="ieee", out_dtype=accumulator)
        tl.device_assert(all_known, _OUT_OF_RANGE)
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


def gather_project_forward(
    ids: Tensor, codes: Tensor, basis: Tensor, offset: Tensor | None, scale: float
) -> Tensor:
    """Return ``scale * (codes[ids] @ basis + offset)``, (``*ids.shape``, H) in the factors' dtype."""
    out = codes.new_empty(*ids.shape, basis.shape[1])
    gather_project_out(ids, codes, basis, offset, scale, out)
    return out


def gather_project_out(
    ids: Tensor, codes: Tensor, basis: Tensor, offset: Tensor | None, scale: float, out: Tensor
) -> None:
    """Write ``scale * (codes[ids] @ basis + offset)`` into ``out``, (``*ids.shape``, H), contiguous."""
    if out.numel():
        with torch.cuda.device_of(codes):
            forward_launch(ids, codes, basis, offset, scale, out).run()


def gather_project_backward(
    grad: Tensor,
    ids: Tensor,
    codes: Tensor,
    basis: Tensor,
    scale: float,
    padding_idx: int,
    needs_codes: bool,
    needs_basis: bool,
    needs_offset: bool,
    sparse: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return (code_ids, grad_codes, grad_basis, grad_offset); one that is not needed is empty.

    Args:
        grad: (N, H), the gradient of the rows.
        ids: N of them, int32 or int64.
        codes: (V, r).
        basis: (r, H).
        scale: of the forward.
        padding_idx: positions with this id count for nothing; -1 for none.
        needs_codes: whether grad_codes is asked for.
        needs_basis: whether grad_basis is asked for.
        needs_offset: whether grad_offset is asked for.
        sparse: give one row of grad_codes per position (N, r), zero for padding, and the ids in code_ids
            (N,) int64, in place of the dense (V, r): the uncoalesced form, which needs no sort and no count.
    """
    code_ids = ids.new_empty(0, dtype=torch.int64)
    grad_codes = grad_basis = grad_offset = codes.new_empty(0)
    nothing = grad.numel() == 0
    allocate = codes.new_zeros if nothing else codes.new_empty
    if needs_codes:
        grad_codes = allocate(ids.numel(), codes.shape[1]) if sparse else torch.zeros_like(codes)
        code_ids = ids.reshape(-1).to(torch.int64, copy=True) if sparse else code_ids
    if needs_basis:
        grad_basis = allocate(basis.shape)
    if needs_offset:
        grad_offset = allocate(basis.shape[1])
    if nothing:
        return code_ids, grad_codes, grad_basis, grad_offset
    with torch.cuda.device_of(codes):
        # What is not needed has no elements, nor have codes and basis at rank 0.
        if grad_codes.numel() and sparse:
            project_grad_launch(grad, ids, codes, basis, scale, padding_idx, grad_codes).run()
        elif grad_codes.numel():
            _sum_grad_codes(grad, ids, codes, basis, scale, padding_idx, grad_codes)
        if grad_basis.numel() or grad_offset.numel():
            for launch in grad_basis_launches(grad, ids, codes, scale, padding_idx, grad_basis, grad_offset):
                launch.run()
    return code_ids, grad_codes, grad_basis, grad_offset


def forward_launch(
    ids: Tensor,
    codes: Tensor,
    basis: Tensor,
    offset: Tensor | None,
    scale: float,
    out: Tensor,
    device: Device | None = None,
    tile: Tile | None = None,
) -> Launch:
    """Return the launch of gather_project_out; ``device`` and ``tile`` stand in for the tensors' own."""
    N, (V, r), H = ids.numel(), codes.shape, basis.shape[1]
    device = device or describe_device(codes)
    tile = tile or tile_of("forward", device, codes.dtype, N, r, H)
    row_blocks, h_tiles = triton.cdiv(N, tile.BLOCK_N), triton.cdiv(H, tile.BLOCK_H)
    # As long a run of tiles per program as leaves two programs for every multiprocessor.
    tiles_per_program = max(1, min(h_tiles, row_blocks * h_tiles // (2 * device.processors)))
    arguments = dict(
        ids_ptr=ids,
        codes_ptr=codes,
        basis_ptr=basis,
        offset_ptr=offset,
        out_ptr=out,
        scale=float(scale),
        N=N,
        V=V,
        tiles_per_program=tiles_per_program,
        r=r,
        H=H,
        **tile.blocks(),
        BLOCK_TAIL=tile.BLOCK_TAIL,
    )
    grid = (row_blocks * triton.cdiv(h_tiles, tiles_per_program),)
    return Launch(_gather_project_kernel, grid, arguments, tile.num_warps, tile.num_stages)


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
    grid = (triton.cdiv(N, tile.BLOCK_N) * triton.cdiv(r, tile.BLOCK_R),)
    return Launch(_project_grad_kernel, grid, arguments, tile.num_warps, tile.num_stages)


def segment_launches(rows: Tensor, sorted_ids: Tensor, order: Tensor, grad_codes: Tensor) -> list[Launch]:
    """Return the launches that sum ``rows[order]`` (N, r) of equal ids into ``grad_codes`` (V, r), zeros."""
    (N, r), V = rows.shape, grad_codes.shape[0]
    blocks = triton.cdiv(N, _SEGMENT_BLOCK)
    block_r = min(_SEGMENT_COLUMNS, max(16, triton.next_power_of_2(r)))
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
    grid = (blocks * triton.cdiv(r, block_r),)
    return [
        Launch(_sum_segments_kernel, grid, dict(shared, rows_ptr=rows, order_ptr=order), num_warps=4),
        Launch(_join_segments_kernel, grid, dict(shared, JOIN=_JOIN_BLOCK), num_warps=4),
    ]


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
    """Return the launches that fill grad_basis (r, H) and grad_offset (H,); an empty one is left out."""
    (N, H), (V, r) = grad.shape, codes.shape
    device = device or describe_device(codes)
    tile = tile or tile_of("grad_basis", device, codes.dtype, N, r, H)
    r_tiles = triton.cdiv(r, tile.BLOCK_R)
    first_tile = 0 if grad_basis.numel() else r_tiles
    tiles = r_tiles - first_tile + (grad_offset.numel() > 0)
    programs_per_split = tiles * triton.cdiv(H, tile.BLOCK_H)
    # Splits until there are two programs for every multiprocessor, but none shorter than four blocks.
    splits = max(1, min(2 * device.processors // programs_per_split, N // (4 * tile.BLOCK_N)))
    split_size = triton.cdiv(triton.cdiv(N, splits), tile.BLOCK_N) * tile.BLOCK_N
    splits = triton.cdiv(N, split_size)
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
        Launch(_sum_splits_kernel, (triton.cdiv(last - first, _SPLIT_COLUMNS),), sums, num_warps=4),
    ]


def _sum_grad_codes(
    grad: Tensor,
    ids: Tensor,
    codes: Tensor,
    basis: Tensor,
    scale: float,
    padding_idx: int,
    grad_codes: Tensor,
) -> None:
    rows = grad.new_empty((ids.numel(), codes.shape[1]), dtype=accumulation_dtype(grad.dtype))
    project_grad_launch(grad, ids, codes, basis, scale, padding_idx, rows).run()
    sorted_ids, order = torch.sort(ids.reshape(-1), stable=True)
    for launch in segment_launches(rows, sorted_ids, order, grad_codes):
        launch.run()
