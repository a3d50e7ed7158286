"""gather_decode in Triton: rows of a packed table, ``scale * (scales[ids] * row(records[ids]) + offset)``.

    row of values          row = values of its codes
    row of coefficients    row = values of its codes @ basis

ids (*), records (W,), directory (ceil(V / 32), 5), tiers (T, 1 + G), levels (4, 128), scales (V,), basis
(K, H), offset (H,) -> (*, H) in the dtype of scales. docs/packed-format.md specifies the format;
reference.gather_decode_forward is the definition.

There are two launches, one for rows of values and one, if there is a basis, for rows of coefficients. A
single kernel would hold the shared memory of the product while it unpacks rows of values, and a block of
positions seldom has rows of only one kind. Each kernel masks the rows of the other kind, so that an infinite
entry of the basis does not reach rows of values. A program without a row of its kind ends early: no launch
depends on the ids, so that the host does not wait for the device.

    _rows_kernel         BLOCK_N positions, all columns in steps of BLOCK_G groups of 32; 40 instructions per
                         element, almost no shared memory
    _products_kernel     BLOCK_N positions by a run of column tiles, as in gather_project; the coefficients
                         are unpacked on chip and never written

The record of a row is located by counting: its entry of the directory says where the records of 32 rows
begin, and the size of each tier is added as often as its nibble occurs before that of the row, 8 nibbles at a
time. A code, or the state that selects its level, is composed of bit planes by shifts, the highest plane
first: the bit of the lane moves to the top of the word and from there into the code. The codes of earlier
values are rotated planes.

The product is exact except for its sums. Values are whole numbers of at most 16 bits times a power of two,
which is the sum of two bf16 or fp16 numbers; tensor cores multiply both. fp32 takes
``input_precision="ieee"`` (no TF32).

Run: ``gather_decode(..., backend="triton")``, and without a device under TRITON_INTERPRET=1; compile with
``python -m embkern.triton.aot``.
"""
# mypy: disable-error-code="no-untyped-def"
# (Triton reads the annotations of a jit kernel: only constants and fp64 scalars have one.)

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..ops.packed_format import GROUP, LEVEL_BITS, LEVEL_STEP, MAX_BITS, STATE_BITS, STATES, PackedTensors
from .launch import Launch
from .tiles import Device, GroupTile, Tile, describe_device, group_tile_of, tile_of

_GROUP = tl.constexpr(GROUP)
_LEVEL_BITS = tl.constexpr(LEVEL_BITS)
_LEVEL_STEP = tl.constexpr(LEVEL_STEP)
_STATE_BITS = tl.constexpr(STATE_BITS)
_STATES = tl.constexpr(STATES)
_PLANES = tl.constexpr(MAX_BITS)
_OUT_OF_RANGE = tl.constexpr("gather_decode: an id is out of range")
_CORRUPT = tl.constexpr("gather_decode: the directory does not fit tiers and records")


