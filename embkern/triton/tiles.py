"""Tile sizes of the Triton kernels: a table, and the rules that fit its entries to shapes and devices.

**No entry has been measured yet.** Until one is, a kernel has two tiles per size of elements, a small one for
few positions or rows and a large one. They are chosen by arithmetic (programs per multiprocessor, shared
memory, bytes read again from L2) and by the compiler's report (`python -m embkern.triton.aot`: no spills,
tensor cores in use). On a device, `python -m benchmarks tune_gather_project` measures candidates and prints
the entries. There is no `@triton.autotune`: it would time kernels inside the first call and break the capture
of CUDA graphs.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from .sizes import cdiv, next_power_of_2


@dataclass(frozen=True)
class Device:
    """What a launch depends on: compute capability (90 for 9.0), multiprocessors, shared memory."""

    capability: int
    processors: int
    shared_bytes: int


@dataclass(frozen=True)
class Tile:
    """Positions, columns and ranks per program or step, and the compiler's warps and pipeline stages.

    The forward keeps codes of up to ``on_chip`` ranks on chip, in blocks of BLOCK_R and BLOCK_TAIL that
    ``fit_rank`` chooses; it takes more, and the other kernels all, in steps of BLOCK_R. ``measured_on`` names
    the device whose timings chose the entry; None if arithmetic did.
    """

    BLOCK_N: int
    BLOCK_H: int
    BLOCK_R: int
    num_warps: int
    num_stages: int
    BLOCK_TAIL: int = 0
    on_chip: int = 0
    measured_on: str | None = None

    def blocks(self) -> dict[str, int]:
        """Return the block sizes that every kernel takes."""
        return dict(BLOCK_N=self.BLOCK_N, BLOCK_H=self.BLOCK_H, BLOCK_R=self.BLOCK_R)


# Most positions that take the small tile of a product. At 2048 columns the large tile of the forward makes 64
# programs of 256 positions, and 128 of 512, for the 132 multiprocessors of an H100.
FEW_POSITIONS = 256

# (kernel, bytes per element) -> a tile for few positions and one for more, on every device: `shrink` makes
# them fit its shared memory.
TILES: dict[tuple[str, int], tuple[Tile, Tile]] = {
    # 128 rows halve the reads of the basis from L2; from about r = 257 on, the codes leave room for 64.
    ("forward", 2): (Tile(16, 32, 64, 4, 2, on_chip=512), Tile(128, 64, 64, 8, 3, on_chip=512)),
    # fp32 products run outside the tensor cores, fp64 ones in small tiles: registers are the bound, and r is
    # taken in steps. With 4 warps, a batch of fp32 spilled registers in the product of packed coefficients.
    ("forward", 4): (Tile(16, 32, 64, 4, 3), Tile(64, 64, 16, 8, 3)),
    ("forward", 8): (Tile(16, 32, 16, 4, 2), Tile(32, 32, 16, 4, 2)),
    # One program reads a row of grad once for up to BLOCK_R ranks.
    ("project_grad", 2): (Tile(16, 64, 32, 4, 3), Tile(128, 64, 128, 8, 3)),
    ("project_grad", 4): (Tile(16, 32, 32, 4, 3), Tile(64, 32, 64, 4, 3)),
    ("project_grad", 8): (Tile(16, 16, 32, 4, 2), Tile(32, 16, 32, 4, 2)),
    # Positions are the inner dimension of this product: BLOCK_N is the length of a step.
    ("grad_basis", 2): (Tile(16, 64, 64, 4, 3), Tile(64, 128, 128, 8, 3)),
    ("grad_basis", 4): (Tile(16, 64, 64, 4, 3), Tile(16, 64, 64, 4, 3)),
    ("grad_basis", 8): (Tile(16, 32, 32, 4, 2), Tile(16, 32, 32, 4, 2)),
}


def tile_of(
    kernel: str, device: Device, dtype: torch.dtype, N: int, r: int, H: int, aligned_codes: bool | None = None
) -> Tile:
    """Return the tile of a kernel for N positions, rank r (or K coefficients) and H columns.

    ``aligned_codes`` says whether rows of codes are read in vectors; the default is that of adjacent rows.
    """
    aligned = (r * dtype.itemsize) % 16 == 0 if aligned_codes is None else aligned_codes
    aligned &= (H * dtype.itemsize) % 16 == 0
    return _tile_of(kernel, device.shared_bytes, dtype.itemsize, N > FEW_POSITIONS, r, aligned)


@functools.cache
def _tile_of(kernel: str, shared_bytes: int, itemsize: int, many: bool, r: int, aligned: bool) -> Tile:
    tile = TILES[kernel, itemsize][many]
    if not aligned:
        # Rows that do not start on 16 bytes are loaded element by element; greater blocks spilled registers.
        bound = 64 if itemsize == 2 and kernel != "grad_basis" else 32
        tile = replace(tile, BLOCK_N=min(tile.BLOCK_N, bound))
        if kernel == "grad_basis" and itemsize == 4:
            # Its BLOCK_N is minimal already; with 4 warps, Triton 3.6 took 255 registers and spilled.
            tile = replace(tile, num_warps=8)
    return shrink(kernel, fit_rank(tile, r), r, itemsize, shared_bytes)


def fit_rank(tile: Tile, r: int) -> Tile:
    """Reduce BLOCK_R to what r needs; on chip to two powers of two, which pad r less than one does."""
    whole = max(16, next_power_of_2(r))
    if r > tile.on_chip:
        return replace(tile, BLOCK_R=min(tile.BLOCK_R, whole), BLOCK_TAIL=0)
    half = whole // 2
    tail = max(16, next_power_of_2(r - half))
    two = 16 <= half > tail
    return replace(tile, BLOCK_R=half if two else whole, BLOCK_TAIL=tail if two else 0)


def shrink(kernel: str, tile: Tile, r: int, itemsize: int, shared_bytes: int) -> Tile:
    """Take stages off a tile until it fits ``shared_bytes``, then positions and columns.

    Positions beyond 64 go first, then columns beyond 32, and then the rest in the same order.
    """
    while shared_estimate(kernel, tile, r, itemsize) > shared_bytes:
        if tile.num_stages > 2:
            tile = replace(tile, num_stages=tile.num_stages - 1)
        elif tile.BLOCK_N > 64 or (tile.BLOCK_H <= 32 and tile.BLOCK_N > 16):
            tile = replace(tile, BLOCK_N=tile.BLOCK_N // 2)
        else:
            tile = replace(tile, BLOCK_H=tile.BLOCK_H // 2)
    return tile


def shared_estimate(kernel: str, tile: Tile, r: int, itemsize: int) -> int:
    """Return the bytes of shared memory of operands and staged output; the compiler's report is exact."""
    N, H, R = tile.BLOCK_N, tile.BLOCK_H, tile.BLOCK_R + tile.BLOCK_TAIL
    if kernel == "forward":
        codes_copies = 1 if r <= R else tile.num_stages
        elements = codes_copies * N * R + tile.num_stages * R * H + N * H
    elif kernel == "project_grad":
        elements = tile.num_stages * (N * H + H * R) + N * R
    else:
        elements = tile.num_stages * (N * R + N * H) + R * H
    return elements * itemsize


