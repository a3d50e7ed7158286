"""Trellises of any memory: their best paths, and levels found for them by Lloyd's iteration."""

from __future__ import annotations

import ctypes
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .compiler import compiled


class _Kind(ctypes.Structure):
    _fields_ = (
        ("levels", ctypes.c_void_p),
        ("further", ctypes.c_int32),
        ("values", ctypes.c_int32),
        ("weight", ctypes.c_float),
    )


@dataclass(frozen=True)
class Trellis:
    """A trellis whose steps have ``bits * values`` bits, for ``values`` values each.

    ``coded`` bits of a step are shifted into a register of ``window`` bits, from below. With the others above
    it, it is the state. ``ring`` values are coded together: the register before the first of them is that
    after the last one.
    """

    bits: int
    window: int
    ring: int
    coded: int = 0
    values: int = 1

    @property
    def memory(self) -> int:
        """Bits of a state."""
        step = self.bits * self.values
        return self.window + step - (self.coded or step)

    def states(self, samples: Tensor, levels: Tensor) -> Tensor:
        """Return states (N, ring / values) of samples (N, ring) with levels (values, 2^memory), 4 <= window.

        The squared error of the path is the least of all that begin and end in one state, that which a first
        pass over the end and the beginning of the ring finds best.
        """
        coded = self.coded or self.bits * self.values
        steps = torch.zeros(self.ring // self.values, dtype=torch.int32)
        return best_paths(samples, steps, [(levels, 1.0)], coded=coded, window=self.window)

    def decoded(self, states: Tensor, levels: Tensor) -> Tensor:
        """Return the values (N, ring) of states."""
        return levels.float()[:, states].permute(1, 2, 0).flatten(1)

    def random_levels(self, seed: int) -> Tensor:
        """Return levels (values, 2^memory) of random normal variables."""
        generator = torch.Generator().manual_seed(seed)
        spread = math.sqrt(1 - 4.0**-self.bits)
        return torch.randn(self.values, 2**self.memory, generator=generator) * spread


def best_paths(
    samples: Tensor, kind_of_step: Tensor, kinds: list[tuple[Tensor, float]], *, coded: int, window: int
) -> Tensor:
    """Return states (N, steps) of samples (N, values of a ring) whose steps are of several kinds.

    ``kinds`` has the levels (values, 2^memory) of each kind, and the weight of squared errors.
    """
    library = compiled("encode.cpp", ("-march=native",))
    samples, kind_of_step = samples.float().contiguous(), kind_of_step.to(torch.int32).contiguous()
    held = [levels.float().contiguous() for levels, _ in kinds]
    structures = (_Kind * len(kinds))()
    for structure, levels, (_, weight) in zip(structures, held, kinds, strict=True):
        values, size = levels.shape
        structure.levels, structure.further = levels.data_ptr(), size >> window
        structure.values, structure.weight = values, weight
    states = torch.empty(len(samples), len(kind_of_step), dtype=torch.int32)
    pointers = [ctypes.c_void_p(each.data_ptr()) for each in (kind_of_step, samples, states)]
    rings = ctypes.c_int64(len(samples))
    if not library.encode_rings(
        coded, window, len(kind_of_step), structures, *pointers[:2], rings, pointers[2]
    ):
        raise ValueError(f"coded: expected 1 to 4 bits, got {coded}")
    return states.long()


def normal_samples(trellis_ring: int, values: int, seed: int) -> Tensor:
    """Return about ``values`` samples (N, ring) of a standard normal variable."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(max(1, values // trellis_ring), trellis_ring, generator=generator)


def free_levels(trellis: Trellis, steps: int = 30, seed: int = 0) -> Tensor:
    """Return levels (values, 2^memory), one per state, by Lloyd's iteration from random ones."""
    levels = trellis.random_levels(seed)
    count = max(100_000, 16 * levels.shape[1])
    for step in range(steps):
        samples = normal_samples(trellis.ring, count, 1000 * seed + step + 1)
        states = trellis.states(samples, levels).flatten()
        visits = states.bincount(minlength=levels.shape[1])
        for value in range(trellis.values):
            own = samples[:, value :: trellis.values].flatten()
            sums = torch.zeros(levels.shape[1]).index_add_(0, states, own)
            levels[value] = (sums + 4 * levels[value]) / (visits + 4)  # the old level counts as four samples
    return levels


def sums_of_bytes(multiplier: int, increment: int = 0) -> Tensor:
    """Return the sum of the four bytes of ``(multiplier * s + increment) % 2**32``, (65536,), of each s."""
    mixed = (torch.arange(1 << 16) * multiplier + increment) % 2**32
    return sum((mixed >> shift & 255 for shift in (8, 16, 24)), mixed & 255)


def squared_error(trellis: Trellis, levels: Tensor, samples: Tensor) -> float:
    """Return the mean squared error of samples."""
    decoded = trellis.decoded(trellis.states(samples, levels), levels)
    return float((samples - decoded).square().double().mean())
