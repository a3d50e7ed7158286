"""Quantisers of a standard normal variable: levels, steps, and the squared error that they leave."""

from __future__ import annotations

import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor

# Steps of uniform codes that make the squared error least, by bits: Max (1960).
UNIFORM_STEPS = {5: 0.1881, 6: 0.1041, 7: 0.0569, 8: 0.0308}
# Mean squared error at the levels of ``trellis_levels``, by bits: `python -m benchmarks trellis_levels`.
TRELLIS_DISTORTION = (1.0, 0.3094, 0.0828, 0.0227, 0.0064)


@functools.cache
def lloyd_max_levels(bits: int) -> Tensor:
    """Levels (2**bits,) float64 that quantise N(0, 1) with the least mean squared error.

    Each is the centroid of the values that are nearest to it. Solved by Newton's method from the levels of
    Panter and Dite's high-resolution density, a normal one of variance 3: Lloyd's own iteration needs some
    10,000 steps at 6 bits. Only the negative half is solved for, where the tail does not cancel.
    """
    count = 2 ** (bits - 1)
    levels = math.sqrt(3) * torch.special.ndtri((torch.arange(count, dtype=torch.float64) + 0.5) / count / 2)
    first, last = torch.tensor([[-40.0], [0.0]], dtype=torch.float64)  # nothing lies below -40
    for _ in range(20):
        edges = torch.cat([first, (levels[1:] + levels[:-1]) / 2, last])
        density = torch.exp(-edges.square() / 2) / math.sqrt(2 * math.pi)
        mass = torch.special.ndtr(edges).diff()
        centroids = -density.diff() / mass
        # How a centroid moves with the lower and the upper neighbour of its level; both ends are fixed.
        lower = density[:-1] * (centroids - edges[:-1]) / mass / 2
        upper = density[1:] * (edges[1:] - centroids) / mass / 2
        lower[0] = upper[-1] = 0
        jacobian = torch.diag(lower + upper) + torch.diag(lower[1:], -1) + torch.diag(upper[:-1], 1)
        step = torch.linalg.solve(torch.eye(count, dtype=torch.float64) - jacobian, centroids - levels)
        levels = levels + step
        if step.abs().max() < 1e-8:  # the next would be its square
            return torch.cat([levels, -levels.flip(0)])
    raise RuntimeError(f"bits: the levels of {bits} bits did not converge")


@functools.cache
def distortion(bits: int) -> float:
    """Mean squared error of N(0, 1) at the levels of ``lloyd_max_levels``; 1 for no bits.

    Levels that are centroids leave the variance less their own: ``1 - (mass * levels.square()).sum()``.
    """
    if bits == 0:
        return 1.0
    levels = lloyd_max_levels(bits)
    edges = F.pad((levels[1:] + levels[:-1]) / 2, (1, 1), value=math.inf)
    edges[0] = -math.inf
    return 1 - float(torch.special.ndtr(edges).diff() @ levels.square())
