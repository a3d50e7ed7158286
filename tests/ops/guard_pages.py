"""Tensors that end at a page without read permission: a read beyond them ends the process."""

from __future__ import annotations

import ctypes
import mmap

import torch
from torch import Tensor


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
