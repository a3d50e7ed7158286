"""Tile sizes of the Triton kernels: a table, and the rules for devices and shapes that are not in it.

**No entry has been measured yet.** They are chosen by arithmetic (programs per multiprocessor, shared memory,
bytes read again from L2) and by the compiler's report (`python -m embkern.triton.aot`: no spills, tensor
cores in use). On a device, `python -m benchmarks tune_gather_project` measures candidates and prints the
entries. There is no `@triton.autotune`: it would time kernels inside the first call and break the capture of
CUDA graphs.
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

    The forward keeps BLOCK_R + BLOCK_TAIL ranks on chip if that covers r; otherwise it takes r in steps of
    BLOCK_R. ``measured_on`` names the device whose timings chose the entry; None if arithmetic did.
    """

    BLOCK_N: int
    BLOCK_H: int
    BLOCK_R: int
    num_warps: int
    num_stages: int
    BLOCK_TAIL: int = 0
    measured_on: str | None = None

    def blocks(self) -> dict[str, int]:
        """Return the block sizes that every kernel takes."""
        return dict(BLOCK_N=self.BLOCK_N, BLOCK_H=self.BLOCK_H, BLOCK_R=self.BLOCK_R)


# Upper bounds of the classes of positions: decoding, a prompt, and "batch" beyond.
LENGTHS = {"decode": 64, "prompt": 1024}
# Upper bounds of the classes of ranks that the forward keeps on chip. Greater ones, which it takes in steps,
# are a fourth class.
RANKS = (128, 256, 512)

# (kernel, capability, bytes per element) -> {length: a tile per class of ranks, the last one for the rest}.
# A capability without a row or without that length takes those of the newest older capability.
TILES: dict[tuple[str, int, int], dict[str, tuple[Tile, ...]]] = {
    # Batches: 128 rows halve the reads of the basis from L2; from r = 257 on, the codes need the space.
    ("forward", 80, 2): {
        "decode": (
            Tile(16, 32, 128, 4, 2),
            Tile(16, 32, 256, 4, 2),
            Tile(16, 32, 512, 4, 2),
            Tile(16, 32, 128, 4, 3),
        ),
        "prompt": (
            Tile(64, 32, 128, 4, 3),
            Tile(64, 32, 256, 4, 2),
            Tile(64, 32, 512, 8, 2),
            Tile(64, 64, 64, 8, 3),
        ),
        "batch": (
            Tile(128, 64, 128, 8, 3),
            Tile(128, 64, 256, 8, 2),
            Tile(64, 32, 512, 8, 2),
            Tile(64, 64, 64, 8, 3),
        ),
    },
    # 227 KiB of shared memory hold a third stage of the basis beside 128 rows of 256 codes.
    ("forward", 90, 2): {
        "batch": (
            Tile(128, 64, 128, 8, 3),
            Tile(128, 64, 256, 8, 3),
            Tile(64, 64, 512, 8, 2),
            Tile(128, 128, 64, 8, 3),
        ),
    },
    # fp32 products run outside the tensor cores, fp64 ones in small tiles: registers are the bound, and r is
    # taken in steps. With 4 warps, a batch of fp32 spilled registers in the product of packed coefficients.
    ("forward", 80, 4): {
        "decode": (Tile(16, 32, 64, 4, 3),),
        "prompt": (Tile(32, 32, 32, 4, 3),),
        "batch": (Tile(64, 64, 16, 8, 3),),
    },
    ("forward", 80, 8): {
        "decode": (Tile(16, 32, 16, 4, 2),),
        "prompt": (Tile(32, 32, 16, 4, 2),),
        "batch": (Tile(32, 32, 16, 4, 2),),
    },
    # One program reads a row of grad once for up to BLOCK_R ranks.
    ("project_grad", 80, 2): {
        "decode": (Tile(16, 64, 32, 4, 3),),
        "prompt": (Tile(64, 64, 64, 4, 3),),
        "batch": (Tile(128, 64, 128, 8, 3),),
    },
    ("project_grad", 90, 2): {
        "batch": (Tile(128, 64, 128, 8, 3), Tile(128, 64, 256, 8, 3), Tile(128, 64, 128, 8, 3)),
    },
    # For Blackwell, Triton 3.7 and 3.8 spill registers with 256 ranks at a time.
    ("project_grad", 100, 2): {"batch": (Tile(128, 64, 128, 8, 3),)},
    ("project_grad", 80, 4): {
        "decode": (Tile(16, 32, 32, 4, 3),),
        "prompt": (Tile(32, 32, 32, 4, 3),),
        "batch": (Tile(64, 32, 64, 4, 3),),
    },
    ("project_grad", 80, 8): {
        "decode": (Tile(16, 16, 32, 4, 2),),
        "prompt": (Tile(32, 16, 32, 4, 2),),
        "batch": (Tile(32, 16, 32, 4, 2),),
    },
    # Positions are the inner dimension of this product: BLOCK_N is the length of a step.
    ("grad_basis", 80, 2): {
        "decode": (Tile(16, 64, 64, 4, 3),),
        "prompt": (Tile(64, 64, 64, 4, 3),),
        "batch": (Tile(64, 128, 128, 8, 3),),
    },
    ("grad_basis", 80, 4): {
        "decode": (Tile(16, 64, 64, 4, 3),),
        "prompt": (Tile(16, 64, 64, 4, 3),),
        "batch": (Tile(16, 64, 64, 4, 3),),
    },
    ("grad_basis", 80, 8): {
        "decode": (Tile(16, 32, 32, 4, 2),),
        "prompt": (Tile(16, 32, 32, 4, 2),),
        "batch": (Tile(16, 32, 32, 4, 2),),
    },
}


