"""The pictures of a study: SVG for screen, print and greyscale, with a name at the end of every line."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

# Colours for the colour-blind (Okabe and Ito); dashes and markers distinguish the lines without colour.
_STYLES: tuple[tuple[str, Any, str], ...] = (
    ("#000000", ":", "D"),
    ("#0072B2", "--", "s"),
    ("#009E73", "-.", "^"),
    ("#D55E00", "-", "o"),
    ("#CC79A7", (0, (5, 1, 1, 1, 1, 1)), "v"),
    ("#8A6100", (0, (6, 3)), "P"),
    ("#56B4E9", (0, (1, 1)), "X"),
    ("#666666", (0, (3, 1, 1, 1)), "*"),
)
_RC = {
    "font.family": "DejaVu Sans",  # comes with matplotlib
    "font.size": 8.5,
    "axes.titlesize": 9.0,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "svg.fonttype": "path",  # letters as outlines, which need no installed font
    "svg.hashsalt": "embkern",  # the same figures give the same file
}
# Inches: a panel's axes, its margins, and the space for a line's name, fixed and per letter.
_AXES, _LEFT, _BOTTOM, _TOP, _NAME, _LETTER = (2.4, 2.5), 0.6, 0.45, 0.3, 0.4, 0.075
_NAME_POINTS = 10.5  # least distance between two names
_LOST = 20.0  # a panel ends at this multiple of the dense model's value


@dataclass(frozen=True)
class Panel:
    """A panel of a picture.

    Attributes:
        title: the quantity on the vertical axis.
        lines: by method, pairs of the ratio reached and a value above 0.
        level: the dense model's value, drawn as a horizontal line, if it has one.
    """

    title: str
    lines: dict[str, list[tuple[float, float]]]
    level: float | None = None


def draw(panels: Sequence[Panel], methods: Sequence[str], ratios: Sequence[float]) -> str:
    """Return panels side by side as SVG, with logarithmic axes; the place in ``methods`` gives the style."""
    import matplotlib
    from matplotlib.figure import Figure

    cell = _LEFT + _AXES[0] + _NAME + _LETTER * max(map(len, methods))
    width, height = cell * len(panels), _BOTTOM + _AXES[1] + _TOP
    styles = {method: _STYLES[i % len(_STYLES)] for i, method in enumerate(methods)}
    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # the picture does not depend on the caller's settings
        matplotlib.rcParams.update(_RC)
        figure = Figure(figsize=(width, height))
        for i, panel in enumerate(panels):
            left, bottom = (i * cell + _LEFT) / width, _BOTTOM / height
            axes = figure.add_axes((left, bottom, _AXES[0] / width, _AXES[1] / height))
            _draw(axes, panel, styles, ratios)
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    return text.getvalue()


def _draw(axes: Any, panel: Panel, styles: dict[str, tuple[str, Any, str]], ratios: Sequence[float]) -> None:
    lines = {
        method: sorted((x, y) for x, y in points if y > 0 and math.isfinite(y))
        for method, points in panel.lines.items()
    }
    top = _limit(axes, panel, [point for points in lines.values() for point in points], ratios)
    ends: list[tuple[str, str, float, float]] = []  # name, colour, x, y
    for method, points in lines.items():
        colour, dashes, marker = styles[method]
        if points:
            axes.plot(
                *zip(*points, strict=True), color=colour, linestyle=dashes, linewidth=1.4, marker=marker,
                markersize=4.5, markerfacecolor="white", markeredgewidth=1.1, zorder=3,
            )  # fmt: skip
            x, y = points[-1]
            ends.append((f"{method} ↑" if y > top else method, colour, x, min(y, top)))
    if panel.level is not None:
        axes.axhline(panel.level, color="#666666", linewidth=0.9, zorder=2)
        ends.append(("dense", "#444444", axes.get_xlim()[1], panel.level))
    axes.set(xlabel="times smaller than the dense table", title=panel.title)
    axes.set_xticks(ratios, [f"{ratio:g}" for ratio in ratios])
    axes.minorticks_off()
    axes.grid(True, axis="y", linewidth=0.4, color="#d5d5d5")
    _name(axes, ends)


def _limit(axes: Any, panel: Panel, points: list[tuple[float, float]], ratios: Sequence[float]) -> float:
    """Set the limits and the ticks of both axes, and return the upper limit of the values.

    A line with far larger values leaves the panel, so that the others remain distinguishable.
    """
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    values = [y for _, y in points] + ([panel.level] if panel.level is not None else [])
    low, high = (min(values), max(values)) if values else (0.1, 1.0)
    if panel.level is not None:
        high = min(high, _LOST * panel.level)
    room = max(0.06 * math.log(high / low), 0.05)
    reached = [*ratios, *(x for x, _ in points)]
    axes.set(xscale="log", yscale="log", xlim=(min(reached) / 1.1, max(reached) * 1.1))
    axes.set_ylim(low * math.exp(-room), high * math.exp(room))
    digits = (1,) if high / low > 300 else (1, 2, 5) if high / low > 3 else range(1, 10)
    axes.yaxis.set_major_locator(LogLocator(subs=digits))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:,.0f}" if y >= 1000 else f"{y:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    return high


def _name(axes: Any, ends: list[tuple[str, str, float, float]]) -> None:
    """Write the name of each line beside its end, moved apart where names would overlap."""
    points = axes.figure.dpi / 72
    ends = sorted(ends, key=lambda end: end[3])
    heights = [axes.transData.transform((x, y))[1] / points for _, _, x, y in ends]
    wanted = spread(heights, _NAME_POINTS)
    for k, (name, colour, x, y) in enumerate(ends):
        aside = (axes.bbox.x1 - axes.transData.transform((x, y))[0]) / points + 12
        axes.annotate(
            name, (x, y), (aside, wanted[k] - heights[k]), textcoords="offset points",
            color=colour, va="center", fontsize=8.5, annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": "#aaaaaa", "linewidth": 0.4, "shrinkA": 0, "shrinkB": 4,
                        "relpos": (0, 0.5)},
        )  # fmt: skip


def spread(places: Sequence[float], gap: float) -> list[float]:
    """Move sorted places apart to a distance of at least ``gap``, with the least sum of squared moves.

    Places that end up ``gap`` apart form a block around their mean (pool adjacent violators).
    """
    blocks: list[list[float]] = []  # place - rank * gap, which must not decrease
    for rank, place in enumerate(places):
        block = [place - rank * gap]
        while blocks and sum(blocks[-1]) / len(blocks[-1]) > sum(block) / len(block):
            block = blocks.pop() + block
        blocks.append(block)
    level = [sum(block) / len(block) for block in blocks for _ in block]
    return [place + rank * gap for rank, place in enumerate(level)]
