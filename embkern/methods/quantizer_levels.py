"""Quantisers of a standard normal variable: their levels, steps and mean squared errors."""

from __future__ import annotations

import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor

# Steps of uniform codes with the least mean squared error, by bits: Max (1960).
UNIFORM_STEPS = {5: 0.1881, 6: 0.1041, 7: 0.0569, 8: 0.0308}
# Mean squared error at the levels of ``packed_levels``, by bits: `python -m benchmarks packed_levels`.
TRELLIS_DISTORTION = (1.0, 0.2738, 0.0736, 0.0188, 0.0049)


@functools.cache
def lloyd_max_levels(bits: int) -> Tensor:
    """Return the levels (2**bits,) float64 that quantise N(0, 1) with the least mean squared error.

    Each level is the centroid of the values that are nearest to it. Newton's method solves this condition,
    starting at the quantiles of Panter and Dite's high-resolution density, N(0, 3); Lloyd's iteration needs
    about 10,000 steps at 6 bits. Only the negative half is solved, where differences of the normal
    distribution do not cancel.

    Raises:
        RuntimeError: the iteration did not converge.

    Source: S. Lloyd, Least squares quantization in PCM (1982); J. Max, Quantizing for minimum distortion
        (1960).
    """
    count = 2 ** (bits - 1)
    levels = math.sqrt(3) * torch.special.ndtri((torch.arange(count, dtype=torch.float64) + 0.5) / count / 2)
    first, last = torch.tensor([[-40.0], [0.0]], dtype=torch.float64)  # the density below -40 is 0 in fp64
    for _ in range(20):
        edges = torch.cat([first, (levels[1:] + levels[:-1]) / 2, last])
        density = torch.exp(-edges.square() / 2) / math.sqrt(2 * math.pi)
        mass = torch.special.ndtr(edges).diff()
        centroids = -density.diff() / mass
        # Derivatives of a centroid by the level below and the level above; the outer edges are fixed.
        lower = density[:-1] * (centroids - edges[:-1]) / mass / 2
        upper = density[1:] * (edges[1:] - centroids) / mass / 2
        lower[0] = upper[-1] = 0
        jacobian = torch.diag(lower + upper) + torch.diag(lower[1:], -1) + torch.diag(upper[:-1], 1)
        step = torch.linalg.solve(torch.eye(count, dtype=torch.float64) - jacobian, centroids - levels)
        levels = levels + step
        if step.abs().max() < 1e-8:  # convergence is quadratic: the next step would be below 1e-16
            return torch.cat([levels, -levels.flip(0)])
    raise RuntimeError(f"bits: the levels of {bits} bits did not converge")


@functools.cache
def distortion(bits: int) -> float:
    """Return the mean squared error of N(0, 1) at ``lloyd_max_levels(bits)``; 1 for 0 bits.

    As the levels are centroids, it is the variance less that of the levels:
    ``1 - (mass * levels.square()).sum()``.
    """
    if bits == 0:
        return 1.0
    levels = lloyd_max_levels(bits)
    edges = F.pad((levels[1:] + levels[:-1]) / 2, (1, 1), value=math.inf)
    edges[0] = -math.inf
    return 1 - float(torch.special.ndtr(edges).diff() @ levels.square())
