"""The codes of rows at a tier: of the rows' own values, or of their coefficients in a basis."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from ..ops.packed_codes import GROUP, LEVEL_BITS, packed_levels
from ..ops.packed_format import Tier
from ..ops.quantize_rows import LEVEL_STEP, quantize_rows
from ..ops.quantize_trellis import quantize_trellis
from .quantizer_levels import TRELLIS_DISTORTION, UNIFORM_STEPS, lloyd_max_levels

COEFFICIENT_BITS = LEVEL_BITS
# Candidate rates of coefficients in words per row; those above two words per group are not used.
RATES = (1, 2, 3, 4, 6, 8, 10, 12, 16, 20, 24, 32, 40, 48, 64, 80, 96, 128, 160, 192, 256)
# Scales that are tried for a row, relative to its root mean square: few to compare tiers, more for the final
# codes. The large ones are for rows with outliers, which are common among frequent tokens: the full stop of
# all-MiniLM-L6-v2 has a value of 14.6 times the root mean square.
COARSE_SCALES = (0.9, 1.0, 1.15, 1.5, 2.0, 2.8, 4.0)
FINE_SCALES = (
    *(0.7, 0.8, 0.85, 0.9, 0.95, 1.0, 1.05, 1.1, 1.15, 1.22, 1.3, 1.4),
    *(1.5, 1.75, 2.0, 2.4, 2.8, 3.4, 4.0, 5.0, 6.5),
)
# Tried for trellis codes, relative to the best of FINE_SCALES. On rows of all-MiniLM-L6-v2 and SmolLM2 one
# search has 3 % more error than the best of eight scales from 0.84 to 1.12, these two 1.3 %, three 0.6 %.
TRELLIS_SCALES = (0.92, 1.08)
# In rows of up to 2 bits a value and of at least this many groups, the best of FINE_SCALES alone has 0.0 to
# 1.3 % more error than those two. The codes found with it have a best scale of their own. Where the two
# differ by more than the share below, the row is searched once more, with a scale that is three times as far
# away. Errors are then 0.9984 to 1.0031 of those with two scales (all-MiniLM-L6-v2, SmolLM2, Gemma 3 and
# normal values), 0.97 in rows with outliers, and a row takes 1.2 to 1.6 searches instead of 2.
_SURE_GROUPS, _SURE_BITS = 8, 2
_SURE_WITHIN, _SURE_WITHIN_OF_ONE_BIT = 0.015, 0.03
_FURTHER = 3


@functools.cache
def scalar_levels() -> Tensor:
    """Return Lloyd-Max levels (4, 16) int16 of 1 to 4 bits in units of 2^-12, used to compare tiers."""
    levels = torch.zeros(LEVEL_BITS, 16, dtype=torch.int16)
    for bits in range(1, LEVEL_BITS + 1):
        levels[bits - 1, : 2**bits] = (lloyd_max_levels(bits) / LEVEL_STEP).round()
    return levels


@functools.cache
def uniform_steps() -> Tensor:
    """Return the steps (9,) fp32 of uniform codes of 0 to 8 bits; 1 for bits whose codes have levels."""
    return torch.tensor([UNIFORM_STEPS.get(bits, 1.0) for bits in range(9)], dtype=torch.float32)


def profiles(spread: Tensor, most: int = 2) -> list[Tier]:
    """Return the tiers of coefficients; each further bit goes to the group whose error it lowers most.

    Args:
        spread: (K,), standard deviations of the coefficients.
        most: bits per value, on average over all groups, of the widest tier.
    """
    groups = len(spread) // GROUP
    energy = spread.double().square().view(groups, GROUP).sum(1).tolist()
    bits, tiers = [0] * groups, []
    for words in range(1, COEFFICIENT_BITS * groups + 1):
        gains = [
            energy[g] * (TRELLIS_DISTORTION[b] - TRELLIS_DISTORTION[b + 1]) if b < COEFFICIENT_BITS else -1.0
            for g, b in enumerate(bits)
        ]
        bits[max(range(groups), key=gains.__getitem__)] += 1
        if words in RATES and words <= most * groups:
            used = max(g + 1 for g, b in enumerate(bits) if b)
            tiers.append(Tier(True, tuple(bits[:used])))
    return tiers


@dataclass
class RowCodes:
    """Quantises blocks of rows, given by values (n, 32 G) that are relative to a spread.

    The values are those of the rows, padded with zeros, or their coefficients over their spread.

    Attributes:
        spread: (32 G,), or None for ones.
    """

    spread: Tensor | None

    def squared_norms(self, values: Tensor) -> Tensor:
        """Return the squared norms (n,) float64 of rows, spread included."""
        return (values * (1.0 if self.spread is None else self.spread)).square().sum(1).double()

    def scalar_projections(self, tier: Tier, values: Tensor) -> Tensor:
        """Return the projections (n,) of rows with scalar instead of trellis codes, 30 times faster.

        The projection of a row on what is decoded is ``(x * y).sum(1) / y.norm(dim=1)``.
        """
        return self._scalar(tier, values, COARSE_SCALES, False)[2]

    def encode(self, tier: Tier, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the codes (n, 32 * groups) uint8, scales (n,) and projections (n,) of rows."""
        wide = max(tier.bits, default=0) > LEVEL_BITS
        assert not wide or min(tier.bits) > LEVEL_BITS, "a tier has either uniform or trellis codes"
        codes, scales, projections = self._scalar(tier, values, FINE_SCALES, wide)
        if wide:
            return codes, scales, projections
        if len(tier.bits) < _SURE_GROUPS or tier.words > _SURE_BITS * len(tier.bits):
            return self._trellis(tier, values, scales.unsqueeze(1) * torch.tensor(TRELLIS_SCALES))
        codes, found, projections = self._trellis(tier, values, scales.unsqueeze(1))
        within = _SURE_WITHIN if max(tier.bits) > 1 else _SURE_WITHIN_OF_ONE_BIT
        change = torch.where(scales > 0, found / scales, 1.0).clamp(0.5, 2)
        unsure = torch.nonzero((change - 1).abs() > within).flatten()
        if len(unsure):
            tried = (scales * change**_FURTHER)[unsure].unsqueeze(1)
            others = self._trellis(tier, values[unsure], tried)
            better = others[2] > projections[unsure]
            for kept, other in zip((codes, found, projections), others, strict=True):
                kept[unsure[better]] = other[better]
        return codes, found, projections

    def _trellis(self, tier: Tier, values: Tensor, scales: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return codes, scales and projections of trellis codes, with the best of some scales (n, F)."""
        return quantize_trellis(*self._of_tier(tier, values), packed_levels(), scales, needs_codes=True)

    def _scalar(
        self, tier: Tier, values: Tensor, factors: tuple[float, ...], needs_codes: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        tried = torch.tensor(factors)
        return quantize_rows(
            *self._of_tier(tier, values), scalar_levels(), uniform_steps(), tried, needs_codes=needs_codes
        )

    def _of_tier(self, tier: Tier, values: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
        """Return the values of rows in the groups of a tier, their spread, and the bits of the groups."""
        width = GROUP * len(tier.bits)
        spread = None if self.spread is None else self.spread[:width]
        return values[:, :width], spread, torch.tensor(tier.bits, dtype=torch.uint8)
