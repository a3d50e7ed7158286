"""The files of results: one JSON file per benchmark, with its command, its environment and its rows."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from embkern.experiments.environment import environment
from embkern.io.atomic import replacing

ROOT = Path(__file__).parents[1]
RESULTS = Path(os.environ.get("EMBKERN_RESULTS") or Path(__file__).parent / "results")


def command_line(benchmark: str, arguments: Sequence[str]) -> str:
    """Return the command of a benchmark, quoted as a shell reads it."""
    return shlex.join(["python", "-m", "benchmarks", benchmark, *arguments])


def write_results(
    name: str,
    command: str,
    rows: list[dict[str, Any]],
    *,
    directory: Path = RESULTS,
    machine: dict[str, Any] | None = None,
    **more: Any,
) -> Path:
    """Write rows, the command, the environment and other facts to ``directory/NAME.json``.

    ``machine`` is an environment record made earlier or in another process; default: the present one.
    """
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"{name}.json"
    head = json.dumps({"command": command, "environment": machine or environment(), **more}, indent=1)
    lines = ",\n".join(f"  {json.dumps(row)}" for row in rows)  # a row per line reads and diffs well
    with replacing(path) as temporary:
        temporary.write_text(f'{head[:-2]},\n "rows": [\n{lines}\n ]\n}}\n')
    return path
