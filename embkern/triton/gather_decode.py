"""gather_decode in Triton: rows of a packed table, ``scale * (scales[ids] * row(records[ids]) + offset)``.

    row of values          row = values of its codes
    row of coefficients    row = values of its codes @ basis

ids (*), records (W,), directory (ceil(V / 32), 5), tiers (T, 1 + G), levels (17, 16), scales (V,), basis
(K, H), offset (H,) -> (*, H) in the dtype of scales. docs/packed-format.md specifies the format;
reference.gather_decode_forward is the definition.

    _rows_kernel              one position per program, in steps of BLOCK_G groups of 32 values. It writes
                              rows of values, and coefficients of the other rows to memory.
    _gather_project_kernel    if there is a basis: products of the coefficients, as in gather_project. Rows
                              of values are left as they are, so that an infinite entry of the basis does
                              not reach them.

No launch depends on the ids, so that the host does not wait for the device.

The record of a row is located by counting: its entry of the directory says where the records of 32 rows
begin, and the size of each tier is added as often as its nibble occurs before that of the row, 8 nibbles at a
time. A thread has 8 values of one half of a group. Their windows are cut out of the same two words, and the
exclusive or that two of the three indices need is that of whole words. For sm_90 in bf16, ptxas makes 37
instructions of a value of 1 or 2 bits and 52 of one of 3 or 4, with no shared memory and no barrier.

Levels are read where they lie, three or four bytes a value. `levels` takes three lines of L1, and what a warp
reads at once is within 16 bytes if its groups have one rate. A table of the levels of all windows would take
one read, but from 36 KB: the lanes of a warp would read up to 32 lines, one after the other.

Values have up to 8 significant bits and are exact in bf16 and fp16: only the sums of a product are rounded.

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

from ..ops.packed_codes import GROUP, LEVEL_BITS, LEVELS_PER_UNIT, LEVELS_SHAPE, MAX_BITS
from ..ops.packed_format import PackedTensors
from ..ops.reference import accumulation_dtype
from .gather_project.forward import forward_launch
from .launch import Launch
from .sizes import cdiv, next_power_of_2
from .tiles import Device, GroupTile, Tile, group_tile_of

_GROUP = tl.constexpr(GROUP)
_LEVEL_BITS = tl.constexpr(LEVEL_BITS)
_LEVEL_STEP = tl.constexpr(1 / LEVELS_PER_UNIT)
_ENTRIES = tl.constexpr(LEVELS_SHAPE[1])
_PLANES = tl.constexpr(MAX_BITS)
# Words of the groups of a step, up to 32, in the three sections of a record, as fields of one number.
_STREAM_FIELD = tl.constexpr(2**10 - 1)
_FURTHER_SHIFT = tl.constexpr(10)
_FURTHER_FIELD = tl.constexpr((2**10 - 1) << 10)
_PLANES_SHIFT = tl.constexpr(20)
_OUT_OF_RANGE = tl.constexpr("gather_decode: an id is out of range")
_CORRUPT = tl.constexpr("gather_decode: the directory does not fit tiers and records")


@triton.jit
def _stream_words(bits):
    """Words that groups have in the stream."""
    return tl.where(bits > _LEVEL_BITS, 0, tl.minimum(bits, 2))


@triton.jit
def _further_words(bits):
    """Words of the further bits of groups."""
    return tl.where(bits > _LEVEL_BITS, 0, tl.maximum(bits, 2) - 2)


@triton.jit
def _words_before(
    entry,
    lane,
    known,
    tiers_ptr,
    T: tl.constexpr,
    G: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_BITS: tl.constexpr,
):
    """Words of the records before that of row ``lane`` of the 32 that an entry of the directory describes."""
    word = tl.arange(0, 4)
    t = tl.arange(0, BLOCK_T)
    g = tl.arange(0, BLOCK_BITS)
    nibbles = tl.load(entry + 1 + word, mask=known, other=0)
    before = tl.minimum(tl.maximum(lane - 8 * word, 0), 8)
    counted = ((tl.full((4,), 1, tl.int64) << (4 * before)) - 1).to(tl.int32)
    differ = nibbles[None, :] ^ (t * 0x11111111)[:, None]
    differ |= differ >> 2
    differ |= differ >> 1  # The lowest bit of a nibble says whether it is another tier.
    equal = ~differ & 0x11111111 & counted[None, :]
    counts = tl.sum(((equal * 0x11111111).to(tl.uint32, bitcast=True) >> 28).to(tl.int32), 1)
    mask = (t < T)[:, None] & (g < G)[None, :]
    bits = tl.load(tiers_ptr + t[:, None] * (1 + G) + 1 + g[None, :], mask=mask, other=0).to(tl.int32)
    return tl.sum(tl.sum(counts[:, None] * bits, 1), 0)


@triton.jit
def _values(record_ptr, levels_ptr, ring, stream, further, planes, bits, total, PARTS: tl.constexpr):
    """Values (32 groups,) in fp32 of groups of ``bits`` bits (groups, PARTS).

    The record begins with a ring of ``ring`` words. ``stream``, ``further`` and ``planes`` (groups, PARTS)
    say where in it the words of a group begin, ``total`` has the words of all groups in three fields.
    """
    each = tl.arange(0, _GROUP // PARTS)[:, None, None]
    part = tl.arange(0, PARTS)[None, :] * (_GROUP // PARTS)  # the first of the values of a thread in a group
    half = part // (_GROUP // 2)
    begin = 8 * (part % 4) + 2 * (part // 4 % 4)
    place = 8 * (each % 4) + 2 * (each // 4)
    coded = (bits > 0) & (bits <= _LEVEL_BITS)

    # Value 16 q + 4 j + m has its window at bit 8 m + 2 j of word q.
    word = stream + tl.where(bits == 1, 0, half)
    after = tl.where(word + 1 == ring, 0, word + 1)
    low = tl.load(record_ptr + word, mask=coded, other=0).to(tl.uint32, bitcast=True)
    high = tl.load(record_ptr + after, mask=coded, other=0).to(tl.uint32, bitcast=True)
    window = ((high.to(tl.uint64) << 32) | low) >> begin.to(tl.uint64)
    later = window >> 8
    first = _indices(window >> 4, place)
    second = _indices(window ^ later, place)
    third = _indices((window >> 3) ^ later, place)

    row = tl.where(bits == 1, 3 * half, tl.where(bits == 2, 6, tl.where(bits == 3, 9, 13)))
    table = (levels_ptr + row * _ENTRIES)[None, :, :]
    level = _levels(table + first, None) + _levels(table + _ENTRIES + second, None)
    if (total & _FURTHER_FIELD) != 0:
        more = _further_bits(record_ptr, further, bits, part, each)
        level += _levels(table + 3 * _ENTRIES + ((second & 12) + more), (bits == 4)[None, :, :])
        third += more * tl.where(bits == 3, _ENTRIES, 0)[None, :, :]
    level += _levels(table + 2 * _ENTRIES + third, None)
    # Bytes are added modulo 256: as the highest bits of a word they have their sign.
    values = (level << 24).to(tl.float32) * tl.where(coded, _LEVEL_STEP / 2**24, 0.0)[None, :, :]
    if (total >> _PLANES_SHIFT) != 0:
        uniform = _uniform(record_ptr, planes, bits, part, each)
        values = tl.where((bits > _LEVEL_BITS)[None, :, :], uniform, values)
    return tl.reshape(tl.permute(values, (1, 2, 0)), (bits.shape[0] * _GROUP,))


@triton.jit
def _indices(words, place):
    """Four bits at ``place``, up to 26, of words (groups, PARTS)."""
    return ((words.to(tl.uint32)[None, :, :] >> place) & 15).to(tl.int32)


@triton.jit
def _levels(at, mask):
    """Levels as whole numbers from 0 to 255."""
    return tl.load(at, mask=mask, other=None if mask is None else 0).to(tl.uint8, bitcast=True).to(tl.int32)


@triton.jit
def _further_bits(record_ptr, further, bits, part, each):
    """The further bits of values of 3 and 4 bits, 0 for others.

    Value 16 q + 4 j + m has bit 8 j + 4 q + m of the word for 3 bits, two bits from 8 m + 2 j on of word q
    for 4 bits.
    """
    half = part // (_GROUP // 2)
    four = bits == 4
    word = tl.load(record_ptr + further + tl.where(four, half, 0), mask=four | (bits == 3), other=0)
    of_three = 8 * (part // 4 % 4) + 4 * half + part % 4
    begin = tl.where(four, 8 * (part % 4) + 2 * (part // 4 % 4), of_three)
    place = tl.where(four[None, :, :], 8 * (each % 4) + 2 * (each // 4), 8 * (each // 4) + each % 4)
    return ((word >> begin)[None, :, :] >> place) & tl.where(four, 3, 1)[None, :, :]


@triton.jit
def _uniform(record_ptr, planes, bits, part, each):
    """Values of 5 to 8 bits in fp32, ``code - (2**bits - 1) / 2``."""
    code = tl.zeros((each.shape[0], bits.shape[0], part.shape[1]), tl.int32)
    for plane in tl.static_range(_PLANES):
        used = (bits > _LEVEL_BITS) & (bits > plane)
        word = tl.load(record_ptr + planes + plane, mask=used, other=0) >> part
        code |= ((word[None, :, :] >> each) & 1) << plane
    return (2 * code + 1 - (1 << bits)[None, :, :]).to(tl.float32) * 0.5


@triton.jit(do_not_specialize=["V", "W"], debug=True)
def _rows_kernel(
    ids_ptr,
    records_ptr,
    directory_ptr,
    tiers_ptr,
    levels_ptr,
    scales_ptr,
    offset_ptr,
    out_ptr,
    coefficients_ptr,
    factors_ptr,
    places_ptr,
    scale: tl.float64,
    V,
    W,
    T: tl.constexpr,
    G: tl.constexpr,
    K: tl.constexpr,
    H: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_BITS: tl.constexpr,
    BLOCK_G: tl.constexpr,
):
    """A row of values, or the coefficients of another row; its factor and place (-1 for a row of values)."""
    accumulator: tl.constexpr = tl.float64 if scales_ptr.dtype.element_ty == tl.float64 else tl.float32
    PARTS: tl.constexpr = _GROUP // BLOCK_G if BLOCK_G < 8 else 4
    n = tl.program_id(0).to(tl.int64)
    row_id = tl.load(ids_ptr + n).to(tl.int64)
    known = (row_id >= 0) & (row_id < V)  # An id out of range reads nothing.
    tl.device_assert(known, _OUT_OF_RANGE)
    factor = tl.load(scales_ptr + row_id, mask=known, other=0.0).to(accumulator)
    entry = directory_ptr + (row_id // _GROUP) * 5
    lane = (row_id % _GROUP).to(tl.int32)
    tier = (tl.load(entry + 1 + lane // 8, mask=known, other=0) >> (lane % 8 * 4)) & 15
    start = tl.load(entry, mask=known, other=0).to(tl.uint32, bitcast=True).to(tl.int64)
    start += _words_before(entry, lane, known, tiers_ptr, T, G, BLOCK_T, BLOCK_BITS)

    described = tiers_ptr + tier * (1 + G)
    g = tl.arange(0, BLOCK_BITS)
    all_bits = tl.load(described + 1 + g, mask=known & (tier < T) & (g < G), other=0).to(tl.int32)
    ring = tl.sum(_stream_words(all_bits), 0)
    present = known & (tier < T) & (tl.max(all_bits, 0) <= _PLANES)
    present &= (start >= 0) & (start + tl.sum(all_bits, 0) <= W)
    tl.device_assert(present | ~known, _CORRUPT)
    stream = 0
    further = ring
    planes = ring + tl.sum(_further_words(all_bits), 0)

    width = H
    if K == 0:
        indirect: tl.constexpr = False
    else:
        indirect = tl.load(described, mask=present, other=0) != 0
        width = tl.where(indirect, K, H)
        tl.store(factors_ptr + n, factor)
        tl.store(places_ptr + n, tl.where(indirect, n, -1).to(tl.int32))
    scale = tl.full((), scale, accumulator)
    groups = tl.cdiv(width, _GROUP)
    for step in range(0, groups, BLOCK_G):
        group = step + tl.arange(0, BLOCK_G)
        mask = present & (group < G) & (group < groups)
        bits = tl.load(described + 1 + group, mask=mask, other=0).to(tl.int32)
        words = _stream_words(bits) | (_further_words(bits) << _FURTHER_SHIFT)
        words |= tl.where(bits > _LEVEL_BITS, bits, 0) << _PLANES_SHIFT
        total = tl.sum(words, 0)
        # A thread has one group: from here on in the layout of its values.
        bits = bits[:, None] + tl.zeros((1, PARTS), tl.int32)
        words = words[:, None] + tl.zeros((1, PARTS), tl.int32)
        before = tl.cumsum(words, 0) - words
        values = _values(
            records_ptr + start,
            levels_ptr,
            ring,
            stream + (before & _STREAM_FIELD),
            further + ((before & _FURTHER_FIELD) >> _FURTHER_SHIFT),
            planes + (before >> _PLANES_SHIFT),
            bits,
            total,
            PARTS,
        )
        stream += total & _STREAM_FIELD
        further += (total & _FURTHER_FIELD) >> _FURTHER_SHIFT
        planes += total >> _PLANES_SHIFT
        column = step * _GROUP + tl.arange(0, BLOCK_G * _GROUP)
        if indirect:
            coefficients = values.to(coefficients_ptr.dtype.element_ty)
            tl.store(coefficients_ptr + n * K + column, coefficients, mask=column < K)
        else:
            row = values.to(accumulator) * factor
            if offset_ptr is not None:
                row += tl.load(offset_ptr + column, mask=column < H, other=0.0).to(accumulator)
            tl.store(out_ptr + n * H + column, (row * scale).to(out_ptr.dtype.element_ty), mask=column < H)


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
    K = 0 if basis is None else basis.shape[0]
    coefficients = factors = places = None
    if K:
        coefficients = scales.new_empty(N, K)
        factors = scales.new_empty(N, dtype=accumulation_dtype(scales.dtype))
        places = torch.empty(N, dtype=torch.int32, device=scales.device)
    group_tile = group_tile or group_tile_of(N, cdiv(H, GROUP))
    arguments = dict(
        ids_ptr=ids,
        records_ptr=records,
        directory_ptr=directory,
        tiers_ptr=tiers,
        levels_ptr=levels,
        scales_ptr=scales,
        offset_ptr=offset,
        out_ptr=out,
        coefficients_ptr=coefficients,
        factors_ptr=factors,
        places_ptr=places,
        scale=float(scale),
        V=scales.shape[0],
        W=records.shape[0],
        T=tiers.shape[0],
        G=tiers.shape[1] - 1,
        K=K,
        H=H,
        BLOCK_T=next_power_of_2(tiers.shape[0]),
        BLOCK_BITS=next_power_of_2(tiers.shape[1] - 1),
        BLOCK_G=group_tile.BLOCK_G,
    )
    yield Launch(_rows_kernel, (N,), arguments, group_tile.num_warps)
    if basis is not None and coefficients is not None and places is not None:
        yield forward_launch(places, coefficients, basis, offset, scale, out, device, tile, factors)
