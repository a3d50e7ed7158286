"""Scalar quantisers for comparison: round to nearest, and Lloyd-Max levels with a scale search."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from ..methods.base import Options, blocks, byte_budget, check_table, parse_options, ratio_error
from ..methods.quantizer_levels import lloyd_max_levels
from .reconstruction import Reconstruction, direction_error, half, packed_bytes

GROUPS = (32, 64, 128)  # sizes of groups of values that share a scale, tried besides the whole row
SAMPLE_ROWS = 1024  # on which bits and group are chosen
SCALES = [0.55 + 0.05 * step for step in range(20)]  # tried for a group, relative to its root mean square


class RTNOptions(Options):
    """Options of ``rtn``."""

    bits: Literal[2, 3, 4, 5, 6, 8] | None = Field(
        None, description="bits of a code; None: the best that fit"
    )
    group: int | None = Field(
        None,
        ge=1,
        description="values of a row that share a scale; None: the best of 32, 64, 128 and the row",
    )


class LloydMaxOptions(Options):
    """Options of ``lloyd_max``."""

    bits: Literal[1, 2, 3, 4, 5, 6, 8] | None = Field(
        None, description="bits of a code; None: the best that fit"
    )
    group: int | None = Field(
        None,
        ge=1,
        description="values of a row that share a scale; None: the best of 32, 64, 128 and the row",
    )


@torch.no_grad()
def rtn(table: Tensor, *, ratio: float, counts: Tensor | None = None, **options: Any) -> Reconstruction:
    """Round to nearest: codes of 2 to 8 bits between the least and the largest value of a group.

    ``scale = (max - min) / (2**bits - 1); codes = ((x - min) / scale).round(); y = codes * scale + min``

    Groups lie within a row; the last of a row may be shorter. Scale and minimum are fp16. Of the bits and
    groups that fit the ratio, those with the least direction error on 1024 rows are chosen.

    Args:
        table: (V, H).
        ratio: bytes of the table as stored over bytes of codes, scales and minima.
        counts: ignored, as all rows are rounded in the same way.
        options: the fields of ``RTNOptions``.

    Raises:
        ValueError, TypeError: the ratio cannot be reached (the message names the highest that can), or an
            argument is not usable.

    Source: the group-wise integer formats of common inference runtimes.
    """
    chosen = parse_options(RTNOptions, options, "rtn")
    check_table(table)
    bits = [chosen.bits] if chosen.bits else [8, 6, 5, 4, 3, 2]
    return _quantized(table, ratio, bits, chosen.group, round_to_nearest, ("scales", "minima"))


@torch.no_grad()
def lloyd_max(table: Tensor, *, ratio: float, counts: Tensor | None = None, **options: Any) -> Reconstruction:
    """Codes of 1 to 8 bits at the Lloyd-Max levels of a normal distribution, with a scale search per group.

    The values of a group are quantised to their nearest levels ``y`` at 20 scales from 0.55 to 1.5 of the
    group's root mean square. The levels with the largest ``(x @ y) ** 2 / (y @ y)`` are kept, with their best
    scale, ``(x @ y) / (y @ y)``, in fp16. Of the bits and groups that fit the ratio, those with the least
    direction error on 1024 rows are chosen.

    Args:
        table: (V, H).
        ratio: bytes of the table as stored over bytes of codes and scales.
        counts: ignored, as all rows are quantised in the same way.
        options: the fields of ``LloydMaxOptions``.

    Raises:
        ValueError, TypeError: the ratio cannot be reached (the message names the highest that can), or an
            argument is not usable.

    Source: S. Lloyd, Least squares quantization in PCM (1982); J. Max, Quantizing for minimum distortion
        (1960).
    """
    chosen = parse_options(LloydMaxOptions, options, "lloyd_max")
    check_table(table)
    bits = [chosen.bits] if chosen.bits else [8, 6, 5, 4, 3, 2, 1]
    return _quantized(table, ratio, bits, chosen.group, nearest_levels, ("scales",))


def _quantized(
    table: Tensor,
    ratio: float,
    bits: Sequence[int],
    group: int | None,
    quantize: Callable[[Tensor, int], Tensor],
    scalars: Sequence[str],
) -> Reconstruction:
    """Quantise at the best bits and group that fit; ``scalars`` names the fp16 values stored per group."""
    budget = byte_budget(table, ratio)
    V, H = table.shape
    groups = [group] if group else [*(size for size in GROUPS if size < H), H]
    parts = {
        (bits, group): {"codes": packed_bytes(V * H, bits), **dict.fromkeys(scalars, 2 * V * -(-H // group))}
        for bits, group in itertools.product(bits, groups)
    }
    size = {setting: sum(each.values()) for setting, each in parts.items()}
    fitting = [setting for setting in parts if size[setting] <= budget]
    if not fitting:
        raise ratio_error(table, ratio, min(size.values()))

    def decoded(rows: Tensor, setting: tuple[int, int]) -> Tensor:
        bits, group = setting
        return torch.cat([quantize(part, bits) for part in rows.float().split(group, dim=1)], dim=1)

    def error(setting: tuple[int, int]) -> tuple[float, int]:
        return direction_error(sample, decoded(sample, setting)), size[setting]

    sample = table[:: -(-V // SAMPLE_ROWS)]
    best = min(fitting, key=error) if len(fitting) > 1 else fitting[0]
    rows = torch.cat([decoded(rows, best) for rows in blocks(table)])
    return Reconstruction(rows, parts[best], {"bits": best[0], "group": best[1]})


def round_to_nearest(values: Tensor, bits: int) -> Tensor:
    """Return groups (N, g) rounded to ``2**bits`` equidistant values from their least to their largest."""
    least, largest = values.aminmax(dim=1, keepdim=True)
    scale, zero = half((largest - least) / (2**bits - 1)), half(least)
    # A scale of 0 decodes to the minimum, whatever the code.
    codes = ((values - zero) / scale.clamp_min(1e-30)).round_().clamp_(0, 2**bits - 1)
    return codes * scale + zero


def nearest_levels(values: Tensor, bits: int) -> Tensor:
    """Return groups (N, g) quantised to ``lloyd_max_levels`` at their best scale."""
    levels = lloyd_max_levels(bits).to(values)
    edges = (levels[1:] + levels[:-1]) / 2
    spread = values.square().mean(dim=1, keepdim=True).sqrt().clamp_min(1e-30)
    best = torch.zeros_like(values)
    most = torch.full_like(spread, -1.0)
    # One-bit codes are the signs at any scale.
    for factor in SCALES if bits > 1 else [1.0]:
        near = levels[torch.bucketize(values / (factor * spread), edges)]
        gain = (values * near).sum(1, keepdim=True).square() / near.square().sum(1, keepdim=True)
        best = torch.where(gain > most, near, best)
        most = torch.maximum(most, gain)
    scale = (values * best).sum(1, keepdim=True) / best.square().sum(1, keepdim=True)
    return half(scale) * best
