"""A picture of the bits that a packed table spends on each token, by its id."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import Tensor

from ..io.atomic import replacing
from ..tables.packed import PackedTable

_BINS = 256


def bits_by_id(table: PackedTable) -> Tensor:
    """Return the bits per value (V,) that the record of each row takes: those of its tier over H."""
    bits = torch.tensor([32.0 * tier.words for tier in table.described_tiers()])
    return bits[table.tier_of_rows()] / table.embedding_dim


def plot_bits(table: PackedTable, path: str | os.PathLike) -> None:
    """Draw the mean bits per value of neighbouring ids; the vocabulary's order is roughly that of frequency.

    Args:
        table: the packed table.
        path: file to write; the ending says the format, such as ``.png``, ``.svg`` or ``.pdf``.

    Raises:
        ValueError: matplotlib knows no such format.
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("a plot needs matplotlib (pip install 'embkern[report]')") from error

    target, bits = Path(path), bits_by_id(table)
    parts = bits.tensor_split(min(_BINS, len(bits)))
    ends = torch.tensor([0, *(len(part) for part in parts)]).cumsum(0)
    figure = Figure(figsize=(6.4, 3.2), layout="constrained")
    axes = figure.add_subplot()
    means = torch.stack([part.mean() for part in parts])
    axes.stairs(means.numpy(), ends.numpy(), fill=True, color="#0072B2")
    mean = float(bits.mean())
    axes.axhline(mean, color="#D55E00", linewidth=1)
    axes.annotate(f"mean {mean:.2f}", (1, mean), xycoords=("axes fraction", "data"), ha="right", va="bottom")
    axes.set(xlabel="token id", ylabel="bits per value", xlim=(0, len(bits)), ylim=(0, None))
    with replacing(target) as temporary:
        figure.savefig(temporary, format=target.suffix.lstrip(".") or "png", dpi=160)
