"""A file of JSON lines, to which the processes of all stages append and which is valid at any time.

A line says what was done to a name, under the key of the work: {"checked": a kernel, "status": ...}. Before
its first name, a stage writes {"planned": key, "names": [...]}; what has no line at the end is left over.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

FILE = "gpu_check.jsonl"
# Keys.
ENVIRONMENT, TEST = "environment", "test"
KERNEL, TIMED_KERNEL = "kernel", "timed kernel"
TILE, TIMED_TILE = "tile", "timed tile"
HEADLINE, COMPILED_HEADLINE = "headline", "compiled headline"


def append(path: Path, line: dict[str, Any]) -> None:
    """Append a line in one write, so that lines of several processes do not mix."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    try:
        os.write(descriptor, (json.dumps(line) + "\n").encode())
    finally:
        os.close(descriptor)


def plan(path: Path, key: str, names: Sequence[str]) -> None:
    """Write what a stage is going to do."""
    append(path, {"planned": key, "names": list(names)})


def all_lines(path: Path) -> list[dict[str, Any]]:
    """Return all lines; one that is still being written is left out."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


def read_lines(path: Path, key: str) -> list[dict[str, Any]]:
    """Return the lines of one kind of work."""
    return [line for line in all_lines(path) if key in line]


def environment_of(path: Path) -> dict[str, Any]:
    """Return the record of the device stage, or an empty one."""
    found = read_lines(path, ENVIRONMENT)
    return found[-1][ENVIRONMENT] if found else {}


def left_over(lines: Sequence[dict[str, Any]]) -> dict[str, list[str]]:
    """Return, by kind of work, the names that were planned and have no line."""
    left: dict[str, dict[str, None]] = {}
    for line in lines:
        if key := line.get("planned"):
            left.setdefault(key, {}).update(dict.fromkeys(line["names"]))
    for line in lines:
        for key in left.keys() & line.keys():
            if line.get("status") != "not run":
                left[key].pop(line[key], None)
    return {key: list(names) for key, names in left.items() if names}
