"""What is printed at the end: kernels, headlines, tiles, tests that failed, and what is left over."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from .lines import (
    COMPILED_HEADLINE,
    HEADLINE,
    KERNEL,
    TEST,
    TILE,
    TIMED_KERNEL,
    TIMED_TILE,
    left_over,
)

Lines = Sequence[dict[str, Any]]
RIGHT = "right"
SHOWN = 6  # names of what is left over or failed; the file of lines has all of them
WIDTH = 110


def report(lines: Lines, rehearsal: bool = False) -> list[str]:
    """Return the lines of the report; sections about nothing are left out."""
    printed = _table("kernel", merged(lines, KERNEL, TIMED_KERNEL), rehearsal)
    printed += _headlines(lines)
    printed += _table("tile", merged(lines, TILE, TIMED_TILE), rehearsal)
    if rehearsal and printed:
        printed.append("A rehearsal: times are those of the interpreter and the emulator, not of a device.")
    return printed + _tests(lines) + _left(lines)


def merged(lines: Lines, key: str, timed: str) -> list[dict[str, Any]]:
    """Return a row per name: how it was judged, then its time; what was planned alone is not run."""
    rows: dict[str, dict[str, Any]] = {}
    for line in lines:
        if line.get("planned") == key:
            for name in line["names"]:
                rows.setdefault(name, {"name": name, "status": "not run", "why": "no time was left"})
        elif key in line:
            rows.setdefault(line[key], {"name": line[key]}).update(line)
        elif timed in line and line[timed] in rows:
            figures = {name: value for name, value in line.items() if name != "status"}
            rows[line[timed]].update(figures)
    return list(rows.values())


def _table(title: str, rows: list[dict[str, Any]], rehearsal: bool) -> list[str]:
    """Return the reasons of those that are not right, then a line per kernel and shape, both dtypes in it."""
    if not rows:
        return []
    printed = []
    counts = Counter(row["status"] for row in rows)
    for status in ("wrong", "not run"):
        bad = [row for row in rows if row["status"] == status]
        reasons: dict[str, list[str]] = {}
        for row in bad:
            reasons.setdefault(row.get("why", ""), []).append(row["name"])
        for why, names in reasons.items():
            more = f" and {len(names) - 2} more" if len(names) > 2 else ""
            printed.append(f"{status.upper()}: {', '.join(names[:2])}{more}: {why}"[:240])
    heading = "".join(f"{kind + ' us':>10}{'floor':>9}{'ratio':>6}" for kind in ("bf16", "fp32"))
    places = [(row.get("kernel_name", row["name"]), row.get("shape", "")) for row in rows]
    wide, wider = (max(map(len, each)) + 1 for each in zip(*places, (title, "shape"), strict=True))
    printed.append(f"{title:{wide}}{'shape':{wider}}{heading}")
    cells: dict[tuple[str, str], dict[str, str]] = {}
    for place, row in zip(places, rows, strict=True):
        cells.setdefault(place, {})["fp32" if row.get("dtype") == "fp32" else "16 bits"] = _cell(
            row, rehearsal
        )
    for (name, shape), each in cells.items():
        figures = "".join(f"{each.get(kind, ''):25}" for kind in ("16 bits", "fp32"))
        printed.append(f"{name:{wide}}{shape:{wider}}{figures}".rstrip())
    found = ", ".join(f"{count} {status}" for status, count in counts.most_common())
    return ["", *printed, f"{title}s: {found}"]


def _cell(row: dict[str, Any], rehearsal: bool) -> str:
    if row["status"] != RIGHT:
        return f"{row['status'].upper():>10}"
    if "p50" not in row:
        return f"{RIGHT:>10}"
    floor, ratio = ("-", "-") if rehearsal or "floor" not in row else (row["floor"], row["ratio"])
    return f"{row['p50']:>10.1f}{_figure(floor):>9}{_figure(ratio):>6}"


def _figure(value: Any) -> str:
    return value if isinstance(value, str) else f"{value:.1f}"


def _headlines(lines: Lines) -> list[str]:
    """Return a line per cell: embkern's time, over the floor, and how many times as fast as each rival."""
    printed = []
    for line in lines:
        key = HEADLINE if HEADLINE in line else COMPILED_HEADLINE
        if key not in line:
            continue
        if line["status"] != RIGHT:
            printed.append(f"{line[key]:12} {line['status'].upper()}: {line.get('why', '')}"[:WIDTH])
            continue
        ratios = ", ".join(f"{ratio:.2f} x {name}" for name, ratio in line["times_as_fast_as"].items())
        ratios += "".join(f", {name} FAILED: {why}" for name, why in line.get("failed", {}).items())
        time = f"{line['us']['embkern']['median']:>9.1f} us, {line.get('ratio', '-')} x floor"
        aim = f"   (aim: {line['aim']})" if key == HEADLINE else ""
        printed.append(f"{line[key]:12}{line['shape']:32}{time}; {ratios}{aim}")
    return ["", "headline: embkern, times as fast as", *printed] if printed else []


def counts_of_tests(lines: Lines) -> dict[str, int]:
    """Return how many tests passed, failed and were skipped, and how many are left over."""
    found: dict[str, str] = {}
    for line in lines:
        if TEST in line and found.get(line[TEST]) != "failed":
            found[line[TEST]] = line["status"]
    counts = dict(Counter(found.values()))
    left = len(left_over(lines).get(TEST, []))
    return counts | ({"left over": left} if left else {})


def _tests(lines: Lines) -> list[str]:
    counts = counts_of_tests(lines)
    if not counts:
        return []
    failed: dict[str, str] = {}
    for line in lines:
        if TEST in line and line["status"] == "failed":  # the first reason; a lost process is a second one
            failed.setdefault(line[TEST], line.get("why", ""))
    printed = [
        f"FAILED: {name.rpartition('/')[2]}: {why}"[:200] for name, why in list(failed.items())[:SHOWN]
    ]
    return ["", "tests: " + ", ".join(f"{count} {what}" for what, count in counts.items()), *printed]


def _left(lines: Lines) -> list[str]:
    printed = []
    for key, names in left_over(lines).items():
        more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
        printed.append(f"left over, {key}: {len(names)}: {', '.join(names[:SHOWN])}{more}"[:400])
    return ["", *printed] if printed else []
