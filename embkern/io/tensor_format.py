"""Named tensors in a safetensors file, with settings, and with checksums that notice damage."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .atomic import replacing
from .errors import disk_error

T = TypeVar("T")


@dataclass(frozen=True)
class TensorFormat:
    """A kind of safetensors file, whose metadata has its name, settings and checksums.

    Every tensor has a checksum, and so has the header: names, dtypes, shapes and the metadata itself (files
    of the first release do without). Equal content gives equal bytes.

    Attributes:
        name: of the format and its version, such as ``embkern.factors/1``.
        content: what a file holds, in a few words.
        required: names of the tensors that each file has, and
        optional: of those that some have.
        settings: names of values of JSON.
        checked: those of the settings that have a checksum as tensors have; whole numbers.
    """

    name: str
    content: str
    required: tuple[str, ...]
    optional: tuple[str, ...] = ()
    settings: tuple[str, ...] = ()
    checked: tuple[str, ...] = ()

    def save(self, path: str | os.PathLike, tensors: Mapping[str, Tensor], **settings: Any) -> None:
        """Write one file; a file already there is replaced whole or not at all.

        Raises:
            OSError: the disk refuses (it is full, for example).
        """
        # safetensors writes what lies in memory, whatever a view's negative bit says of it.
        stored = {name: tensor.detach().cpu().resolve_neg().contiguous() for name, tensor in tensors.items()}
        checked = {**stored, **{name: _tensor(settings[name]) for name in self.checked}}
        metadata = {
            "format": self.name,
            **{name: json.dumps(settings[name]) for name in self.settings},
            "checksums": json.dumps({name: checksum(tensor) for name, tensor in checked.items()}),
        }
        metadata["header"] = _header_checksum(stored, metadata)
        with replacing(path) as temporary:
            try:
                save_file(stored, temporary, metadata)
            except SafetensorError as error:
                if refused := disk_error(error):
                    raise refused from error
                raise
            _sort_metadata(temporary)

    def load(self, path: str | os.PathLike, build: Callable[[dict[str, Any], dict[str, Any]], T]) -> T:
        """Return ``build(tensors, settings)`` of a file that ``save`` wrote.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is truncated, edited, of another format, or ``build`` raises a ValueError, a
                TypeError or a KeyError; the message names the file.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(f"path: expected a file of {self.content}, found none at {path}")
        tensors, metadata = _read(path)
        if (got := metadata.get("format")) != self.name:
            raise ValueError(f"{path}: expected format {self.name!r}, got {got!r}")
        try:
            return build(tensors, self._settings(tensors, metadata))
        except KeyError as error:
            raise ValueError(f"{path}: its metadata is damaged ({error!r})") from error
        except RecursionError as error:
            raise ValueError(f"{path}: its metadata is damaged (nested too deep)") from error
        except (TypeError, ValueError, OverflowError) as error:
            raise ValueError(f"{path}: {error}") from error

    def _settings(self, tensors: dict[str, Tensor], metadata: dict[str, str]) -> dict[str, Any]:
        """Return the settings of a file once every checksum holds."""
        try:
            settings = {name: json.loads(metadata[name]) for name in self.settings}
            checked = {**tensors, **{name: _tensor(settings[name]) for name in self.checked}}
            checksums = json.loads(metadata["checksums"])
            if not isinstance(checksums, dict):
                raise TypeError(f"checksums: expected those of tensors by name, got {checksums!r}")
            if unknown := set(metadata) - {"format", *self.settings, "checksums", "header"}:
                raise TypeError(f"unknown {', '.join(sorted(unknown))}")
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"its metadata is damaged ({error!r})") from error
        known = set(self.required) <= set(tensors) <= {*self.required, *self.optional}
        if not known or set(checked) != set(checksums):
            perhaps = f" and perhaps {', '.join(self.optional)}" if self.optional else ""
            raise ValueError(f"expected {', '.join(self.required)}{perhaps}, got {sorted(tensors)}")
        verify_checksums(checked, checksums)
        header = metadata.pop("header", None)  # files of the first release have none
        if header is not None and header != (got := _header_checksum(tensors, metadata)):
            raise ValueError(
                f"the header was changed after it was saved (expected {header}, got {got}); "
                "the file is damaged or edited"
            )
        return settings


def _read(path: str | os.PathLike) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors and the metadata of one version of a file, though a writer may replace it."""
    while True:
        before, failure = _identity(path), None
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: _aligned(file.get_tensor(name)) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, RuntimeError, KeyError) as error:  # the latter two of a dtype torch lacks
            failure = error
        if _identity(path) != before:  # safetensors opens a file twice: header and tensors may not be of one
            continue
        if failure is not None:
            raise ValueError(f"{path} is not a readable safetensors file ({failure})") from failure
        return tensors, metadata


def _identity(path: str | os.PathLike) -> tuple[int, ...]:
    found = os.stat(path)
    return found.st_ino, found.st_mtime_ns, found.st_ctime_ns, found.st_size


def _aligned(tensor: Tensor) -> Tensor:
    """A tensor in whose place the kernels may read: one of a file lies where the file has it.

    safetensors aligns what it writes, but the format lets others write at any byte.
    """
    return tensor.clone() if tensor.data_ptr() % tensor.element_size() else tensor


def _tensor(setting: Any) -> Tensor:
    """A whole number as its checksum takes it."""
    if type(setting) is not int or not -(2**63) <= setting < 2**63:
        raise TypeError(f"expected a whole number of 64 bits, got {setting!r}")
    return torch.tensor(setting)


def _header_checksum(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """Return the CRC-32 of what a header says: of the metadata, and of each tensor but where it lies."""
    shapes = {name: [str(tensor.dtype), *tensor.shape] for name, tensor in tensors.items()}
    text = json.dumps([dict(metadata), shapes], sort_keys=True)
    return f"crc32:{zlib.crc32(text.encode()):08x}"


def _sort_metadata(path: Path) -> None:
    """Sort the metadata of a safetensors file in place: safetensors writes them in a random order."""
    with open(path, "r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode().ljust(length)
        if len(text) != length:
            raise RuntimeError(f"{path}: expected a header of {length} bytes once sorted, got {len(text)}")
        file.seek(8)
        file.write(text)


def checksum(tensor: Tensor) -> str:
    """Return the CRC-32 of a tensor's bytes, to notice a damaged or edited file."""
    return checksum_of_parts([tensor])


def checksum_of_parts(parts: Iterable[Tensor]) -> str:
    """Return the CRC-32 of the bytes of tensors, one after the other."""
    crc = 0
    for part in parts:
        flat = part.detach().cpu().resolve_neg().contiguous().reshape(-1)
        flat = flat.as_strided(flat.shape, (1,))  # a single element may have any stride
        data: Any = flat.view(torch.uint8).numpy()
        crc = zlib.crc32(data, crc)
    return f"crc32:{crc:08x}"


def verify_checksums(tensors: Mapping[str, Tensor], checksums: Mapping[str, str]) -> None:
    """Raise ValueError if a tensor is not the one that was saved."""
    for name, expected in checksums.items():
        if (got := checksum(tensors[name])) != expected:
            raise ValueError(
                f"{name} was changed after it was saved (expected {expected}, got {got}); "
                "the file is damaged or edited"
            )
