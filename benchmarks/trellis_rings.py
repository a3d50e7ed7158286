"""The format in which ExLlamaV3 keeps token embeddings, for `python -m benchmarks language_models`.

Rows are padded with zeros to groups of 256 values. Each group is multiplied by random signs, rotated by a
Hadamard matrix, and coded as one ring of a trellis at 1 to 4 bits a value, with an fp16 scale. The level of a
value is computed from a window of 16 bits of the ring. All rows have one rate.

The encoder of ExLlamaV3 needs CUDA. This one finds the best paths with the search of `benchmarks.codes`; the
codebook, the rotation, the scales and the bytes are ExLlamaV3's, so that its decoder reads the codes.
"""

from __future__ import annotations

import functools
from concurrent.futures import ThreadPoolExecutor

import torch
import torch.nn.functional as F
from torch import Tensor

from .codes.trellis import Trellis, sums_of_bytes
from .reconstruction import Reconstruction

RING, WINDOW = 256, 16
MULTIPLIER = 0x83DCD12D
# A level is (1024 + sum of bytes) * STEP + OFFSET; both are numbers in fp16.
STEP, OFFSET = 1774 / 2**18, -1329 / 2**7
# By bits, the largest value and the largest root mean square that a ring is scaled to before the search: the
# lesser scale of the two, but for a root mean square of at least LEAST_SPREAD. Those of ExLlamaV3 1.6.5.
SCALED_TO = {1: (4.0, 1.16), 2: (3.6, 0.98), 3: (3.2, 0.98), 4: (3.0, 0.98)}
LEAST_SPREAD = 0.55
BLOCK = 256  # rings that a thread codes at a time


@functools.cache
def mul1_levels() -> Tensor:
    """Return the level of each window of 16 bits, (65536,) fp32 that fp16 holds exactly."""
    return ((1024 + sums_of_bytes(MULTIPLIER)).float() * STEP + OFFSET).half().float()


def rotated(values: Tensor) -> Tensor:
    """Return values (..., 256) times the orthonormal Hadamard matrix, which is its own inverse."""
    matrix = torch.ones(1, 1)
    while len(matrix) < RING:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return values @ (matrix / RING**0.5)


@torch.no_grad()
def trellis_rings(table: Tensor, bits: int) -> Reconstruction:
    """Code all rows of a table (V, H) fp32 at one rate of 1 to 4 bits.

    Torch's number of threads is used.

    Raises:
        RuntimeError: there is no C++ compiler.

    Source: ExLlamaV3 1.6.5; tail-biting computed trellises: QTIP (arXiv 2406.11235).
    """
    V, H = table.shape
    groups = -(-H // RING)
    generator = torch.Generator().manual_seed(H)
    signs = 2.0 * torch.randint(0, 2, (groups, RING), generator=generator) - 1
    padded = F.pad(table, (0, groups * RING - H)).view(V, groups, RING)
    rings = rotated(padded * signs).view(-1, RING)
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        decoded = torch.cat([*pool.map(lambda block: coded_rings(block, bits)[2], rings.split(BLOCK))])
    rows = (rotated(decoded.view(V, groups, RING)) * signs).view(V, -1)[:, :H].contiguous()
    parts = {"codes": V * groups * RING * bits // 8, "scales": 2 * V * groups, "signs": 2 * groups * RING}
    return Reconstruction(rows, parts, {"bits": bits})


def coded_rings(rings: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the states (N, 256) int64, the scales (N, 1) in fp16 and what they decode to, of rings (N, 256).

    The search scales a ring by its largest value and its root mean square. The scale that is stored is the
    one with the least squared error for the path that was found.
    """
    levels, (most, spread) = mul1_levels(), SCALED_TO[bits]
    size = rings.square().mean(1, keepdim=True).sqrt().clamp_min(1e-12)
    aim = (most * size / rings.abs().amax(1, keepdim=True).clamp_min(1e-12)).clamp(LEAST_SPREAD, spread)
    scale = (size / aim).half().float()
    scaled = rings / torch.where(scale > 0, scale, 1.0)
    states = Trellis(bits, WINDOW, RING).states(scaled, levels[None])
    values = levels[states]
    stored = ((rings * values).sum(1, keepdim=True) / values.square().sum(1, keepdim=True)).half()
    return states, stored, values * stored.float()