@dataclass(frozen=True)
class RowTile:
    """Tile of a kernel that reduces over whole rows: BLOCK_N rows, PARTS times BLOCK_H columns, num_warps."""

    BLOCK_N: int
    BLOCK_H: int
    PARTS: int
    num_warps: int


@dataclass(frozen=True)
class RowRule:
    """Elements of a tensor per thread, and the widest row that a program holds; measured_on as in Tile."""

    elements: int
    widest: int
    measured_on: str | None = None


# Up to this many rows are each spread over warps. With more, one warp per row makes more than seven for every
# multiprocessor of an H100.
FEW_ROWS = 1024

# Bytes per element -> rules for few rows and for more, on every device. Of many rows, a single warp holds one
# of up to 1024 columns: its sums need no barrier, and the registers of a multiprocessor hold 17 such rows,
# 100 KB of fp32 or 50 KB of bf16 in flight. Fewer rows are spread over more warps, for latency.
ROW_RULES: dict[int, tuple[RowRule, RowRule]] = {
    2: (RowRule(8, 8192), RowRule(32, 8192)),
    4: (RowRule(8, 8192), RowRule(32, 8192)),
    8: (RowRule(4, 4096), RowRule(16, 4096)),
}


def row_tile_of(dtype: torch.dtype, N: int, H: int) -> RowTile:
    """Return the tile of a kernel that reduces over the rows of (N, H)."""
    return _row_tile_of(ROW_RULES[dtype.itemsize][N > FEW_ROWS], dtype.itemsize, H)


