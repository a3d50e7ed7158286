"""A file of JSON lines, to which several processes append and which is valid at any time."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def append(path: Path, line: dict[str, Any]) -> None:
    """Append a line in one write, so that lines of several processes do not mix."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    try:
        os.write(descriptor, (json.dumps(line) + "\n").encode())
    finally:
        os.close(descriptor)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Return the lines about kernels; a line that is still being written is skipped."""
    return [line for line in _lines(path) if "case" in line]


def environment_of(path: Path) -> dict[str, Any]:
    """Return the record of the device stage, or an empty one."""
    found = [line["environment"] for line in _lines(path) if "environment" in line]
    return found[-1] if found else {}


def _lines(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
