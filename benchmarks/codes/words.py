"""Codes whose words hold several values: nearest words, and words found by Lloyd's iteration."""

from __future__ import annotations

import torch
from torch import Tensor


def nearest(samples: Tensor, words: Tensor) -> Tensor:
    """Return, for samples (N, values), which of the words (W, values) is nearest."""
    squares = words.square().sum(1)
    return torch.cat([(squares - 2 * part @ words.T).argmin(1) for part in samples.split(8192)])


def lloyd_words(values: int, count: int, signs: bool, steps: int = 40, samples: int = 150_000) -> Tensor:
    """Return words (count, values) for standard normal values; magnitudes only if each value has a sign."""
    generator = torch.Generator().manual_seed(0)
    words = drawn(samples, values, signs, generator)[:count]
    for _ in range(steps):
        given = drawn(samples, values, signs, generator)
        chosen = nearest(given, words)
        visits = chosen.bincount(minlength=count).unsqueeze(1)
        sums = torch.zeros_like(words).index_add_(0, chosen, given)
        words = torch.where(visits > 0, sums / visits.clamp_min(1), words)
    return words


def drawn(samples: int, values: int, signs: bool, generator: torch.Generator) -> Tensor:
    """Return samples (N, values) as words represent them."""
    normal = torch.randn(samples, values, generator=generator)
    return normal.abs() if signs else normal