@triton.jit
def _locate(
    ids_ptr,
    directory_ptr,
    tiers_ptr,
    scales_ptr,
    n,
    N,
    V,
    W,
    T: tl.constexpr,
    G: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_BITS: tl.constexpr,
):
    """Tier, first word and factor of the rows at positions ``n``, and two masks.

    ``known``: the id is in range; ``present``: there is a row, and its record lies within ``records``.
    """
    ids = tl.load(ids_ptr + n, mask=n < N, other=0).to(tl.int64)
    known = (ids >= 0) & (ids < V)
    there = (n < N) & known
    factor = tl.load(scales_ptr + ids, mask=there, other=0.0)
    entry = directory_ptr + (ids // _GROUP) * 5
    lane = (ids % _GROUP).to(tl.int32)
    start = tl.load(entry, mask=there, other=0).to(tl.int64)
    nibble = tl.load(entry + 1 + lane // 8, mask=there, other=0).to(tl.int32) >> (lane % 8 * 4)
    tier = nibble & 15

    t = tl.arange(0, BLOCK_T)
    g = tl.arange(0, BLOCK_BITS)
    bits = tl.load(
        tiers_ptr + t[:, None] * (1 + G) + 1 + g[None, :], mask=(t < T)[:, None] & (g < G)[None, :], other=0
    )
    sizes = tl.sum(bits.to(tl.int32), 1)
    counts = tl.zeros((n.shape[0], BLOCK_T), tl.int32)
    for word in tl.static_range(4):
        nibbles = tl.load(entry + 1 + word, mask=there, other=0)
        before = tl.minimum(tl.maximum(lane - 8 * word, 0), 8)
        counted = ((tl.full(before.shape, 1, tl.int64) << (4 * before)) - 1).to(tl.int32)
        differ = nibbles[:, None] ^ (t * 0x11111111)[None, :]
        differ |= differ >> 2
        differ |= differ >> 1  # The lowest bit of a nibble says whether it is another tier.
        equal = ~differ & 0x11111111 & counted[:, None]
        counts += ((equal * 0x11111111).to(tl.uint32, bitcast=True) >> 28).to(tl.int32)  # up to 8
    start += tl.sum(counts * sizes[None, :], 1)
    size = tl.sum(tl.where(tier[:, None] == t[None, :], sizes[None, :], 0), 1)
    present = there & (tier < T) & (start >= 0) & (start + size <= W)
    return tier, start, factor, known, present


@triton.jit
def _values(records_ptr, levels_ptr, place, bits):
    """Values (rows, groups, 32) in fp32 of groups of ``bits`` bits at word ``place``, both (rows, groups)."""
    lane = tl.arange(0, _GROUP)[None, None, :]
    own = (bits > 0) & (bits <= _LEVEL_BITS)
    code = tl.zeros((bits.shape[0], bits.shape[1], _GROUP), tl.uint32)
    for bit in tl.static_range(_PLANES - 1, -1, -1):
        # Bit `bit` of a state is a bit of the code `before` values earlier: its plane, rotated.
        before = tl.where(own, 0, 0)
        for each in tl.static_range(1, _LEVEL_BITS + 1):
            before = tl.where(bits == each, bit // each, before)
        mask = (bit < bits) | (own & (bit < _STATE_BITS))
        word = tl.load(records_ptr + place + (bit - before * bits), mask=mask, other=0)
        word = word.to(tl.uint32, bitcast=True)
        rotation = before.to(tl.uint32)
        word = (word << rotation) | ((word >> 1) >> (31 - rotation))
        code = (code << 1) | ((word[:, :, None] << (31 - lane).to(tl.uint32)) >> 31)
    code = code.to(tl.int32)
    width = bits[:, :, None]
    at = (width - 1) * _STATES + code
    level = tl.load(levels_ptr + at, mask=own[:, :, None] & (code >= 0), other=0).to(tl.int32)
    uniform = width > _LEVEL_BITS
    number = tl.where(uniform, 2 * code + 1 - (1 << width), level)  # (code - (2^b - 1) / 2) doubled
    return number.to(tl.float32) * tl.where(uniform, 0.5, _LEVEL_STEP)


@triton.jit
def _group_bits(tiers_ptr, tier, group, present, G: tl.constexpr, most: tl.constexpr):
    """Bits (rows, groups) of groups ``group`` of the rows' tiers; 0 in rows not ``present``."""
    mask = present[:, None] & ((group < G) & (group < most))[None, :]
    return tl.load(tiers_ptr + tier[:, None] * (1 + G) + 1 + group[None, :], mask=mask, other=0).to(tl.int32)


@triton.jit(do_not_specialize=["N", "V", "W"], debug=True)
def _rows_kernel(
    ids_ptr,
    records_ptr,
    directory_ptr,
    tiers_ptr,
    levels_ptr,
    scales_ptr,
    offset_ptr,
    out_ptr,
    scale: tl.float64,
    N,
    V,
    W,
    has_basis: tl.constexpr,
    T: tl.constexpr,
    G: tl.constexpr,
    H: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_BITS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_G: tl.constexpr,
):
    """Whole rows of values at BLOCK_N positions."""
    accumulator: tl.constexpr = tl.float64 if scales_ptr.dtype.element_ty == tl.float64 else tl.float32
    GROUPS: tl.constexpr = (H + _GROUP - 1) // _GROUP
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    tier, start, factor, known, present = _locate(
        ids_ptr, directory_ptr, tiers_ptr, scales_ptr, n, N, V, W, T, G, BLOCK_T, BLOCK_BITS
    )
    tl.device_assert(known, _OUT_OF_RANGE)
    tl.device_assert(present | (n >= N) | ~known, _CORRUPT)
    mine = n < N
    if has_basis:
        mine &= tl.load(tiers_ptr + tier * (1 + G), mask=present, other=0) == 0
    factor = factor.to(accumulator)[:, None, None]
    scale = tl.full((), scale, accumulator)
    lane = tl.arange(0, _GROUP)
    last = GROUPS * tl.max(mine.to(tl.int32), 0)
    for first in range(0, last, BLOCK_G):
        group = first + tl.arange(0, BLOCK_G)
        bits = _group_bits(tiers_ptr, tier, group, present & mine, G, GROUPS)
        place = start[:, None] + tl.cumsum(bits, 1) - bits
        rows = _values(records_ptr, levels_ptr, place, bits).to(accumulator) * factor
        start += tl.sum(bits, 1)
        h = (group[:, None] * _GROUP + lane[None, :])[None, :, :]
        if offset_ptr is not None:
            rows += tl.load(offset_ptr + h, mask=h < H, other=0.0).to(accumulator)
        at = out_ptr + n[:, None, None] * H + h
        tl.store(at, (rows * scale).to(out_ptr.dtype.element_ty), mask=mine[:, None, None] & (h < H))


@triton.jit
def _coefficients(
    records_ptr,
    tiers_ptr,
    levels_ptr,
    tier,
    start,
    present,
    first,
    K: tl.constexpr,
    G: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Coefficients (rows, BLOCK_R) in fp32 from group ``first`` on, and the place of the next."""
    group = first + tl.arange(0, BLOCK_R // _GROUP)
    bits = _group_bits(tiers_ptr, tier, group, present, G, K // _GROUP)
    place = start[:, None] + tl.cumsum(bits, 1) - bits
    values = tl.reshape(_values(records_ptr, levels_ptr, place, bits), (tier.shape[0], BLOCK_R))
    return values, start + tl.sum(bits, 1)


@triton.jit
def _operands(values, element: tl.constexpr):
    """The factors that sum to values: ``high`` in the dtype of the basis, and its rounding error ``low``."""
    high = values.to(element)
    low = (values - high.to(tl.float32)).to(element)
    if element == tl.float64:
        # Triton 3.6 chooses the layout of an operand by the narrowest load that it was computed from, here
        # the byte of a tier, and has no such layout for fp64. A sum, here of one value, hides the load.
        high = tl.sum(high[:, :, None], 2)
    return high, low


@triton.jit
def _add_product(sums, high, low, basis_ptr, k, h, K: tl.constexpr, H: tl.constexpr):
    """``sums + (high + low) @ basis[k, h]``; low is zero unless the factors have 16 bits."""
    mask = (k < K)[:, None] & (h < H)[None, :]
    basis = tl.load(basis_ptr + k[:, None] * H + h[None, :], mask=mask, other=0.0)
    sums = tl.dot(high, basis, sums, input_precision="ieee", out_dtype=sums.dtype)
    if basis.dtype.primitive_bitwidth == 16:
        sums = tl.dot(low, basis, sums, input_precision="ieee", out_dtype=sums.dtype)
    return sums


@triton.jit(do_not_specialize=["N", "V", "W", "tiles_per_program"], debug=True)
def _products_kernel(
    ids_ptr,
    records_ptr,
    directory_ptr,
    tiers_ptr,
    levels_ptr,
    scales_ptr,
    basis_ptr,
    offset_ptr,
    out_ptr,
    scale: tl.float64,
    N,
    V,
    W,
    tiles_per_program,
    T: tl.constexpr,
    G: tl.constexpr,
    K: tl.constexpr,
    H: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_BITS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Rows of coefficients among BLOCK_N positions times ``tiles_per_program`` column tiles of the basis.

    Up to BLOCK_R coefficients stay on chip while the basis is streamed; more are unpacked in steps, again for
    every column tile. _rows_kernel makes the assertions.
    """
    element: tl.constexpr = basis_ptr.dtype.element_ty
    accumulator: tl.constexpr = tl.float64 if element == tl.float64 else tl.float32
    H_TILES: tl.constexpr = (H + BLOCK_H - 1) // BLOCK_H
    RESIDENT: tl.constexpr = K <= BLOCK_R
    chunks = tl.cdiv(H_TILES, tiles_per_program)
    n = (tl.program_id(0) // chunks).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    tier, start, factor, _, present = _locate(
        ids_ptr, directory_ptr, tiers_ptr, scales_ptr, n, N, V, W, T, G, BLOCK_T, BLOCK_BITS
    )
    present &= tl.load(tiers_ptr + tier * (1 + G), mask=present, other=0) != 0
    factor = factor.to(accumulator)[:, None]
    scale = tl.full((), scale, accumulator)
    k = tl.arange(0, BLOCK_R)
    if RESIDENT:
        values, _ = _coefficients(records_ptr, tiers_ptr, levels_ptr, tier, start, present, 0, K, G, BLOCK_R)
        high, low = _operands(values, element)

    first = (tl.program_id(0) % chunks) * tiles_per_program
    count = tiles_per_program * tl.max(present.to(tl.int32), 0)
    for tile in range(first, min(first + count, H_TILES)):
        h = tile * BLOCK_H + tl.arange(0, BLOCK_H)
        sums = tl.zeros((BLOCK_N, BLOCK_H), accumulator)
        if RESIDENT:
            sums = _add_product(sums, high, low, basis_ptr, k, h, K, H)
        else:
            place = start
            for step in range(0, K, BLOCK_R):
                values, place = _coefficients(
                    records_ptr, tiers_ptr, levels_ptr, tier, place, present, step // _GROUP, K, G, BLOCK_R
                )
                high, low = _operands(values, element)
                sums = _add_product(sums, high, low, basis_ptr, step + k, h, K, H)
        sums *= factor
        if offset_ptr is not None:
            sums += tl.load(offset_ptr + h, mask=h < H, other=0.0).to(accumulator)[None, :]
        out = (sums * scale).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + n[:, None] * H + h[None, :], out, mask=present[:, None] & (h < H)[None, :])


def gather_decode_forward(
    ids: Tensor,
    records: Tensor,
    directory: Tensor,
    tiers: Tensor,
    levels: Tensor,
    scales: Tensor,
    basis: Tensor | None,
    offset: Tensor | None,
    embedding_dim: int,
    scale: float,
) -> Tensor:
    """Return ``scale * (scales[ids] * rows + offset)``, (``*ids.shape``, H) in the dtype of scales."""
    out = scales.new_empty(*ids.shape, embedding_dim)
    if out.numel():
        with torch.cuda.device_of(scales):
            packed = PackedTensors(records, directory, tiers, levels, scales, basis, offset)
            for launch in forward_launches(ids, packed, scale, out):
                launch.run()
    return out


def forward_launches(
    ids: Tensor,
    packed: PackedTensors,
    scale: float,
    out: Tensor,
    device: Device | None = None,
    group_tile: GroupTile | None = None,
    tile: Tile | None = None,
) -> Iterator[Launch]:
    """Yield the launches that fill ``out``; ``device`` and the tiles stand in for the tensors' own."""
    records, directory, tiers, levels, scales, basis, offset = packed
    N, H = ids.numel(), out.shape[-1]
    if basis is not None and basis.shape[0] == 0:
        basis = None  # No tier has coefficients.
    shared = dict(
        ids_ptr=ids,
        records_ptr=records,
        directory_ptr=directory,
        tiers_ptr=tiers,
        levels_ptr=levels,
        scales_ptr=scales,
        offset_ptr=offset,
        out_ptr=out,
        scale=float(scale),
        N=N,
        V=scales.shape[0],
        W=records.shape[0],
        T=tiers.shape[0],
        G=tiers.shape[1] - 1,
        H=H,
        BLOCK_T=triton.next_power_of_2(tiers.shape[0]),
        BLOCK_BITS=triton.next_power_of_2(tiers.shape[1] - 1),
    )
    group_tile = group_tile or group_tile_of(N, triton.cdiv(H, GROUP))
    blocks = dict(BLOCK_N=group_tile.BLOCK_N, BLOCK_G=group_tile.BLOCK_G)
    arguments = dict(shared, has_basis=basis is not None, **blocks)
    yield Launch(_rows_kernel, (triton.cdiv(N, group_tile.BLOCK_N),), arguments, group_tile.num_warps)
    if basis is None:
        return
    K = basis.shape[0]
    device = device or describe_device(scales)
    tile = tile or tile_of("packed_product", device, scales.dtype, N, K, H)
    row_blocks, h_tiles = triton.cdiv(N, tile.BLOCK_N), triton.cdiv(H, tile.BLOCK_H)
    # The longest run of tiles per program that leaves two programs for every multiprocessor.
    tiles_per_program = max(1, min(h_tiles, row_blocks * h_tiles // (2 * device.processors)))
    arguments = dict(shared, basis_ptr=basis, tiles_per_program=tiles_per_program, K=K, **tile.blocks())
    grid = (row_blocks * triton.cdiv(h_tiles, tiles_per_program),)
    yield Launch(_products_kernel, grid, arguments, tile.num_warps, tile.num_stages)
