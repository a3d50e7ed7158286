"""The machine that a figure is of, and whether its CUDA device still answers."""

from __future__ import annotations

import contextlib
import datetime
import platform
import shutil
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from embkern import __version__


def first_line(error: BaseException) -> str:
    """Return an error's type and the first line of its message."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"


def lost_context() -> str | None:
    """Return why no CUDA call of this process can succeed any more, or None where they can.

    A device assertion, an access out of bounds and their like stay with the process ("sticky errors"); an
    error that the first synchronisation reports and clears is not one of them.
    """
    if not torch.cuda.is_initialized():
        return None
    try:
        torch.cuda.synchronize()
        return None
    except RuntimeError:
        try:
            torch.cuda.synchronize()
            return None
        except RuntimeError as error:
            return first_line(error)


def environment() -> dict[str, Any]:
    """Return what a figure depends on besides the code."""
    cuda = torch.cuda.is_available()
    return {
        "embkern": __version__,
        "commit": _commit(),
        "torch": torch.__version__,
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


def _commit() -> str | None:
    """The commit of the sources, with ``-dirty`` where they were edited since; None outside a checkout."""
    if not shutil.which("git"):
        return None
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    return (
        subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent).stdout.strip()
        or None
    )


def version_of(package: str) -> str | None:
    """Return the version of an installed package, or None."""
    with contextlib.suppress(metadata.PackageNotFoundError):
        return metadata.version(package)
    return None


def _cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names and names[0] else platform.machine()
