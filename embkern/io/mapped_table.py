"""Tables larger than memory: the rows of one tensor in a safetensors file, read through a memory map."""

from __future__ import annotations

import copy
import json
import math
import mmap
import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
RESIDENT_BYTES = 16 * 2**20  # bound of the mapped pages that are resident at any time
_WINDOW = 2 * 2**20  # the largest range that one page fault makes resident: a huge page of Linux's page cache
_LARGEST_HEADER = 100 * 2**20  # limit of the safetensors format


class TableFile:
    """Rows of a (V, H) tensor in a safetensors file.

    Rows are copied out of a memory map, whose pages are released after at most ``RESIDENT_BYTES`` (16 MiB;
    with ``MADV_DONTNEED``, where the system has it). The resident memory of the process therefore does not
    grow with the table: it is that bound and the rows that the caller holds. The file must not change while
    it is read; truncating it ends the process with SIGBUS.

    Attributes:
        path: the file.
        name: name of the tensor in it.
        shape: (V, H).
        dtype: bf16, fp16, fp32 or fp64, as stored.
        device: device of the rows that are returned.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: it is not a complete safetensors file, or has no tensor of this name with shape (V, H).
        TypeError: the tensor has another dtype.
        NotImplementedError: the machine is big-endian; the format is little-endian.
    """

    def __init__(self, path: str | os.PathLike, name: str, device: torch.device | str = "cpu") -> None:
        if sys.byteorder != "little":
            raise NotImplementedError("safetensors files are little-endian, and this machine is not")
        if not Path(path).is_file():
            raise FileNotFoundError(f"path: expected a safetensors file, found none at {path}")
        self.path, self.name, self.device = Path(path), name, torch.device(device)
        with open(path, "rb") as file:
            begin, tensors = _read_header(file, path)
            if name not in tensors:
                raise ValueError(
                    f"name: expected one of {', '.join(tensors) or 'none'} in {path}, got {name!r}"
                )
            dtype, shape, (first, last) = (tensors[name][key] for key in ("dtype", "shape", "data_offsets"))
            if dtype not in DTYPES:
                raise TypeError(f"{name}: expected a dtype of {', '.join(DTYPES)} in {path}, got {dtype}")
            if len(shape) != 2 or 0 in shape:
                raise ValueError(
                    f"{name}: expected shape (V, H) with V, H >= 1 in {path}, got {tuple(shape)}"
                )
            self.dtype, self.shape = DTYPES[dtype], torch.Size(shape)
            if last - first != self.nbytes or begin + last > os.fstat(file.fileno()).st_size:
                raise ValueError(f"{path} is truncated: {name} ends beyond the end of the file")
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._offset = begin + first
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The given buffer is not writable")  # it is only read
            data = torch.frombuffer(self._map, dtype=torch.uint8, count=self.nbytes, offset=self._offset)
        # The widest words for which the rows are aligned: the format does not guarantee any alignment.
        self._width = self.nbytes // len(self)
        self._words = data.view(WORDS[math.gcd(8, self._width, self._offset)]).view(len(self), -1)

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes of all rows, as stored."""
        return math.prod(self.shape) * self.dtype.itemsize

    def section(self, start: int, stop: int) -> TableFile:
        """Return a table of the rows from start to stop, which shares the memory map."""
        part = copy.copy(self)
        part.shape = torch.Size((stop - start, self.shape[1]))
        part._offset = self._offset + start * self._width
        part._words = self._words[start:stop]
        return part

    def read(self, start: int = 0, stop: int | None = None) -> Tensor:
        """Return the rows from start to stop, by default all, in the dtype of the file: (n, H)."""
        stop = len(self) if stop is None else stop
        rows = self._words.new_empty(stop - start, self._words.shape[1])
        step = max(1, RESIDENT_BYTES // self._width)
        for at in range(start, stop, step):
            end = min(at + step, stop)
            rows[at - start : end - start] = self._words[at:end]
            self._release(at, end)
        return rows.view(self.dtype).to(self.device)

    def gather(self, ids: Tensor) -> Tensor:
        """Return the rows of ids (n,) in fp32, or fp64 for an fp64 table: (n, H)."""
        # Rows are read in the order of the file, so that pages are read and released together.
        ids, positions = ids.cpu().sort()
        rows = self._words.new_empty(len(ids), self._words.shape[1])
        for some, places in zip(*self._pieces(ids, positions), strict=True):
            rows.index_copy_(0, places, self._words.index_select(0, some))
            self._release(int(some[0]), int(some[-1]) + 1)
        rows = rows.view(self.dtype)
        return rows.to(self.device).to(torch.promote_types(self.dtype, torch.float32))

    def _pieces(self, ids: Tensor, *others: Tensor) -> list[tuple[Tensor, ...]]:
        """Split sorted ids, and the others alike, so that a piece touches ``RESIDENT_BYTES`` at most."""
        windows = (self._offset + ids * self._width) // _WINDOW
        passed = torch.cat([windows.new_zeros(1), (windows.diff() != 0).cumsum(0)])
        piece = passed // max(1, RESIDENT_BYTES // (2 * _WINDOW))  # a row may extend into the next window
        cuts = (torch.nonzero(piece.diff()).flatten() + 1).tolist()
        return [each.tensor_split(cuts) for each in (ids, *others)]

    def blocks(self, size: int) -> Iterator[Tensor]:
        """Yield all rows in blocks of ``size``, in the dtype of the file."""
        for start in range(0, len(self), size):
            yield self.read(start, min(start + size, len(self)))

    def _release(self, start: int, stop: int) -> None:
        """Release the pages of the rows from start to stop; the system may keep them in its page cache."""
        page = mmap.PAGESIZE
        first = max(0, self._offset + start * self._width - _WINDOW) // page * page
        last = min(len(self._map), self._offset + stop * self._width + _WINDOW)
        if hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED, first, last - first)


def _read_header(file: BinaryIO, path: str | os.PathLike) -> tuple[int, dict[str, dict[str, Any]]]:
    """Return the offset of the data in the file, and the header's entry of each tensor."""
    start = file.read(8)
    length = int.from_bytes(start, "little")
    text = file.read(length) if len(start) == 8 and length <= _LARGEST_HEADER else b""
    try:
        header = json.loads(text)
        header.pop("__metadata__", None)
        for entry in header.values():
            first, last = entry["data_offsets"]
            if not isinstance(entry["dtype"], str) or not all(
                type(n) is int and 0 <= n < 2**63 for n in (first, last, *entry["shape"])
            ):
                raise ValueError("a tensor without dtype, shape or offsets")
    except RecursionError:
        raise ValueError(f"{path} is not a readable safetensors file (nested too deep)") from None
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path} is not a readable safetensors file ({error})") from None
    return 8 + length, header
