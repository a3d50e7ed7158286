"""The picture of the results: signal to noise against cycles, a panel per number of bits."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

# The code of each decoder, and its colour (Okabe and Ito).
DECODERS = {
    "planes": ("packed/1", "#000000"),
    "windows": ("packed/1", "#CC79A7"),
    "sums-4096": ("sums-4096", "#D55E00"),
    "computed-65536": ("computed-65536", "#0072B2"),
    "gathered-4096": ("gathered-4096", "#56B4E9"),
    "sums-256": ("sums-256", "#E69F00"),
    "trellis-128": ("trellis-128", "#009E73"),
    "trellis-128-rings": ("trellis-128-rings", "#009E73"),
    "trellis-64": ("trellis-64", "#009E73"),
    "trellis-16": ("trellis-16", "#009E73"),
    "eights": ("eights", "#999999"),
    "quadruples": ("quadruples", "#999999"),
    "pairs": ("pairs", "#999999"),
    "scalar": ("scalar", "#999999"),
}
BELOW = ("planes", "trellis-64", "quadruples", "sums-4096")  # labels that would lie upon others
MARKERS = {"avx2": "^", "avx512": "o", "avx512_vbmi": "s"}
ROW = 640


def draw(rows: list[dict[str, Any]], path: Path) -> Path:
    """Draw every decoder; a filled marker is a product in fp32, an empty one a product of integers."""
    from matplotlib.figure import Figure

    rates = {
        (row["code"], row["bits"]): row["decibels"]
        for row in rows
        if row["kind"] == "rate" and (row["code"] != "sums-4096" or row["ring"] == ROW)
    }
    named = set[tuple[str, int]]()  # decoders that have a label
    figure = Figure(figsize=(10, 8), layout="constrained")
    axes = figure.subplots(2, 2)
    for axis, bits in zip(axes.flat, range(1, 5), strict=True):
        for row in rows:
            if row["kind"] != "cycles" or row["bits"] != bits or row["set"] not in MARKERS:
                continue
            code, colour = DECODERS[row["decoder"]]
            rate = rates.get((code, bits))
            if rate is None:
                continue
            marker = MARKERS[row["set"]]
            axis.plot(row["cycles"], rate, marker, color=colour, ms=6)
            if row["cycles_of_integers"]:
                axis.plot(row["cycles_of_integers"], rate, marker, color=colour, ms=6, mfc="none")
            if row["set"] != "avx2" and (row["decoder"], bits) not in named:
                named.add((row["decoder"], bits))
                axis.annotate(
                    row["decoder"],
                    (row["cycles"], rate),
                    xytext=(4, -10 if row["decoder"] in BELOW else 4),
                    textcoords="offset points",
                    fontsize=7,
                    color=colour,
                )
        bound = 20 * bits * math.log10(2)
        axis.axhline(bound, color="black", linestyle="--", linewidth=0.8)
        axis.set(
            xscale="log",
            title=f"{bits} bit{'s' if bits > 1 else ''}, bound {bound:.2f} dB",
            xlabel="cycles for 32 values",
        )
        axis.set_xticks([2, 4, 8, 16, 32], ["2", "4", "8", "16", "32"])
        axis.minorticks_off()
        axis.grid(True, alpha=0.3)
    for axis in axes[:, 0]:
        axis.set_ylabel("signal to noise, dB")
    shapes = [
        axes.flat[0].plot([], [], marker, color="grey", label=name)[0] for name, marker in MARKERS.items()
    ]
    shapes += axes.flat[0].plot([], [], "o", color="grey", mfc="none", label="product of integers")
    figure.legend(handles=shapes, loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(path, dpi=150)
    return path