@functools.cache
def _row_tile_of(rule: RowRule, itemsize: int, H: int) -> RowTile:
    vector = math.gcd(16, H * itemsize) // itemsize  # elements that a thread loads at once
    width = min(H, rule.widest)
    warps = min(16, next_power_of_2(cdiv(width, 32 * rule.elements)))
    columns = min(32 * warps * vector, next_power_of_2(width))
    if warps > 1 or columns == 32 * vector:
        return RowTile(1, columns, cdiv(width, columns), warps)
    # Rows too short for a warp share one, with two such loads in flight and four warps per program.
    return RowTile(4 * 2 * (32 * vector // columns), columns, 1, 4)


class GroupTile(NamedTuple):
    """Tile of a kernel that unpacks a row: BLOCK_G groups of 32 values at a time."""

    BLOCK_G: int
    num_warps: int


def group_tile_of(N: int, groups: int) -> GroupTile:
    """Return the tile of a kernel that unpacks N rows of some groups; chosen by arithmetic.

    A program has one row, so that no thread waits for another one that locates the record, and a thread 8
    values or 4. Of many rows, a warp takes one in steps of 8 or 4 groups, whichever leaves fewer groups of
    the last step empty. Fewer rows have up to 1024 columns at once, for latency.
    """
    if N > FEW_ROWS:
        block = min((8, 4), key=lambda size: -(-groups // size) * size)
    else:
        block = min(32, next_power_of_2(groups))
    return GroupTile(block, max(1, block // 8))


class LossTile(NamedTuple):
    """Tile of a kernel of the cross-entropy: BLOCK_N states by BLOCK_V rows, BLOCK_K columns at a time."""

    BLOCK_N: int
    BLOCK_V: int
    BLOCK_K: int
    num_warps: int
    num_stages: int

    def blocks(self) -> dict[str, int]:
        """Return the block sizes that every kernel takes."""
        return dict(BLOCK_N=self.BLOCK_N, BLOCK_V=self.BLOCK_V, BLOCK_K=self.BLOCK_K)


# Up to this many states of the cross-entropy are taken in small blocks; greater ones read the table less.
FEW_STATES = 64

# (kernel, bytes per element) -> a tile for more states; chosen by the compiler's report. States of up to
# BLOCK_K columns are loaded once; the gradients of states and rows take no wider ones.
LOSS_TILES: dict[tuple[str, int], LossTile] = {
    ("fold", 2): LossTile(128, 64, 128, 8, 2),
    ("fold", 4): LossTile(64, 64, 16, 8, 3),
    ("fold", 8): LossTile(16, 32, 16, 4, 2),
    ("logit_gradients", 2): LossTile(128, 64, 64, 8, 3),
    ("logit_gradients", 4): LossTile(64, 64, 16, 8, 3),
    ("logit_gradients", 8): LossTile(32, 32, 16, 4, 2),
    ("state_gradient", 2): LossTile(64, 64, 256, 8, 2),
    ("row_gradient", 2): LossTile(32, 64, 256, 8, 2),
}


def loss_tile_of(kernel: str, device: Device, dtype: torch.dtype, N: int, K: int) -> LossTile:
    """Return the tile of a kernel of the cross-entropy for N states of K columns."""
    tile = LOSS_TILES[kernel, dtype.itemsize]
    # Rows that do not start on 16 bytes are loaded element by element; greater blocks spilled registers.
    bound = tile.BLOCK_N if K * dtype.itemsize % 16 == 0 else 32
    states = min(tile.BLOCK_N, 16 if N <= FEW_STATES else bound)
    columns = max(16, next_power_of_2(K))
    if columns > tile.BLOCK_K:  # in steps, for which mma.sync needs more registers than wgmma
        columns = min(tile.BLOCK_K, 64)
        states = min(states, 128 if device.capability >= 90 else 64)
    return tile._replace(BLOCK_N=states, BLOCK_K=columns)


@functools.cache
def _device(index: int) -> Device:
    properties = torch.cuda.get_device_properties(index)
    return Device(
        10 * properties.major + properties.minor,
        properties.multi_processor_count,
        getattr(properties, "shared_memory_per_block_optin", 48 << 10),
    )


# A100, H100 and B200, as the report of compilation without a device assumes them.
REPRESENTATIVE = {
    80: Device(80, 108, 163 << 10),
    90: Device(90, 132, 227 << 10),
    100: Device(100, 148, 227 << 10),
}


def describe_device(tensor: Tensor) -> Device:
    """Return the device of a tensor; for the interpreter, on CPU, that of an H100."""
    return _device(tensor.get_device()) if tensor.is_cuda else REPRESENTATIVE[90]
