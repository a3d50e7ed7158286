"""What a benchmark asks of the machine: memory peaks, ceilings, and whether its CUDA device still answers."""

from __future__ import annotations

import contextlib
import ctypes
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from embkern.experiments.timing import synchronize


def first_line(error: BaseException) -> str:
    """Return an error's type and the first line of its message."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"


def lost_context() -> str | None:
    """Return why no CUDA call of this process can succeed any more, or None where they can.

    A device assertion, an access out of bounds and similar errors stay with the process ("sticky errors");
    an error that the first synchronisation reports and clears does not.
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


@contextlib.contextmanager
def using_threads(threads: int) -> Iterator[None]:
    """Set the number of CPU threads within a block."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def peak_bytes(call: Callable[[], Any], device: str) -> int | None:
    """Return how far memory rises during one call, its result included; None where that cannot be measured.

    On CUDA the figure comes from torch's allocator, on a CPU from the resident set (Linux only), after the
    freed heap is returned. A page counts when it is first written; scratch memory that a library allocated
    before the call and keeps does not count.
    """
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None
    if trim is None:
        return None
    trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak to the present value
        before = _resident()["VmRSS"]
        call()
        return max(0, _resident()["VmHWM"] - before)
    except OSError:
        return None


def resident_bytes() -> int:
    """Return the resident set of this process (Linux only)."""
    return _resident()["VmRSS"]


def _resident() -> dict[str, int]:
    lines = Path("/proc/self/status").read_text().splitlines()
    return {
        line.split(":")[0]: int(line.split()[1]) * 1024
        for line in lines
        if line.startswith(("VmRSS", "VmHWM"))
    }


def copy_bandwidth(device: str) -> float:
    """Return the bandwidth of a large copy in GB/s, reads plus writes, the best of several."""
    source = torch.ones((2**30 if device == "cuda" else 2**28) // 4, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / _best_seconds(lambda: target.copy_(source), device) / 1e9


def gemm_peak(dtype: torch.dtype, device: str) -> float:
    """Return the rate of a large square product in GFLOP/s, the best of several."""
    size = 8192 if device == "cuda" else 2048
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(left)
    return 2 * size**3 / _best_seconds(lambda: torch.mm(left, right, out=out), device) / 1e9


def _best_seconds(call: Callable[[], Any], device: str) -> float:
    times: list[float] = []
    while len(times) < 3 or (sum(times) < 1 and len(times) < 10):
        synchronize(device)
        start = time.perf_counter()
        call()
        synchronize(device)
        times.append(time.perf_counter() - start)
    return min(times)
