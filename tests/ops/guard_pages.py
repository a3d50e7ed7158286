"""Tensors that end at a page without read permission: a read beyond them ends the process."""

from __future__ import annotations

import ctypes
import mmap
import subprocess
import sys

import torch
from torch import Tensor

from embkern.ops.library import CPU_CAPABILITIES, cpu_capability

_AT_EVERY_LEVEL = """
import sys
from embkern.ops.library import cpu_capability
for level in sys.argv[1:]:
    print(cpu_capability(level), flush=True)
    run()
print("read nothing beyond")
"""


def assert_reads_nothing_beyond(script: str) -> None:
    """Check that ``run()`` of a script ends, in one process, at every instruction set of this processor."""
    levels = CPU_CAPABILITIES[: CPU_CAPABILITIES.index(cpu_capability()) + 1]
    command = [sys.executable, "-c", script + _AT_EVERY_LEVEL, *levels]
    ran = subprocess.run(command, capture_output=True, text=True)
    said = ran.stdout.splitlines()
    assert said == [*levels, "read nothing beyond"], f"{said}, exit code {ran.returncode}\n{ran.stderr}"


def at_the_end(tensor: Tensor) -> Tensor:
    """Return a copy whose last byte lies before a page without read permission."""
    size = tensor.numel() * tensor.element_size()
    pages = -(-size // mmap.PAGESIZE)
    memory = mmap.mmap(-1, (pages + 1) * mmap.PAGESIZE)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    protect = ctypes.CDLL(None, use_errno=True).mprotect
    assert protect(ctypes.c_void_p(start + pages * mmap.PAGESIZE), mmap.PAGESIZE, 0) == 0
    offset = pages * mmap.PAGESIZE - size
    guarded = torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel(), offset=offset)
    return guarded.view(tensor.shape).copy_(tensor)