def tile_of(
    kernel: str, device: Device, dtype: torch.dtype, N: int, r: int, H: int, aligned_codes: bool | None = None
) -> Tile:
    """Return the tile of a kernel for N positions, rank r (or K coefficients) and H columns.

    ``aligned_codes`` says whether rows of codes are read in vectors; the default is that of adjacent rows.
    """
    aligned = (r * dtype.itemsize) % 16 == 0 if aligned_codes is None else aligned_codes
    aligned &= (H * dtype.itemsize) % 16 == 0
    return _tile_of(kernel, device, dtype.itemsize, _length(N), r, aligned)


@functools.cache
def _tile_of(kernel: str, device: Device, itemsize: int, length: str, r: int, aligned: bool) -> Tile:
    capabilities = [
        capability
        for (name, capability, size), row in TILES.items()
        if name == kernel and size == itemsize and length in row
    ]
    # A device older than every row takes the oldest row.
    capability = max((each for each in capabilities if each <= device.capability), default=min(capabilities))
    ranks = TILES[kernel, capability, itemsize][length]
    tile = ranks[min(sum(r > bound for bound in RANKS), len(ranks) - 1)]
    if not aligned:
        # Rows that do not start on 16 bytes are loaded element by element; greater blocks spilled registers.
        bound = 64 if itemsize == 2 and kernel != "grad_basis" else 32
        tile = replace(tile, BLOCK_N=min(tile.BLOCK_N, bound))
        if kernel == "grad_basis" and itemsize == 4:
            # Its BLOCK_N is minimal already; with 4 warps, Triton 3.6 took 255 registers and spilled.
            tile = replace(tile, num_warps=8)
    return shrink(kernel, fit_rank(kernel, tile, r), r, itemsize, device.shared_bytes)


def _length(N: int) -> str:
    return next((name for name, bound in LENGTHS.items() if bound >= N), "batch")


def fit_rank(kernel: str, tile: Tile, r: int) -> Tile:
    """Reduce BLOCK_R to what r needs; in the forward to two powers of two, which pad r less than one does."""
    whole = max(16, next_power_of_2(r))
    if kernel != "forward":
        return replace(tile, BLOCK_R=min(tile.BLOCK_R, whole))
    if r > tile.BLOCK_R:
        return tile
    half = whole // 2
    tail = max(16, next_power_of_2(r - half))
    return replace(tile, BLOCK_R=half, BLOCK_TAIL=tail) if 16 <= half > tail else replace(tile, BLOCK_R=whole)


def shrink(kernel: str, tile: Tile, r: int, itemsize: int, shared_bytes: int) -> Tile:
    """Take stages, then positions, then columns off a tile until it fits ``shared_bytes``."""
    while shared_estimate(kernel, tile, r, itemsize) > shared_bytes:
        if tile.num_stages > 2:
            tile = replace(tile, num_stages=tile.num_stages - 1)
        elif tile.BLOCK_N > 16:
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


# Bytes per element -> {length: rule}, for every capability. In a batch, a single warp holds a row of up to
# 1024 columns: its sums need no barrier, and the registers of a multiprocessor hold 17 such rows, 100 KB of
# fp32 or 50 KB of bf16 in flight. Fewer rows are spread over more warps, for latency.
ROW_RULES: dict[int, dict[str, RowRule]] = {
    2: {"decode": RowRule(8, 8192), "prompt": RowRule(8, 8192), "batch": RowRule(32, 8192)},
    4: {"decode": RowRule(8, 8192), "prompt": RowRule(8, 8192), "batch": RowRule(32, 8192)},
    8: {"decode": RowRule(4, 4096), "prompt": RowRule(4, 4096), "batch": RowRule(16, 4096)},
}


def row_tile_of(dtype: torch.dtype, N: int, H: int) -> RowTile:
    """Return the tile of a kernel that reduces over the rows of (N, H)."""
    return _row_tile_of(ROW_RULES[dtype.itemsize][_length(N)], dtype.itemsize, H)


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
    values or 4. In a batch, a warp takes the row in steps of 8 or 4 groups, whichever leaves fewer groups of
    the last step empty. Fewer rows have up to 1024 columns at once, for latency.
    """
    if _length(N) == "batch":
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


# (kernel, bytes per element) -> a tile, for every capability; chosen by the compiler's report. States of up
# to BLOCK_K columns are loaded once; the gradients of states and rows take no wider ones.
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
    states = min(tile.BLOCK_N, bound, max(16, next_power_of_2(N)))
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
