"""What every benchmark shares: interleaved timing, the machine it ran on, the results file."""

from __future__ import annotations

import datetime
import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from embkern import __version__
from embkern.files import replacing

RESULTS = Path(__file__).parent / "results"


def interleaved(
    providers: dict[str, Callable[[], Any]], *, repeats: int = 20, warmup: int = 3, device: str = "cpu"
) -> dict[str, dict[str, float]]:
    """Time every provider in turn, round after round, so that noise falls on all of them alike.

    Returns microseconds per provider: median, p20 and p80.
    """
    times: dict[str, list[float]] = {name: [] for name in providers}
    for round_ in range(warmup + repeats):
        for name, call in providers.items():
            _synchronize(device)
            start = time.perf_counter()
            call()
            _synchronize(device)
            if round_ >= warmup:
                times[name].append((time.perf_counter() - start) * 1e6)
    return {name: _quantiles(each) for name, each in times.items()}


def _quantiles(times: list[float]) -> dict[str, float]:
    cuts = statistics.quantiles(times, n=10)
    return {
        "median": round(statistics.median(times), 2),
        "p20": round(cuts[1], 2),
        "p80": round(cuts[7], 2),
    }


def _synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def environment() -> dict[str, Any]:
    """Return what a figure depends on besides the code."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=RESULTS
    )
    return {
        "embkern": __version__,
        "commit": commit.stdout.strip() or None,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "cpu": _cpu_name(),
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "cuda": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "date": datetime.date.today().isoformat(),
    }


def _cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names and names[0] else platform.machine()


def write_results(name: str, command: str, rows: list[dict[str, Any]]) -> Path:
    """Write rows with the command and the environment to ``results/NAME.json``."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    with replacing(path) as temporary:
        temporary.write_text(
            json.dumps({"command": command, "environment": environment(), "rows": rows}, indent=1) + "\n"
        )
    return path
