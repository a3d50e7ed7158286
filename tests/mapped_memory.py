"""Tensors in mapped memory: zeros whose pages exist once they are written, and the files of others."""

from __future__ import annotations

import mmap
import sys
from pathlib import Path

import pytest
import torch


def lazy_words(count: int) -> torch.Tensor:
    """Return zeros (count,) int32 in a private mapping without reserved memory; skip where there is none."""
    if not sys.platform.startswith("linux") or sys.maxsize < 2**62:
        pytest.skip("needs a 64-bit Linux, whose private mappings take no memory until they are written")
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
    try:
        memory = mmap.mmap(-1, 4 * count, flags=flags)
    except OSError as error:
        pytest.skip(f"no address space for {4 * count / 2**30:.0f} GiB ({error})")
    return torch.frombuffer(memory, dtype=torch.int32)


def mapped_file(tensor: torch.Tensor) -> str:
    """The file that the memory of a tensor is mapped from, empty for none."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        fields = line.split(maxsplit=5)
        first, last = (int(each, 16) for each in fields[0].split("-"))
        if first <= tensor.data_ptr() < last:
            return fields[5] if len(fields) > 5 else ""
    return ""
