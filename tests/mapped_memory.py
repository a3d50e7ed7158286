"""Tensors larger than memory, whose pages exist only once they are written."""

from __future__ import annotations

import mmap
import sys

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
