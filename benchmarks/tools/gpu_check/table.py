"""The printed table: kernel, verdict, time, floor, ratio."""

from __future__ import annotations

from typing import Any


def merged(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return one row per kernel from its lines: the verdict, then the time."""
    rows: dict[str, dict[str, Any]] = {}
    for line in lines:
        rows.setdefault(line["case"], {}).update(line)
    return list(rows.values())


def table(rows: list[dict[str, Any]], rehearsal: bool = False) -> list[str]:
    """Return the lines of the table; wrong kernels come first."""
    order = {"wrong": 0, "not run": 1, "right": 2}
    rows = sorted(rows, key=lambda row: (order[row.get("status", "not run")], row["case"]))
    lines = [f"{'kernel':48}{'shape':27}{'':8}{'us':>10}{'floor':>9}{'ratio':>7}"]
    for row in rows:
        if row.get("status") == "right":
            time, floor, ratio = (_figure(row, name) for name in ("p50", "floor", "ratio"))
            if rehearsal:
                floor = ratio = "-"
            shared = "" if row.get("alone", True) or rehearsal else "  beside others"
            end = f"{time:>10}{floor:>9}{ratio:>7}{shared}"
        else:
            end = f"  {row.get('why', '')}"[:80]
        verdict = str(row.get("status", "not run")).upper() if row.get("status") != "right" else "right"
        lines.append(f"{row['case']:48}{row.get('shape', ''):27}{verdict:8}{end}")
    if rehearsal:
        lines.append("A rehearsal: times are those of the interpreter and the emulator, not of a device.")
    return lines


def _figure(row: dict[str, Any], name: str) -> str:
    return f"{row[name]:.1f}" if name in row else "-"
