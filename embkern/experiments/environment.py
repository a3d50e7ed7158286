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
from ..ops.library import cpu_capability, load_native

# Instructions that kernels of embkern, of torch or of rivals use where a processor has them.
CPU_FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "avx512vbmi", "gfni", "amx_bf16", "amx_int8")


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
        "cpu": _of_processor("model name") or platform.machine(),
        "cpu_flags": [flag for flag in CPU_FLAGS if flag in _of_processor("flags").split()],
        "native": None if load_native() else cpu_capability(),
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


def _of_processor(field: str) -> str:
    """Return what Linux says of the first processor, or nothing."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(field)), "")
