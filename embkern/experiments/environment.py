"""The record of the environment that a figure was measured in."""

from __future__ import annotations

import contextlib
import datetime
import functools
import platform
import shutil
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from .._version import __version__


def environment() -> dict[str, Any]:
    """Return what a figure depends on besides the code and its inputs."""
    cuda = torch.cuda.is_available()
    return {
        "embkern": __version__,
        "commit": _commit(),
        "torch": torch.__version__,
        "transformers": version_of("transformers"),
        "triton": version_of("triton"),
        "python": platform.python_version(),
        "cpu": _cpu_name(),
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "cuda": torch.cuda.get_device_name() if cuda else None,
        "cuda_version": torch.version.cuda,
        "cuda_capability": ".".join(map(str, torch.cuda.get_device_capability())) if cuda else None,
        "date": datetime.date.today().isoformat(),
    }


@functools.cache
def environment_in_words() -> dict[str, str]:
    """Return the part of the record that rows of a study keep, one phrase per entry."""
    record = environment()
    kept = {name: str(record[name]) for name in ("embkern", "torch", "transformers", "python")}
    return kept | {"cpu": f"{platform.machine()} {record['capability']}, {record['threads']} thread(s)"}


def version_of(package: str) -> str | None:
    """Return the version of an installed package, or None."""
    with contextlib.suppress(metadata.PackageNotFoundError):
        return metadata.version(package)
    return None


def _commit() -> str | None:
    """Return the commit of the checkout, with ``-dirty`` after edits; None of an installed package."""
    root = Path(__file__).parents[2]
    if not shutil.which("git") or not (root / ".git").exists():
        return None
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    return subprocess.run(command, capture_output=True, text=True, cwd=root).stdout.strip() or None


def _cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names and names[0] else platform.machine()
