"""Definition of quantize_rows."""

from __future__ import annotations

import torch
from torch import Tensor

from ..packed_codes import GROUP, LEVEL_BITS

LEVEL_STEP = 1 / 4096  # of the levels of quantize_rows


def quantize_rows(
    values: Tensor,
    spread: Tensor | None,
    bits: Tensor,
    levels: Tensor,
    steps: Tensor,
    factors: Tensor,
    needs_codes: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Scalar codes, scales and projections of rows (N, 32 G), at the best of the factors."""
    squares = values.new_ones(values.shape[1]) if spread is None else spread.square()
    root = values.square().mean(1, keepdim=True).sqrt()
    root = torch.where(root > 0, root, 1.0)
    best = torch.full_like(root[:, 0], -1.0)
    scales = torch.zeros_like(best)
    codes = values.new_zeros((len(values) if needs_codes else 0, values.shape[1]), dtype=torch.uint8)
    for factor in factors.tolist():
        code, decoded = _nearest_levels(values / (root * factor), bits.tolist(), levels, steps.tolist())
        dot, square = (values * decoded) @ squares, decoded.square() @ squares
        projection = dot / square.clamp_min(1e-30).sqrt()
        better = projection > best
        best = torch.where(better, projection, best)
        scales = torch.where(better, dot / square.clamp_min(1e-30), scales)
        if needs_codes:
            codes[better] = code[better]
    return codes, scales, best


def _nearest_levels(
    values: Tensor, bits: list[int], levels: Tensor, steps: list[float]
) -> tuple[Tensor, Tensor]:
    """Codes (uint8) of the nearest levels, and the values that they decode to."""
    codes, decoded = [], []
    for width, part in zip(bits, values.split(GROUP, 1), strict=True):
        if width == 0:
            code, value = torch.zeros_like(part), torch.zeros_like(part)
        elif width > LEVEL_BITS:
            middle = (2**width - 1) / 2
            code = (part / steps[width] + middle).round().clamp(0, 2**width - 1)
            value = code - middle
        else:
            own = levels[width - 1, : 2**width].to(values.dtype) * LEVEL_STEP
            code = torch.bucketize(part.contiguous(), (own[1:] + own[:-1]) / 2)
            value = own[code]
        codes.append(code.to(torch.uint8))
        decoded.append(value)
    return torch.cat(codes, 1), torch.cat(decoded, 1)
