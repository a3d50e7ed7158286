"""quantize_rows: codes of rows, value by value, with the best of some scales for each row."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from . import reference
from .backends import Backend, select
from .library import define, overload, reraise_refusal


def _fake(
    values: Tensor,
    spread: Tensor | None,
    bits: Tensor,
    levels: Tensor,
    steps: Tensor,
    factors: Tensor,
    needs_codes: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    count, width = values.shape
    codes = values.new_empty((count if needs_codes else 0, width), dtype=torch.uint8)
    return codes, values.new_empty(count), values.new_empty(count)


define(
    "quantize_rows",
    "(Tensor values, Tensor? spread, Tensor bits, Tensor levels, Tensor steps, Tensor factors, "
    "bool needs_codes) -> (Tensor, Tensor, Tensor)",
    backends=("native",),
    fake=_fake,
)

_FORWARD: dict[str, Callable] = {
    "native": overload("quantize_rows", "native"),
    "torch": reference.quantize_rows,
}


def quantize_rows(
    values: Tensor,
    spread: Tensor | None,
    bits: Tensor,
    levels: Tensor,
    steps: Tensor,
    factors: Tensor,
    *,
    needs_codes: bool,
    backend: Backend | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Quantise rows value by value, trying some scales on each.

    A packed table has these codes from 5 bits on. Up to 4 its own are those of ``quantize_trellis``, and
    these tell quickly which scale suits.

    For every factor f the codes are those of the nearest levels of ``values / (rms * f)`` with ``rms =
    values.square().mean(1).sqrt()``. With ``d = decoded * spread`` and ``x = values * spread``, the factor
    with the largest ``projection = (x * d).sum(1) / d.norm(dim=1)`` is taken, and ``scale = (x * d).sum(1) /
    d.square().sum(1)``.

    Args:
        values: (N, 32 G) float32, without gradient.
        spread: (32 G,) float32, what the values were divided by; None for ones.
        bits: (G,) uint8, 0 to 8 per group of 32 values.
        levels: (4, 16) int16, in steps of 2^-12: the levels of codes of 1 to 4 bits, ascending.
        steps: (9,) float32: of uniform codes of 5 to 8 bits, by their bits.
        factors: (F,) float32, positive.
        needs_codes: whether the codes are wanted.
        backend: ``native`` or ``torch``; None takes the best.

    Returns:
        codes (N, 32 G) uint8, empty unless wanted; scales (N,); projections (N,). A row of zeros has
        projection 0.
    """
    chosen = select("quantize_rows", values.device.type, values.dtype, backend)
    try:
        return _FORWARD[chosen](values.contiguous(), spread, bits, levels, steps, factors, needs_codes)
    except RuntimeError as error:
        reraise_refusal(error)
        raise
