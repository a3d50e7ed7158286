"""The pictures of a study: SVG that reads in print and in grey, every line named at its end."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

# Colour-blind safe (Okabe and Ito); dashes and markers tell the lines apart without colour.
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
    "svg.fonttype": "path",  # looks the same everywhere, and needs no font
    "svg.hashsalt": "embkern",  # the same figures give the same file
}
# Inches: a panel's axes, what is around them, and the room for a line's name, with each letter of it.
_AXES, _LEFT, _BOTTOM, _TOP, _NAME, _LETTER = (2.4, 2.5), 0.6, 0.45, 0.3, 0.4, 0.075
_NAME_POINTS = 10.5  # between two names
_LOST = 20.0  # times the dense model's value, beyond which nothing is drawn


@dataclass(frozen=True)
class Panel:
    """One of a picture's panels.

    Attributes:
        title: what is drawn.
        lines: by method, pairs of the ratio reached and a value above 0.
        level: the dense model's value, drawn across, if it has one.
    """

    title: str
    lines: dict[str, list[tuple[float, float]]]
    level: float | None = None


def draw(panels: Sequence[Panel], methods: Sequence[str], ratios: Sequence[float]) -> str:
    """Return panels side by side as SVG, both axes logarithmic; a method looks alike in every picture."""
    import matplotlib
    from matplotlib.figure import Figure

    cell = _LEFT + _AXES[0] + _NAME + _LETTER * max(map(len, methods))
    width, height = cell * len(panels), _BOTTOM + _AXES[1] + _TOP
    styles = {method: _STYLES[i % len(_STYLES)] for i, method in enumerate(methods)}
    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # neither a user's style nor another picture's changes this one
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
    """Leave room around the values, give the axis numbers that one can read off, and return its upper end.

    A line that is lost altogether leaves the panel, so that the others can be told apart.
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
    """Write each line's name beside its end, moved apart where they would overlap."""
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
    """Move sorted places apart until neighbours are ``gap`` away, by the least sum of squares.

    Places that have to touch form a block around their mean (pool adjacent violators).
    """
    blocks: list[list[float]] = []  # of places less their rank times the gap, which must not fall
    for rank, place in enumerate(places):
        block = [place - rank * gap]
        while blocks and sum(blocks[-1]) / len(blocks[-1]) > sum(block) / len(block):
            block = blocks.pop() + block
        blocks.append(block)
    level = [sum(block) / len(block) for block in blocks for _ in block]
    return [place + rank * gap for rank, place in enumerate(level)]
