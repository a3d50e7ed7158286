"""Scalar quantisers: round to nearest, and Lloyd-Max levels with a scale search."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from ..tables.bit_codes import pack_codes, packed_bytes
from ..tables.scalar import ScalarTable
from .base import Options, blocks, byte_budget, check_table, parse_options, ratio_error
from .quantizer_levels import lloyd_max_levels
from .storage import direction_error, narrow_dtype, rounded

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
def rtn(table: Tensor, *, ratio: float, counts: Tensor | None = None, **options: Any) -> ScalarTable:
    """Round to nearest: codes of 2 to 8 bits between the least and the largest value of a group.

    ``scale = (max - min) / (2**bits - 1); codes = ((x - min) / scale).round(); y = codes * scale + min``

    Groups lie within a row; the last of a row may be shorter. Scale and minimum are fp16 (bf16 for a bf16
    table). Of the bits and
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
    return _quantized(table, ratio, bits, chosen.group, round_to_nearest, 2, False)


@torch.no_grad()
def lloyd_max(table: Tensor, *, ratio: float, counts: Tensor | None = None, **options: Any) -> ScalarTable:
    """Codes of 1 to 8 bits at the Lloyd-Max levels of a normal distribution, with a scale search per group.

    The values of a group are quantised to their nearest levels ``y`` at 20 scales from 0.55 to 1.5 of the
    group's root mean square. The levels with the largest ``(x @ y) ** 2 / (y @ y)`` are kept, with their best
    scale, ``(x @ y) / (y @ y)``. Levels and scales are fp16 (bf16 for a bf16 table). Of the bits and groups
    that fit the ratio, those with the least direction error on 1024 rows are chosen.

    Args:
        table: (V, H).
        ratio: bytes of the table as stored over bytes of codes, scales and levels.
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
    return _quantized(table, ratio, bits, chosen.group, nearest_levels, 1, True)


class Quantized(NamedTuple):
    """Groups (N, g) as they are stored: ``scale * codes + minimum``, or ``scale * points[codes]``.

    Attributes:
        codes: (N, g) uint8.
        scale: (N, 1), in the dtype of storage.
        minimum: (N, 1), or None.
        points: the values of codes, or None where they are the codes themselves.
    """

    codes: Tensor
    scale: Tensor
    minimum: Tensor | None = None
    points: Tensor | None = None

    def decoded(self) -> Tensor:
        """Return the groups as they are decoded, (N, g) fp32."""
        values = self.codes.float() if self.points is None else self.points.float()[self.codes.int()]
        values = values * self.scale.float()
        return values if self.minimum is None else values + self.minimum.float()


Quantizer = Callable[[Tensor, int, torch.dtype], Quantized]


def _quantized(
    table: Tensor,
    ratio: float,
    bits: Sequence[int],
    group: int | None,
    quantize: Quantizer,
    scalars: int,
    has_points: bool,
) -> ScalarTable:
    """Quantise at the best bits and group that fit; a group stores so many ``scalars`` of 16 bits."""
    budget, dtype = byte_budget(table, ratio), narrow_dtype(table)
    V, H = table.shape
    groups = [group] if group else [*(size for size in GROUPS if size < H), H]
    size = {
        (bits, group): packed_bytes(V * H, bits) + 2 * scalars * V * -(-H // group) + 2 * has_points * 2**bits
        for bits, group in itertools.product(bits, groups)
    }
    fitting = [setting for setting in size if size[setting] <= budget]
    if not fitting:
        raise ratio_error(table, ratio, min(size.values()))

    def quantized(rows: Tensor, setting: tuple[int, int]) -> list[Quantized]:
        bits, group = setting
        return [quantize(part, bits, dtype) for part in rows.float().split(group, dim=1)]

    def error(setting: tuple[int, int]) -> tuple[float, int]:
        copies = torch.cat([part.decoded() for part in quantized(sample, setting)], 1)
        return direction_error(sample, copies), size[setting]

    sample = table[:: -(-V // SAMPLE_ROWS)]
    best = min(fitting, key=error) if len(fitting) > 1 else fitting[0]
    parts = [quantized(rows, best) for rows in blocks(table)]
    codes = torch.cat([torch.cat([group.codes for group in row], 1) for row in parts])
    scales = torch.cat([torch.cat([group.scale for group in row], 1) for row in parts])
    minima = [[group.minimum for group in row if group.minimum is not None] for row in parts]
    return ScalarTable(
        scales,
        pack_codes(codes, best[0]),
        torch.cat([torch.cat(row, 1) for row in minima]) if scalars > 1 else None,
        parts[0][0].points,
        *best,
        num_embeddings=V,
        embedding_dim=H,
        facts={"bits": best[0], "group": best[1]},
        check=False,
    )


def round_to_nearest(values: Tensor, bits: int, dtype: torch.dtype) -> Quantized:
    """Return groups (N, g) rounded to ``2**bits`` equidistant values from their least to their largest."""
    least, largest = values.aminmax(dim=1, keepdim=True)
    scale, zero = rounded((largest - least) / (2**bits - 1), dtype), rounded(least, dtype)
    # A scale of 0 decodes to the minimum, whatever the code.
    codes = ((values - zero.float()) / scale.float().clamp_min(1e-30)).round_().clamp_(0, 2**bits - 1)
    return Quantized(codes.to(torch.uint8), scale, zero)


def nearest_levels(values: Tensor, bits: int, dtype: torch.dtype) -> Quantized:
    """Return groups (N, g) quantised to ``lloyd_max_levels`` at their best scale."""
    points = lloyd_max_levels(bits).to(values.device, dtype)
    levels = points.float()
    edges = (levels[1:] + levels[:-1]) / 2
    spread = values.square().mean(dim=1, keepdim=True).sqrt().clamp_min(1e-30)
    best = torch.zeros_like(values, dtype=torch.uint8)
    most = torch.full_like(spread, -1.0)
    # One-bit codes are the signs at any scale.
    for factor in SCALES if bits > 1 else [1.0]:
        codes = torch.bucketize(values / (factor * spread), edges)
        near = levels[codes]
        gain = (values * near).sum(1, keepdim=True).square() / near.square().sum(1, keepdim=True)
        best = torch.where(gain > most, codes.to(torch.uint8), best)
        most = torch.maximum(most, gain)
    found = levels[best.int()]
    scale = (values * found).sum(1, keepdim=True) / found.square().sum(1, keepdim=True)
    return Quantized(best, rounded(scale, dtype), None, points)
